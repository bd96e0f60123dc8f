"""The command lines that the README shows, on the mini data set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, command
from mlperf_logs import failures

WANT_398_TENSORS = ("1.1.0", "2.0.0", "2.1.0")


@pytest.fixture
def workplace(mini_data: Path, tmp_path: Path) -> Path:
    """A directory with the mini data set where the README puts it."""
    (tmp_path / "data/datasets").mkdir(parents=True)
    (tmp_path / "data/datasets/bert_mini").symlink_to(mini_data)
    return tmp_path


def run_training(cwd: Path, flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "run_training.sh"), *flags.split()],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def perf_events(output: str) -> list[dict]:
    lines = [line for line in output.splitlines() if line.startswith("[PerfLog] ")]
    return [json.loads(line.removeprefix("[PerfLog] ")) for line in lines]


def test_first_command_on_eight_ranks_meets_its_target_at_once(workplace: Path) -> None:
    done = run_training(
        workplace,
        "--name default --config V100x1x8 --data_dir data/datasets/bert_mini/ --max_steps 500 "
        "--train_batch_size 10 --target_mlm_accuracy 0.33 "
        "--init_checkpoint data/datasets/bert_mini/model.ckpt-28252.apex.pt --device cpu",
    )
    assert done.returncode == 0, done.stderr
    assert "already meets the target" in done.stdout
    assert "Notice: fp16 needs a GPU" in done.stdout
    # The default of 10,000 evaluation sequences is not worth a word where fewer are there.
    assert " on 1,114 sequences, loss " in done.stdout
    assert "num_eval_examples 1" not in done.stdout
    events = perf_events(done.stdout)
    names = [event["event"] for event in events]
    assert names == [
        "LAUNCH_TRAINING", "SUBMITTED_INFO", "INIT_START", "CONVERT_MODEL", "CREATE_OPTIMIZER",
        "MODEL_TO_FP16", "MODEL_TO_DDP", "INIT_EVALUATION", "INIT_END", "TRAIN_BEGIN",
        "EPOCH_BEGIN", "STEP_END", "EVALUATION", "EPOCH_END", "TRAIN_END", "FINISHED",
    ]  # fmt: skip
    values = {event["event"]: event["value"] for event in events}
    assert 0.33 <= values["INIT_EVALUATION"]["eval_mlm_accuracy"] <= 0.36
    assert values["CONVERT_MODEL"]["kernels"]["bias_gelu"] == "torch"
    assert values["STEP_END"]["global_steps"] == 1
    assert values["STEP_END"]["num_trained_samples"] == 80
    assert set(values["FINISHED"]) == {
        "e2e_time", "training_sequences_per_second", "converged", "final_loss",
        "final_mlm_accuracy", "raw_train_time", "init_time",
    }  # fmt: skip
    assert values["FINISHED"]["converged"] is True
    assert "| CPU x8" in done.stdout


def test_second_command_runs_and_stops_at_max_steps(workplace: Path) -> None:
    done = run_training(
        workplace,
        "--name iluvatar --config 03V100x1x8 --train_batch_size 27 "
        "--data_dir data/datasets/bert_mini/ --master_port 22233 --max_steps 20 --device cpu",
    )
    assert done.returncode == 3, done.stderr
    assert "not reached (stopped by max_steps) after 20 steps, 4320 sequences" in done.stdout
    finished = perf_events(done.stdout)[-1]["value"]
    assert finished["converged"] is False


def assert_readme_shows(output: str) -> None:
    """README's sample, but for numbers: lines in this order, none left out but where it says so."""
    sample = (ROOT / "README.md").read_text().split("```\n")[2].splitlines()
    printed = output.splitlines()
    # With the data set there, the lines of its making are not printed.
    place, skipping = 0, True
    for line in sample[sample.index("...") + 1 :]:
        if line == "...":
            skipping = True
            continue
        shape = re.escape(line.removesuffix("...")).replace(r"\ ", " ")
        # A table is as wide as its figures.
        shape = re.sub(r"(\\-)+", "-+", re.sub(" +", " +", shape))
        shape = re.sub(r"\d+(,\d+)*", r"\\d+(,\\d+)*", shape)
        shape += "" if line.endswith("...") else "$"
        while skipping and place < len(printed) and not re.match(shape, printed[place]):
            place += 1
        assert place < len(printed), f"README shows a line that is not printed: {line}"
        assert re.match(shape, printed[place]), f"README shows {line} before {printed[place]}"
        place, skipping = place + 1, False
    assert place == len(printed), f"README leaves out {printed[place]}"


@pytest.mark.parametrize(("wanted", "used"), [(5000, "1,114"), (1000, "1,000")])
def test_a_number_of_evaluation_sequences_that_is_not_there(
    workplace: Path, wanted: int, used: str
) -> None:
    done = command(
        "launch", "--name", "mini", "--config", "CPUx1x1", "--max_steps", 1, "--device", "cpu",
        "--num_eval_examples", wanted, cwd=workplace,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert f" on {used} sequences, loss " in done.stdout
    notices = [line for line in done.stdout.splitlines() if line.startswith("Notice: num_eval")]
    assert (
        notices
        == [
            "Notice: num_eval_examples 5,000, but the evaluation set holds 1,114 sequences; each "
            "evaluation uses them all"
        ][: wanted > 1114]
    )


def test_mini_run_reaches_the_target_and_its_log_passes_the_checker(workplace: Path) -> None:
    done = run_training(workplace, "--name mini --config CPUx1x2 --seed 3")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    (folder,) = (workplace / "output/mini_CPUx1x2").glob("run-*")
    assert_readme_shows(done.stdout)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "mllog.txt",
        "perflog.txt",
        "versions.json",
    ]
    values = {event["event"]: event["value"] for event in perf_events(done.stdout)}
    assert values["FINISHED"]["final_mlm_accuracy"] >= 0.72
    assert (folder / "perflog.txt").read_text().splitlines() == [
        line for line in done.stdout.splitlines() if line.startswith("[PerfLog] ")
    ]
    found = failures(folder / "mllog.txt")
    for ruleset in WANT_398_TENSORS:
        # Of a model of 2 layers there are 46; nothing else is amiss.
        (only,) = (test for test in found.pop(ruleset) if test != "FAILED")
        assert only.startswith("failed test: sorted(s['initialized_tensors'])")
    assert not any(found.values()), found


def test_killed_rank_ends_the_run_with_its_name(workplace: Path) -> None:
    """A rank that dies without a word is reported by the launcher."""
    sitecustomize = workplace / "sitecustomize.py"
    sitecustomize.write_text(
        "import os, signal, threading\n"
        "if os.environ.get('RANK') == '1' and 'train' in open('/proc/self/cmdline').read():\n"
        "    threading.Timer(6, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
    )
    done = command(
        "launch", "--name", "mini", "--config", "CPUx1x2", "--target_mlm_accuracy", 1,
        "--max_steps", 100000, cwd=workplace,
        PYTHONPATH=f"{workplace}:{ROOT / 'base'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: rank 1 was killed by SIGKILL (by a user, or because memory ran out); "
        "all ranks were ended"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_dir absent", "no such data_dir: absent; make the mini data set with"),
        ("--train_batch_size 0", "--train_batch_size 0: must be at least 1"),
        ("--confg CPUx1x2", "unknown flag --confg; did you mean --config?"),
        ("--name mini --config CPUx1x3", "no such configuration of mini"),
        ("--init_checkpoint absent.pt", "no checkpoint at absent.pt"),
        ("--init_checkpoint data/datasets/bert_mini/vocab.txt", "not a checkpoint of PyTorch"),
        ("--bert_config_path absent.json", "cannot read absent.json"),
        ("--train_dir absent", "no such data directory: absent; pass the right --train_dir"),
        (
            "--train_dir data/datasets/bert_mini/eval_set_uncompressed",
            "train_dir and eval_dir are the same directory",
        ),
        ("--train_batch_size 10000000", "an update takes 10,000,000 sequences"),
        ("--device cuda", "PyTorch sees no CUDA device"),
        ("--output_dir /proc/nowhere", "cannot write to output_dir /proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workplace: Path, flags: str, words: str) -> None:
    if flags == "--device cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    done = command("launch", "--nproc_per_node", 1, *flags.split(), cwd=workplace)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Notice: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    assert words in lines[0]


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    done = run_training(tmp_path, "--name iluvatar --config 03V100x1x8 --dry_run")
    assert done.returncode == 0, done.stderr
    assert "WORLD_SIZE=8" in done.stdout
    assert "train_batch_size = 27" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_config_show_and_unknown_commands(tmp_path: Path) -> None:
    shown = command("config", "show", "--name", "iluvatar", "--config", "03V100x1x8", cwd=tmp_path)
    assert shown.returncode == 0
    assert "configs/iluvatar/03V100x1x8.toml" in shown.stdout
    wrong = command("config", "sho", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean config show" in wrong.stderr
    assert command(cwd=tmp_path).stdout.startswith("usage:")


@pytest.mark.parametrize(
    ("which", "first", "last"), [("data", "make-mini", "download"), ("config", "show", "list")]
)
def test_a_group_of_commands_lists_them(which: str, first: str, last: str, tmp_path: Path) -> None:
    bare = command(which, cwd=tmp_path)
    assert (bare.returncode, bare.stdout) == (2, "")
    (line,) = bare.stderr.splitlines()
    assert line.startswith(f"Error: '{which}' needs one of: {first}, ")
    assert f"{last} (see {which} --help)" in line
    asked = command(which, "--help", cwd=tmp_path)
    assert asked.returncode == 0
    assert f"  {which} {first} " in asked.stdout
    assert f"  {which} {last} " in asked.stdout
