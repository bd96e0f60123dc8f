"""`qualify compare`: what is marked, what is refused, and the exit codes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.qualify import compare

CONTENT = {
    "verdict": "pass",
    "schema": 1,
    "started": "2026-11-26T12:00:00Z",
    "machine": {
        "device": "NVIDIA H100", "device_type": "cuda", "cpu": "Xeon", "host": "a", "devices": 8,
        "versions": {"torch": "2.13.0"},
    },
    "settings": {"quick": False, "ranks": 8, "layers": 24, "batch_sizes": [16], "precision": None},
    "stages": [
        {
            "name": "kernels", "verdict": "pass", "reason": "", "seconds": 1.0, "notes": [],
            "figures": {
                "kernels": {
                    "attention triton bf16": {
                        "verdict": "pass", "fault": "", "forward_backward_s": 0.01,
                    },
                    "attention flash bf16": {"verdict": "fail", "fault": "wrong"},
                },
            },
        },
        {
            "name": "determinism", "verdict": "pass", "reason": "", "seconds": 1.0, "notes": [],
            "figures": {"fingerprints": {"step 1": "aa", "weights": "bb"}, "unsteady": {}},
        },
        {
            "name": "step", "verdict": "pass", "reason": "", "seconds": 1.0, "notes": [],
            "figures": {
                "precision": "bf16",
                "sequences/s": 1000.0,
                "by_batch_size": {"16": {
                    "sequences/s": 1000.0, "tflop/s": 500.0, "step_seconds_median": 0.1,
                    "seconds_other": 0.001,
                }},
            },
        },
        {
            "name": "endurance", "verdict": "pass", "reason": "", "seconds": 1.0, "notes": [],
            "figures": {
                "points": [[1.0, 0.1], [2.0, 0.1]], "drift_share": 0.0, "batch_size": 16,
                "step_seconds_last_third": 0.1, "sequences/s": 1000.0,
            },
        },
    ],
}  # fmt: skip
SIZE = ("stages", 2, "figures", "by_batch_size", "16")
KERNELS = ("stages", 0, "figures", "kernels")
FINGERPRINTS = ("stages", 1, "figures", "fingerprints")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Compare CONTENT with itself, after changes: (path..., last key) -> value, None to remove."""

    def run(changes: dict[tuple, object], *flags: str) -> tuple[int, str]:
        other = copy.deepcopy(CONTENT)
        for (*way, last), value in changes.items():
            place = other
            for key in way:
                place = place[key]
            if value is None:
                del place[last]
            else:
                place[last] = value
        files = tmp_path / "first.json", tmp_path / "second.json"
        for file, content in zip(files, (CONTENT, other), strict=True):
            file.write_text(json.dumps(content))
        code = compare.main([*map(str, files), *flags])
        return code, capsys.readouterr().out

    return run


def test_equal_runs(run: Run) -> None:
    code, text = run({})
    assert code == 0
    assert "Nothing is marked." in text
    assert "step.by_batch_size.16.tflop/s" in text
    assert "endurance.points" not in text, "no two runs have points in common"


def test_a_rate_that_is_6_percent_lower_is_marked(run: Run) -> None:
    code, text = run({(*SIZE, "sequences/s"): 940.0})
    assert code == 1
    assert "second.json: step.by_batch_size.16.sequences/s fell by 6.0%: 940, was 1000" in text
    assert text.rstrip().endswith("Marked: 1")


@pytest.mark.parametrize(
    ("figure", "value", "code"),
    [
        ("sequences/s", 950.0, 1),
        ("sequences/s", 951.0, 0),
        ("sequences/s", 2000.0, 0),
        ("tflop/s", 470.0, 1),
        ("step_seconds_median", 0.106, 1),
        ("step_seconds_median", 0.104, 0),
        ("step_seconds_median", 0.05, 0),
        ("seconds_other", 0.01, 0),
    ],
)
def test_five_percent_is_the_limit(run: Run, figure: str, value: float, code: int) -> None:
    assert run({(*SIZE, figure): value})[0] == code


def test_a_rate_that_is_missing_is_marked(run: Run) -> None:
    code, text = run({(*SIZE, "tflop/s"): None})
    assert code == 1
    assert "step.by_batch_size.16.tflop/s is missing" in text


def test_a_step_of_more_sequences_may_take_longer(run: Run) -> None:
    """The best batch size is another one, by chance; the rate is still judged."""
    figures = ("stages", 3, "figures")
    larger = {(*figures, "batch_size"): 32, (*figures, "step_seconds_last_third"): 0.2}
    code, text = run(larger)
    assert code == 0
    assert "times of endurance.*: 32 sequences a rank were the best, were 16" in text
    code, text = run({**larger, (*figures, "sequences/s"): 900.0})
    assert code == 1
    assert "endurance.sequences/s fell by 10.0%" in text
    assert run({(*figures, "step_seconds_last_third"): 0.2})[0] == 1


def test_a_lost_kernel_is_marked(run: Run) -> None:
    kernel = (*KERNELS, "attention triton bf16")
    code, text = run({(*kernel, "verdict"): "fail", (*kernel, "fault"): "wrong at 3 of 8"})
    assert code == 1
    assert "the kernel attention triton bf16 is lost: wrong at 3 of 8" in text
    code, text = run({kernel: None})
    assert code == 1
    assert "the kernel attention triton bf16 is lost: it is not there" in text


def test_a_stage_that_is_not_judged_is_told_once(run: Run) -> None:
    """Other programs made the stages `kernels` and `endurance` late; their last figures miss."""
    reason = "not judged: ended at its limit of 300 s"
    kernels, endurance = ("stages", 0), ("stages", 3)
    code, out = run(
        {
            (*kernels, "is_judged"): False, (*kernels, "reason"): reason,
            (*KERNELS, "attention triton bf16"): None,
            (*endurance, "is_judged"): False, (*endurance, "reason"): reason,
            (*endurance, "figures", "sequences/s"): None,
        }
    )  # fmt: skip
    assert code == 1
    for name in ("kernels", "endurance"):
        assert out.count(f"the stage {name} is {reason}") == 1
    assert "lost" not in out
    assert "is missing" not in out


def test_figures_that_the_first_lacks_since_a_stage_was_not_judged_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = copy.deepcopy(CONTENT)
    first["stages"][3]["is_judged"] = False
    del first["stages"][3]["figures"]["sequences/s"]
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, content in zip(files, (first, CONTENT), strict=True):
        file.write_text(json.dumps(content))
    assert compare.main([*map(str, files)]) == 0
    told = f"not compared: {files[0]}: figures that its stage endurance lacks, as it was not judged"
    assert told in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("machine", "versions"), 7),
        (FINGERPRINTS, [1]),
        ((*SIZE, "sequences/s"), 10**400),
    ],
)
def test_figures_of_another_kind_are_refused(run: Run, path: tuple, value: object) -> None:
    with pytest.raises(UserError, match=r"second\.json: its figures are not those of a qual"):
        run({path: value})


def test_a_kernel_that_was_wrong_before_is_not_lost(run: Run) -> None:
    assert run({(*KERNELS, "attention flash bf16"): None})[0] == 0


def test_a_changed_fingerprint_is_marked(run: Run) -> None:
    code, text = run({(*FINGERPRINTS, "weights"): "cc"})
    assert code == 1
    assert "second.json: the fingerprint of weights changed" in text
    torch = ("machine", "versions", "torch")
    code, text = run({(*FINGERPRINTS, "weights"): "cc", torch: "2.14.0"})
    assert code == 1
    assert "the fingerprint of weights changed; torch is 2.14.0, was 2.13.0" in text


def test_fingerprints_of_other_machines_and_unsteady_kernels_are_not_compared(run: Run) -> None:
    changed = {(*FINGERPRINTS, "weights"): "cc"}
    code, text = run({**changed, ("machine", "device"): "NVIDIA H200"})
    assert code == 0
    assert "fingerprints are not compared: device is NVIDIA H200, was NVIDIA H100" in text
    code, text = run({**changed, ("stages", 1, "figures", "unsteady"): {"attention": "output"}})
    assert code == 0
    assert "fingerprints are not compared: kernels give other bits each time" in text


def test_a_stage_that_fails_now_is_marked(run: Run) -> None:
    code, text = run({("stages", 3, "verdict"): "fail", ("stages", 3, "reason"): "it hangs"})
    assert code == 1
    assert "the stage endurance fails: it hangs" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("settings", "layers"): 2}, "setting layers is 24 in "),
        ({("settings", "ranks"): 4}, "setting ranks is 8 in "),
        ({("settings", "quick"): True}, "setting quick is false in "),
        ({("settings", "precision"): "fp32"}, "setting precision is by default in "),
        ({("settings", "kernels_attention"): "torch"}, "setting kernels_attention is by default"),
        ({("settings", "batch_sizes"): [16, 32]}, "setting batch_sizes is [16] in "),
        ({("stages", 2, "figures", "precision"): "fp32"}, "the step's precision is bf16 in "),
        ({("stages", 3): None}, "the list of stages is kernels, determinism, step, endurance in "),
    ],
)
def test_unlike_runs_are_refused(run: Run, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match="unlike runs") as caught:
        run(changes)
    assert words in str(caught.value)


def test_as_json(run: Run) -> None:
    code, text = run({(*SIZE, "sequences/s"): 940.0}, "--json")
    content = json.loads(text)
    assert code == 1
    assert len(content["marked"]) == 1
    figures = {figure["name"]: figure for figure in content["figures"]}
    figure = figures["step.by_batch_size.16.sequences/s"]
    assert figure["values"] == [1000.0, 940.0]
    assert figure["changes"] == pytest.approx([0.0, -0.06])
    assert figure["marks"] == ["", "fell by 6.0%"]


def test_a_figure_that_is_not_finite_is_standard_json_and_marked(run: Run) -> None:
    code, text = run({(*SIZE, "sequences/s"): "NaN"}, "--json")
    assert code == 1
    marked = json.loads(text, parse_constant=pytest.fail)["marked"]
    assert [line.partition(": ")[2] for line in marked] == [
        "step.by_batch_size.16.sequences/s is not finite: nan, was 1000"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("machine",): []}, "'\\[\\]' is not a mapping"),
        ({("settings",): "all"}, "'all' is not a mapping"),
        ({("stages", 2, "figures"): [1]}, "'\\[1\\]' is not a mapping"),
        ({("stages", 2, "verdict"): "good"}, "the stage step has the verdict 'good'"),
        ({("stages",): 1}, "not a qualification"),
        ({("started",): None}, "not a qualification"),
        ({("schema",): 2}, "schema 2, but this version reads schema 1"),
    ],
)
def test_a_file_of_another_form_is_refused(run: Run, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(changes)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "stages": [', b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_qualification_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a qualification"):
        compare.main([str(file), str(file)])
    with pytest.raises(UserError, match=str(tmp_path)):
        compare.main([str(tmp_path), str(tmp_path)])


def test_it_needs_two_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are 1"):
        compare.main([str(tmp_path / "a.json")])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="not a qualification"):
        compare.main([str(tmp_path / "a.json")] * 2)
