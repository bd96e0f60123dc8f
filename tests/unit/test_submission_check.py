"""`submission check`: a sound submission passes, and every defect is named with its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.submission import check as checking
from bert_pretraining.submission import official, tree
from bert_pretraining.submission.findings import Finding
from helpers import command, needs_reference
from submission_defects import (
    DEFECTS,
    another_batch_size,
    description,
    edit,
    last_accuracy,
    log,
    long_init,
    repeated_seed,
    set_status,
    too_fast,
    work_before_the_clock,
)
from submission_tree import line_of, make_submission

pytestmark = needs_reference
pytest.importorskip("mlperf_logging")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_submission(tmp_path_factory.mktemp("submission"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with shorter logs."""
    return make_submission(tmp_path_factory.mktemp("short"), whole=False)


@pytest.fixture
def submission(short: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(short, tmp_path / short.name)


def own(root: Path, ruleset: str = "4.1.0") -> list[Finding]:
    return checking.own_findings(root, tree.systems(root), ruleset)[0]


def assert_found(
    findings: list[Finding], path: Path, line: int | None, words: str, is_error: bool = True
) -> None:
    found = [(each.path, each.line, each.is_error) for each in findings if words in each.what]
    assert (path, line, is_error) in found, "\n".join(map(str, findings))


def test_a_sound_submission_has_no_finding(sound: Path, short: Path) -> None:
    assert own(sound) == own(short) == []


@pytest.mark.parametrize("spoil", DEFECTS, ids=lambda spoil: spoil.__name__)
def test_a_defect_is_named_with_its_place(
    submission: Path, spoil: Callable[[Path], tuple[Path, int | None, str]]
) -> None:
    path, line, words = spoil(submission)
    assert_found(own(submission), path, line, words)


STRANGE = [None, True, "", "text", [], [1], {}, {"a": [1]}, -1, 0, 0.5, 1e300, float("nan")]


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_no_value_is_too_strange_for_a_finding(submission: Path, strange: object) -> None:
    """Every value of one log, every metadata entry of another, every time of a third."""

    def values(events: list[dict]) -> None:
        for event in events:
            event["value"] = strange

    def metadata(events: list[dict]) -> None:
        for event in events:
            event["metadata"] = dict.fromkeys(event["metadata"], strange)

    def times(events: list[dict]) -> None:
        for event in events:
            event["time_ms"] = strange

    for run, change in enumerate((values, metadata, times)):
        edit(log(submission, run), change)
    content = json.loads(description(submission).read_text())
    description(submission).write_text(json.dumps(dict.fromkeys(content, strange)))
    found = {finding.path for finding in own(submission) if finding.is_error}
    assert {log(submission, 0), description(submission)} <= found


def test_work_before_the_clock_is_a_warning(submission: Path) -> None:
    path, line, words = work_before_the_clock(submission)
    assert_found(own(submission), path, line, words, is_error=False)


# ---- the whole command, MLPerf's tools included


def test_a_sound_submission_passes(sound: Path, tmp_path: Path) -> None:
    before = sorted(sound.rglob("*"))
    done = command("submission", "check", sound, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 logs pass" in done.stdout
    assert "no errors (RCP Test Passed: RCP Interpolation)" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("passes ruleset 4.1.0: 0 errors, 0 warnings")
    assert sorted(sound.rglob("*")) == before and list(tmp_path.iterdir()) == []


def test_what_mlperfs_tools_say_is_told_with_its_place(submission: Path) -> None:
    drop = "opt_lamb_beta_1"
    edit(log(submission, 1), lambda events: [e for e in events if e["key"] != drop])
    long_init(submission)
    repeated_seed(submission)
    too_fast(submission)
    (submission / "benchmarks" / ".hidden").write_text("x")
    text = description(submission).read_text().replace("Available on-premise", "onprem")
    description(submission).write_text(text)
    report = checking.check(submission)
    found = report.findings
    words = f"compliance checker: Required EXACTLY_ONE occurrence of '{drop}' but found 0"
    assert_found(found, log(submission, 1), None, words)
    line = line_of(log(submission, 1), "init_stop")
    assert_found(found, log(submission, 1), line, "compliance checker: 'init_stop' failed test")
    results = log(submission, 1).parent
    assert_found(found, results, None, "package checker: Seed checker failed")
    assert_found(found, results, None, "package checker: RCP Test Failed: RCP Interpolation")
    hidden = submission / "benchmarks" / ".hidden"
    assert_found(found, hidden, None, "repo checker: Files with git-unfriendly name")
    assert_found(found, description(submission), None, "system description checker: failed for")
    assert not report.passed
    assert {verdict.tool: verdict.passed for verdict in report.verdicts} == {
        "compliance checker": False,
        "package checker": False,
        "repo checker": False,
        "system descriptions": False,
        "own checks": False,
    }
    assert json.dumps(report.to_json())


def test_a_crash_of_the_package_checker_is_a_finding(submission: Path) -> None:
    another_batch_size(submission)
    results = log(submission, 0).parent
    verdict = official.package(submission, "4.1.0")
    assert not verdict.passed
    assert_found(verdict.findings, results, None, "package checker crashed: KeyError")
    text = description(submission).read_text()
    text = text.replace('"accelerators_per_node": "8"', '"accelerators_per_node": 8')
    description(submission).write_text(text)
    verdict = official.package(submission, "4.1.0")
    assert_found(verdict.findings, submission, None, "package checker crashed: TypeError")
    verdict = official.description(tree.systems(submission), "4.1.0")
    assert not verdict.passed
    assert_found(verdict.findings, description(submission), None, "crashed: TypeError")


def fail_run(root: Path, run: int) -> None:
    """The run trains on without ever reaching the target."""

    def change(events: list[dict]) -> None:
        last_accuracy(events)["value"] = 0.7191
        set_status(events, "aborted")

    edit(log(root, run), change)


def test_one_unconverged_run_is_allowed_and_two_are_not(submission: Path, tmp_path: Path) -> None:
    fail_run(submission, 3)
    done = command("submission", "check", submission, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    line = line_of(log(submission, 3), "run_stop")
    assert f"warning {log(submission, 3)}:{line}: this run did not reach the target" in done.stdout
    fail_run(submission, 5)
    for run in (3, 5):
        line = line_of(log(submission, run), "run_stop")
        assert_found(own(submission), log(submission, run), line, "2 did not, one is allowed")
    assert not official.package(submission, "4.1.0").passed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ruleset", "5.1.0"], "BERT left MLPerf Training after 5.0"),
        (["--ruleset", "6.0.0"], "BERT left MLPerf Training after 5.0"),
        ([], "holds no results/"),
        (["--werror"], "unknown flag --werror"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = command("submission", "check", tmp_path, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert words in done.stderr
