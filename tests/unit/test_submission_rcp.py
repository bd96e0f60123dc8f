"""Reference convergence points, held to recorded figures and to MLPerf's own rcp_checker."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.submission import rcp, rulesets
from bert_pretraining.submission.rcp import ConvergencePoint, convergence_point
from helpers import command

checker_module = pytest.importorskip("mlperf_logging.rcp_checker.rcp_checker")


@pytest.mark.parametrize(
    ("global_batch_size", "basis", "mean", "least"),
    [
        (80, "smallest", 2_414_421, 2_274_732),
        (216, "smallest", 2_414_421, 2_274_732),
        (256, "smallest", 2_414_421, 2_274_732),
        (447, "smallest", 2_414_421, 2_274_732),
        (448, "exact", 2_414_421, 2_274_732),
        (512, "interpolated", 2_420_324, 2_280_211),
        (768, "interpolated", 2_443_934, 2_306_738),
        (1024, "interpolated", 2_467_543, 2_333_264),
        (2048, "interpolated", 2_561_982, 2_439_370),
        (4096, "interpolated", 2_750_860, 2_651_583),
    ],
)
@pytest.mark.parametrize("ruleset", ["2.1.0", "4.1.0", "5.0.0"])
def test_recorded_figures(
    global_batch_size: int, basis: str, mean: int, least: int, ruleset: str
) -> None:
    """Figures taken from a run of rcp_checker, rounded to samples."""
    point = convergence_point(global_batch_size, ruleset)
    assert point.basis == basis
    assert round(point.mean_samples) == mean
    assert round(point.least_mean()) == least


def official_point(checker: object, batch_size: int) -> tuple[str, dict | None]:
    """What rcp_checker.check_directory would compare with, by its own functions."""
    pruned = "pruned_rcps"
    if record := checker._find_rcp(batch_size, pruned):
        return "exact", record
    low = checker._find_top_min_rcp(batch_size, pruned)
    high = checker._find_bottom_max_rcp(batch_size, pruned)
    if low and high:
        return "interpolated", checker._create_interp_rcp(batch_size, low, high)[1]
    return ("smallest", checker._find_min_rcp(pruned)) if high else ("missing", None)


@pytest.mark.parametrize("ruleset", rulesets.RULESETS)
def test_the_official_checker_says_the_same(ruleset: str) -> None:
    checker = checker_module.RCP_Checker("training", ruleset, "bert", verbose=False)
    sizes = {1, 8, 80, 255, *range(64, 17_000, 411)}
    sizes |= {size + by for point in rcp.reference_points(ruleset)
              for size in [int(point.global_batch_size)] for by in (-1, 0, 1)}  # fmt: skip
    bases = set()
    for size in sorted(sizes):
        point = convergence_point(size, ruleset)
        basis, record = official_point(checker, size)
        assert point.basis == basis, size
        bases.add(basis)
        if record is None:
            assert point.mean_samples is None and point.least_mean() is None
            continue
        assert point.mean_samples == pytest.approx(record["RCP Mean"], rel=1e-12)
        assert point.standard_deviation == pytest.approx(record["RCP Stdev"], rel=1e-12)
        # The checker searches by halves down to 1e-4 samples.
        assert point.least_mean() == pytest.approx(record["Min Epochs"], abs=1e-3)
        for mean in (record["Min Epochs"] - 1, record["Min Epochs"] + 1, record["RCP Mean"] + 1):
            passed, factor = checker._eval_submission_record(record, [mean] * 10, "")
            assert point.passes(mean) == passed
            assert point.scale_factor(mean) == pytest.approx(factor, rel=1e-12)
    assert bases == {"exact", "interpolated", "smallest", "missing"}


def test_pruning_keeps_what_the_checker_keeps() -> None:
    kept = [int(point.global_batch_size) for point in rcp.prune(rcp.reference_points())]
    assert kept == [448, 4608, 6144, 6912, 12288, 13056, 16384]


def test_more_runs_must_come_closer_to_the_mean() -> None:
    point = convergence_point(448)
    assert point.least_mean(3) < point.least_mean(10) < point.least_mean(40) < point.mean_samples
    with pytest.raises(UserError, match="give 3 or more"):
        point.least_mean(2)


def test_a_missing_point_fails_whatever_the_mean() -> None:
    point = convergence_point(16_385)
    assert isinstance(point, ConvergencePoint) and point.basis == "missing"
    assert not point.passes(9e9)


@pytest.mark.parametrize(
    ("ruleset", "words"),
    [
        ("5.1.0", "BERT left MLPerf Training after 5.0"),
        ("6.1.0", "BERT left MLPerf Training after 5.0"),
        ("0.7.0", "no reference convergence points"),
        ("4.2.0", "no such ruleset; did you mean 4.1.0"),
        ("newest", "no such ruleset"),
    ],
)
def test_rulesets_without_bert_are_refused(ruleset: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convergence_point(448, ruleset)


def test_without_the_checkers_one_line_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(UserError, match="pip install"):
        convergence_point(448).least_mean()
    monkeypatch.setattr(rulesets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lacks the package mlperf_logging.*pip install"):
        convergence_point(448)


def test_command(tmp_path: Path) -> None:
    done = command("submission", "rcp", "--global_batch_size", 1024, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for words in ("4.1.0", "1,024", "between 448 and 4,608", "2,467,543", "2,333,264", "1.0575"):
        assert words in done.stdout
    done = command(
        "submission", "rcp", "--global-batch-size", 768, "--mean_samples", 2_300_000, "--json",
        cwd=tmp_path,
    )  # fmt: skip
    figures = json.loads(done.stdout)
    assert figures["basis"] == "interpolated" and figures["passes"] is False
    done = command(
        "submission", "rcp", "--global_batch_size", 768, "--ruleset", "5.1.0", cwd=tmp_path
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "BERT left MLPerf Training after 5.0" in done.stderr
