"""The command lines that the README shows, on the mini data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_pretraining.logs.sinks import PARTS
from helpers import (
    OF_A_BUSY_MACHINE,
    ROOT,
    command,
    error_lines,
    in_process,
    perf_events,
    run_port,
)
from mlperf_logs import failures

# The figures that STEP_END and FINISHED have besides upstream's, on a machine of any kind.
SPEED = {
    "tokens/s", "tflop/s", "matrix_share", "peak_memory_mib",
    *(f"seconds_{part}" for part in PARTS),
    *(f"{which}_rank_seconds" for which in ("fastest", "median", "slowest")),
    "fastest_rank", "slowest_rank",
}  # fmt: skip
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


# Eight ranks, as the commands say, take long on few cores.
ranks_of_a_command = pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(8, "", marks=pytest.mark.slow, id="as shown"),
        pytest.param(2, " --nproc_per_node 2", id="2 ranks"),
    ],
)


@ranks_of_a_command
def test_first_command_meets_its_target_at_once(workplace: Path, ranks: int, flags: str) -> None:
    done = run_training(
        workplace,
        "--name default --config V100x1x8 --data_dir data/datasets/bert_mini/ --max_steps 500 "
        "--train_batch_size 10 --target_mlm_accuracy 0.33 "
        f"--init_checkpoint data/datasets/bert_mini/model.ckpt-28252.apex.pt --device cpu{flags}",
    )
    assert done.returncode == 0, done.stderr
    assert "already meets the target" in done.stdout
    assert "Notice: fp16 needs a GPU" in done.stdout
    # The default of 10,000 evaluation sequences is not worth a word where fewer are there.
    assert " on 1,114 sequences, loss " in done.stdout
    assert "num_eval_examples 1" not in done.stdout
    events = perf_events(done.stdout)
    names = [
        event["event"]
        for event in events
        if event["event"] != "NOTICE" or event["value"]["kind"] not in OF_A_BUSY_MACHINE
    ]
    assert names == [
        "LAUNCH_TRAINING", "SUBMITTED_INFO", "INIT_START", "CONVERT_MODEL", "CREATE_OPTIMIZER",
        "MODEL_TO_FP16", "MODEL_TO_DDP", "RUN_OUTLINE", "EVALUATION_SET", "INIT_EVALUATION",
        "NOTICE", "INIT_END", "TRAIN_BEGIN", "EPOCH_BEGIN", "STEP_END", "EVALUATION", "EPOCH_END",
        "TRAIN_END", "FINISHED",
    ]  # fmt: skip
    values = {event["event"]: event["value"] for event in events}
    assert 0.33 <= values["INIT_EVALUATION"]["eval_mlm_accuracy"] <= 0.36
    assert values["CONVERT_MODEL"]["kernels"]["bias_gelu"] == "torch"
    assert values["STEP_END"]["global_steps"] == 1
    assert values["STEP_END"]["num_trained_samples"] == 10 * ranks
    speed = {name for name in values["STEP_END"] if name in SPEED}
    assert speed == SPEED
    assert set(values["FINISHED"]) - SPEED == {
        "e2e_time", "training_sequences_per_second", "converged", "final_loss",
        "final_mlm_accuracy", "raw_train_time", "init_time", "p_whole", "p_train", "p_core",
    }  # fmt: skip
    assert values["FINISHED"]["converged"] is True
    assert f"| CPU x{ranks}" in done.stdout


@ranks_of_a_command
def test_second_command_runs_and_stops_at_max_steps(
    workplace: Path, ranks: int, flags: str
) -> None:
    done = run_training(
        workplace,
        "--name iluvatar --config 03V100x1x8 --train_batch_size 27 --data_dir "
        f"data/datasets/bert_mini/ --master_port {run_port()} --max_steps 4 --device cpu{flags}",
    )
    assert done.returncode == 3, done.stderr
    shown = f"not reached (stopped by max_steps) after 4 steps, {4 * 27 * ranks} sequences"
    assert shown in done.stdout
    (finished,) = perf_events(done.stdout, "FINISHED")
    assert finished["converged"] is False
    assert_figures_agree(done.stdout, 27, ranks)


def assert_figures_agree(output: str, batch: int, ranks: int) -> None:
    """A run's figures of one kind follow from those of another. batch: sequences of a rank."""
    (outline,), (finished,) = perf_events(output, "RUN_OUTLINE"), perf_events(output, "FINISHED")
    rate = outline["matrix_rate"]["flop_per_second"]
    for step in perf_events(output, "STEP_END"):
        assert step["tflop/s"] == pytest.approx(step["matrix_share"] * rate / 1e12, rel=1e-4)
        parts = sum(step[f"seconds_{part}"] for part in PARTS)
        taken = parts * step["seq/s"] / (batch * ranks)
        # Rank 0's clock counts the steps. Another rank may have waited for it before that.
        assert taken == pytest.approx(1, rel=1e-3) or (ranks > 1 and taken > 1)
        # Of the mini data set, a sequence has 6 to 64 tokens.
        assert 6 < step["tokens/s"] / step["seq/s"] < 64
        seconds = [step[f"{which}_rank_seconds"] for which in ("fastest", "median", "slowest")]
        assert seconds == sorted(seconds)
    assert finished["p_whole"] == pytest.approx(finished["training_sequences_per_second"])
    assert finished["p_whole"] < finished["p_train"] < finished["p_core"]


@pytest.mark.parametrize(("wanted", "used"), [(5000, "1,114"), (1000, "1,000")])
def test_a_number_of_evaluation_sequences_that_is_not_there(
    workplace: Path, wanted: int, used: str
) -> None:
    done = in_process(
        "train", "--name", "mini", "--config", "CPUx1x1", "--max_steps", 1, "--device", "cpu",
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


@pytest.mark.slow
def test_mini_run_reaches_the_target_and_its_log_passes_the_checker(workplace: Path) -> None:
    done = run_training(workplace, "--name mini --config CPUx1x2 --seed 3")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    (folder,) = (workplace / "output/mini_CPUx1x2").glob("run-*")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "console.txt",
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


# What the launcher finds, and what a rank does.
AT_LAUNCH = [
    ("--data_dir absent", "no such data_dir: absent; check the path, or pass the folder with"),
    ("--train_batch_size 0", "--train_batch_size 0: must be at least 1"),
    ("--confg CPUx1x2", "unknown flag --confg; did you mean --config?"),
    ("--name mini --config CPUx1x3", "no such configuration of mini"),
    ("--init_checkpoint absent.pt", "no checkpoint at absent.pt"),
    ("--bert_config_path absent.json", "cannot read absent.json"),
    ("--train_dir absent", "no such data directory: absent; pass the right --train_dir"),
    (
        "--train_dir data/datasets/bert_mini/eval_set_uncompressed",
        "train_dir and eval_dir are the same directory",
    ),
]
ON_A_RANK = [
    (
        "--init_checkpoint data/datasets/bert_mini/vocab.txt",
        "plain text that begins '[PAD]', not a checkpoint; pass",
    ),
    ("--train_batch_size 10000000", "an update takes 10,000,000 sequences"),
    ("--output_dir /proc/nowhere", "cannot write to output_dir /proc/nowhere"),
    pytest.param(
        "--device cuda",
        "--device cuda: this PyTorch sees no such device",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    ),
]


def assert_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = error_lines(done.stderr)
    assert line.startswith("Error: ")
    assert words in line


@pytest.mark.parametrize(("flags", "words"), AT_LAUNCH)
def test_bad_input_is_refused_before_ranks_start(workplace: Path, flags: str, words: str) -> None:
    done = in_process("launch", "--nproc_per_node", 1, *flags.split(), cwd=workplace)
    assert_one_line(done, words)


@pytest.mark.parametrize(("flags", "words"), ON_A_RANK)
def test_bad_input_that_a_rank_finds(workplace: Path, flags: str, words: str) -> None:
    done = in_process("train", "--device", "cpu", *flags.split(), cwd=workplace)
    assert_one_line(done, words)


@pytest.mark.parametrize(("flags", "words"), [AT_LAUNCH[0], ON_A_RANK[0]])
def test_bad_input_is_one_line_of_the_launcher(workplace: Path, flags: str, words: str) -> None:
    done = command("launch", "--nproc_per_node", 1, *flags.split(), cwd=workplace)
    assert_one_line(done, words)


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    done = run_training(tmp_path, "--name iluvatar --config 03V100x1x8 --dry_run")
    assert done.returncode == 0, done.stderr
    assert "WORLD_SIZE=8" in done.stdout
    assert "train_batch_size = 27" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_config_show_and_unknown_commands(tmp_path: Path) -> None:
    shown = in_process(
        "config", "show", "--name", "iluvatar", "--config", "03V100x1x8", cwd=tmp_path
    )
    assert shown.returncode == 0
    assert "configs/iluvatar/03V100x1x8.toml" in shown.stdout
    wrong = in_process("config", "sho", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean config show" in wrong.stderr
    assert in_process(cwd=tmp_path).stdout.startswith("usage:")


@pytest.mark.parametrize(
    ("which", "first", "last"), [("data", "make-mini", "download"), ("config", "show", "list")]
)
def test_a_group_of_commands_lists_them(which: str, first: str, last: str, tmp_path: Path) -> None:
    bare = in_process(which, cwd=tmp_path)
    assert (bare.returncode, bare.stdout) == (2, "")
    (line,) = bare.stderr.splitlines()
    assert line.startswith(f"Error: '{which}' needs one of: {first}, ")
    assert f"{last}; see python -m bert_pretraining {which} --help" in line
    asked = in_process(which, "--help", cwd=tmp_path)
    assert asked.returncode == 0
    assert f"  {which} {first} " in asked.stdout
    assert f"  {which} {last} " in asked.stdout
