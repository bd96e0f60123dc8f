"""What a resumed run says of its target, its learning rate and its optimizer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bert_pretraining.optim import Schedule
from helpers import in_process, perf_events

FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--seed", 5, "--log_freq", 1,
         "--save_checkpoint", "--resume", "auto",
         "--train_batch_size", 8, "--num_eval_examples", 64,
         "--min_samples_to_start_checkpoints", 0)  # fmt: skip


def train(data: Path, output_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """One rank, in this process; goes on where the last one in `output_dir` ended."""
    words = (*FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags)
    return in_process("train", *words, cwd=output_dir.parent)


def mllog_status(output_dir: Path) -> str:
    newest = max(output_dir.glob("run-*"))
    (line,) = (
        line for line in (newest / "mllog.txt").read_text().splitlines() if '"run_stop"' in line
    )
    return json.loads(line.removeprefix(":::MLLOG "))["metadata"]["status"]


def test_a_converged_run_goes_on_to_a_higher_target(mini_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train(mini_data, out, "--target_mlm_accuracy", 0.3, "--max_steps", 9)
    assert first.returncode == 0, first.stderr
    second = train(mini_data, out, "--target_mlm_accuracy", 0.9, "--max_steps", 3)
    assert second.returncode == 3, second.stderr
    assert "Target 0.9 not reached (stopped by max_steps) after 3 steps" in second.stdout
    assert perf_events(second.stdout, "FINISHED")[0]["converged"] is False
    assert mllog_status(out) == "aborted"


def test_a_lower_target_may_be_met_already(mini_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train(mini_data, out, "--target_mlm_accuracy", 0.9, "--max_steps", 2)
    assert first.returncode == 3, first.stderr
    second = train(mini_data, out, "--target_mlm_accuracy", 0.3, "--max_steps", 9)
    assert second.returncode == 0, second.stderr
    (saved,) = out.glob("run-*/model.ckpt-2.pt")
    assert f"\nNothing to do: {saved} has reached the target 0.3 before (" in second.stdout
    assert "Target 0.3 reached" not in second.stdout
    assert mllog_status(out) == "success"


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw")])
def test_the_rate_is_the_one_that_the_step_used(
    mini_data: Path, tmp_path: Path, flags: tuple
) -> None:
    """And with any optimizer a resumed run has the rates, the losses of one without a stop."""
    common = (*flags, "--learning_rate", 1e-3, "--warmup_steps", 3, "--max_steps", 4)
    whole = train(mini_data, tmp_path / "whole", *common, "--num_samples_per_checkpoint", 16)
    schedule = Schedule(1e-3, max_steps=4, warmup_steps=3)
    steps = perf_events(whole.stdout, "STEP_END")
    assert [step["learning_rate"] for step in steps] == [schedule(done) for done in range(4)]
    assert "Step 1/4: " in whole.stdout
    assert "learning rate 0, " in whole.stdout.split("Step 1/4: ")[1].splitlines()[0]
    (half,) = (tmp_path / "whole").glob("run-*/model.ckpt-2.pt")
    rest = train(mini_data, tmp_path / "rest", *common, "--init_checkpoint", half)
    assert "not bit-identical" not in rest.stdout, rest.stdout
    keys = ("learning_rate", "loss", "grad_norm")
    found = [[step[key] for key in keys] for step in perf_events(rest.stdout, "STEP_END")]
    assert found == [[step[key] for key in keys] for step in steps[2:]]


def test_mlm_alone_trains_and_says_what_it_left_out(mini_data: Path, tmp_path: Path) -> None:
    done = train(mini_data, tmp_path / "out", "--objective", "mlm", "--max_steps", 2)
    assert done.returncode == 3, done.stderr
    assert "left out: next-sentence head (4)" in done.stdout
    both = train(mini_data, tmp_path / "out", "--max_steps", 3)
    assert both.returncode == 2, "a run with the head does not go on from one without"
    assert "bert.pooler.dense.bias' is missing" in both.stderr
    assert "--objective" in both.stderr


def test_a_refused_start_leaves_no_run_behind(mini_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = train(mini_data, out, "--resume", "required", "--max_steps", 1)
    assert done.returncode == 2
    assert "--resume required: no whole training checkpoint in" in done.stderr
    assert list(out.glob("run-*")) == []
