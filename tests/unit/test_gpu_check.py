"""`benchmarks/gpu_check.sh` without a GPU, and that no script in benchmarks/ has rotted.

`timeout` and the interpreter are replaced by programs that keep what they were called with.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bert_pretraining.errors import UserError
from helpers import ROOT

SCRIPT = ROOT / "benchmarks/gpu_check.sh"
MOST_SECONDS = 540  # of a part: one command may run ten minutes
MOST_FILES = 8
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
# What the stand-in for `timeout` does with a step: see `checked`.
TIMEOUT = r"""#!/bin/bash
echo "${*//$'\n'/ }" >>"$CALLS"
echo figures
case "$*" in
  *"$HANGS"*) [ -z "$HANGS" ] || exec sleep 100 ;;
esac
case "$*" in
  *"$FAILS"*) [ -z "$FAILS" ] || { echo "a reason" >&2; exit 124; } ;;
esac
"""


class Checked:
    """A run of the script. hangs, fails: a text in the commands of the steps that do so."""

    def __init__(
        self, tmp_path: Path, part: str, fails: str = "", hangs: str = "", pretended: bool = False
    ) -> None:
        programs, self.out = tmp_path / "programs", tmp_path / "out"
        programs.mkdir(exist_ok=True)
        self.calls_file = tmp_path / "calls"
        for name, text in (("timeout", TIMEOUT), ("python", "#!/bin/bash\nexit 0\n")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin", "PYTHON": "python", "OUT": str(self.out),
            "CALLS": str(self.calls_file), "FAILS": fails, "HANGS": hangs,
            **({"PRETENDED_GPU": "/stubs"} if pretended else {}),
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), "", part], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> int:
        self.shown, self.errors = self.process.communicate(timeout=600)
        return self.process.returncode

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def archived(self) -> list[str]:
        (archive,) = self.out.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            return [Path(name).name for name in opened.getnames()]


@pytest.mark.parametrize("pretended", [False, True])
@pytest.mark.parametrize("part", ["1", "2"])
def test_a_part_fits_one_command(tmp_path: Path, part: str, pretended: bool) -> None:
    checked = Checked(tmp_path, part, pretended=pretended)
    assert (checked.end(), checked.errors) == (0, "")
    assert all(call.startswith("-k 10 ") for call in checked.calls)
    limits = [int(call.split()[2]) for call in checked.calls]
    assert len(limits) >= 6
    assert sum(limits) <= MOST_SECONDS * (3 if pretended else 1)
    assert len(list(checked.out.iterdir())) <= MOST_FILES
    steps = [line.split()[1] for line in checked.shown.splitlines() if line.startswith("ok ")]
    assert {f"{name}.txt" for name in steps} <= set(checked.archived())
    assert len(steps) == len(limits)
    if part == "1":
        words = " ".join(checked.calls)
        first_figure = words.index("--batch_size 96")
        assert words.index("tests/numerics") < first_figure
        assert pretended or words.index("--parts proof") < first_figure


def test_the_exit_code_is_the_number_of_failed_steps(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "1", fails="bench step")
    assert checked.end() == 2
    lines = checked.shown.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAILED")] == [
        "step_96", "step_48",
    ]  # fmt: skip
    assert "        a reason" in lines
    assert lines[-1].startswith("Failed steps: 2.")


def test_a_run_that_is_stopped_keeps_what_was_measured(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "1", hangs="--batch_size 48 --precision")
    deadline = time.monotonic() + 600
    while not any("--batch_size 48 --precision" in call for call in checked.calls):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    checked.process.send_signal(signal.SIGTERM)
    assert checked.end() == 143
    assert "step_96.txt" in checked.archived()
    assert len(list(checked.out.iterdir())) <= MOST_FILES


def test_a_part_that_does_not_exist(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "3")
    assert checked.end() == 2
    assert checked.errors == "Error: part 3: there are 1, 2 and all; pass one of them\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Error: PyTorch of ")
    assert len(done.stderr.splitlines()) == 1


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program of benchmarks/ as a module; its `main` has not run."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_find_what_they_import(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(path, monkeypatch).__doc__


def test_gpu_extra_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = tmp_path / "bert_config.json"
    sizes = {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    config.write_text(json.dumps(sizes))
    extra = load(ROOT / "benchmarks/gpu_extra.py", monkeypatch)
    out = tmp_path / "out.json"
    words = f"--device cpu --batch_size 2 --repeats 1 --parts attention tf32 --output {out}"
    monkeypatch.setattr(sys, "argv", ["x", *words.split(), "--bert_config_path", str(config)])
    assert extra.main() == 0
    results = json.loads(out.read_text())["results"]
    assert set(results) == {"attention", "tf32"}
    assert all(one["n"] == 1 for part in results.values() for one in part.values())


def test_the_compiled_cross_entropy_is_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_pretraining.kernels.reference import IGNORED, masked_cross_entropy

    extra = load(ROOT / "benchmarks/gpu_extra.py", monkeypatch)
    torch.manual_seed(0)
    logits = torch.randn(7, 11)
    logits[0, 3] = 9.0
    labels = torch.tensor([3, IGNORED, 0, 10, IGNORED, 5, 1])
    for found, right in zip(
        extra.cross_entropy(logits, labels), masked_cross_entropy(logits, labels), strict=True
    ):
        torch.testing.assert_close(found, right)


def test_update_cost_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    program = load(ROOT / "benchmarks/update_cost.py", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["x", "--batch_size", "2"])
    with pytest.raises(UserError, match="there is no GPU; run it where PyTorch sees one"):
        program.main()
