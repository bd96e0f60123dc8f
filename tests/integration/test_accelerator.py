"""Runs on a type of device that is neither CPU nor CUDA.

The device is `testdev` (tests/accelerator): PyTorch's PrivateUse1, under which npu, musa, mlu and
others live too, over main memory. It refuses tensors of two devices, has a random generator of its
own, and lacks what many devices lack: float64, fp16, fused Adam, streams, pinned memory, graphs,
a backend of collectives.

This does not prove that a real device computes right, nor that anything is right where the device
works asynchronously: here every operator is a CPU kernel, and is done when it returns. Nor does it
show a vendor's backend of collectives; ranks exchange their tensors through main memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import read_checkpoint
from helpers import ROOT, assert_same_tensors, command, in_process, perf_events
from testdev_program import CHECKS

pytestmark = pytest.mark.slow

FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--seed", 5, "--log_freq", 1,
         "--train_batch_size", 8,
         "--num_eval_examples", 64, "--save_checkpoint", "--min_samples_to_start_checkpoints", 0,
         "--max_steps", 4, "--num_samples_per_checkpoint", 16)  # fmt: skip


def run(
    how: str, testdev: Path, data: Path, output_dir: Path, *flags: object
) -> subprocess.CompletedProcess[str]:
    """how: "launch", or "train" for one rank without a launcher."""
    words = (*FLAGS, "--data_dir", data, "--output_dir", output_dir, "--device", "testdev", *flags)
    paths = f"{ROOT / 'base'}{os.pathsep}{testdev}"
    done = command(how, *words, cwd=output_dir.parent, PYTHONPATH=paths)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def figures(output: str) -> list[float]:
    """Losses and accuracies of all steps and evaluations, in order."""
    events = [(event["event"], event["value"]) for event in perf_events(output)]
    names = {
        "INIT_EVALUATION": ("eval_loss", "eval_mlm_accuracy"),
        "STEP_END": ("loss", "mlm_acc", "grad_norm"),
        "EVALUATION": ("eval_loss", "eval_mlm_accuracy"),
    }
    return [value[key] for event, value in events for key in names.get(event, ())]


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, which other tests switch on, would run Triton's kernels here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def with_dropout(mini_data: Path, tmp_path: Path) -> Path:
    """bert_config.json of the mini model, with dropout; its own has none."""
    config = json.loads((mini_data / "bert_config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(config))
    return path


def test_the_device_is_used_as_any_other(testdev: Path) -> None:
    """The checks of testdev_program.py, among them that two devices are never mixed."""
    paths = [str(ROOT / "base"), str(ROOT / "tests"), str(testdev)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "testdev_program.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


def test_training_and_evaluation_give_the_figures_of_a_cpu(
    testdev: Path, mini_data: Path, tmp_path: Path
) -> None:
    """Each thing that the device lacks is one line, such as fp16, which becomes fp32."""
    words = (*FLAGS, "--data_dir", mini_data, "--device", "cpu", "--output_dir", tmp_path / "cpu")
    expected = in_process("train", *words, cwd=tmp_path)
    found = run("train", testdev, mini_data, tmp_path / "device", "--fp16")
    assert (expected.returncode, found.returncode) == (3, 3), found.stderr
    assert len(figures(found.stdout)) == 2 + 4 * 3 + 2
    assert figures(found.stdout) == pytest.approx(figures(expected.stdout), rel=1e-4)
    notices = [line for line in found.stdout.splitlines() if line.startswith("Notice: testdev ")]
    assert notices == [
        "Notice: testdev devices have no float64: long sums are computed in float32",
        "Notice: testdev devices have no streams: a step waits until its batch is copied",
        "Notice: testdev devices have no page-locked memory: the host waits for each copy",
        "Notice: testdev devices do not compute in fp16; training in fp32",
    ]
    assert "Test device x1" in found.stdout


def test_a_resumed_run_is_the_uninterrupted_one(
    testdev: Path, mini_data: Path, with_dropout: Path, tmp_path: Path
) -> None:
    """Bit for bit, dropout included, which draws from the device's own generator."""
    flags = ("--bert_config_path", with_dropout)
    whole = run("train", testdev, mini_data, tmp_path / "whole", *flags)
    assert whole.returncode == 3, whole.stderr
    (half,) = (tmp_path / "whole").glob("run-*/model.ckpt-2.pt")
    assert set(read_checkpoint(half).state["random"][0]) == {"cpu", "testdev"}

    resumed = run(
        "train", testdev, mini_data, tmp_path / "resumed", *flags, "--init_checkpoint", half
    )
    assert resumed.returncode == 3, resumed.stderr
    assert "not bit-identical" not in resumed.stdout
    assert figures(resumed.stdout) == figures(whole.stdout)[2 + 2 * 3 :]
    ends = [
        torch.load(next((tmp_path / name).glob("run-*/model.ckpt-4.pt")), weights_only=True)
        for name in ("whole", "resumed")
    ]
    assert_same_tensors(ends[1]["model"], ends[0]["model"])
    for slot in ("master", "first_moment", "second_moment"):
        assert_same_tensors(ends[1]["optimizer"][slot], ends[0]["optimizer"][slot])
    for kind in ("cpu", "testdev"):
        one, other = (end["state"]["random"][0][kind] for end in ends)
        assert torch.equal(one, other)

    # On another type of device, the generator's state means nothing; the run says so.
    moved = in_process(
        "train", *FLAGS, *flags, "--data_dir", mini_data, "--device", "cpu",
        "--output_dir", tmp_path / "moved", "--init_checkpoint", half, cwd=tmp_path,
    )  # fmt: skip
    assert moved.returncode == 3, moved.stderr
    assert "Notice: not bit-identical to the run without a stop: " in moved.stdout
    assert "devices testdev -> cpu, so dropout starts from the seed" in moved.stdout


@pytest.mark.parametrize("flags", [(), ("--distributed_lamb",)], ids=["replicated", "sharded"])
def test_two_ranks_exchange_through_main_memory(
    testdev: Path, mini_data: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Each rank has a device of its own, the figures are those of two ranks on a CPU."""
    ranks = ("--nproc_per_node", 2, *flags)
    words = (*FLAGS, *ranks, "--data_dir", mini_data, "--device", "cpu")
    expected = command("launch", *words, "--output_dir", tmp_path / "cpu", cwd=tmp_path)
    found = run("launch", testdev, mini_data, tmp_path / "device", *ranks)
    assert (expected.returncode, found.returncode) == (3, 3), found.stderr
    assert figures(found.stdout) == pytest.approx(figures(expected.stdout), rel=1e-4)
    assert found.stdout.count("Notice: the ranks exchange tensors through main memory") == 1
    assert "Test device x2" in found.stdout


def test_more_ranks_than_devices(testdev: Path, mini_data: Path, tmp_path: Path) -> None:
    done = run("launch", testdev, mini_data, tmp_path / "output", "--nproc_per_node", 3)
    assert done.returncode == 2
    assert "wants 3 GPUs, and this machine has 2" in done.stderr


def test_predict_gives_the_answers_of_the_cpu(
    testdev: Path, mini_data: Path, tmp_path: Path
) -> None:
    words = ("predict", mini_data / "model.ckpt-28252.apex.pt", "anna sees [MASK] rose .",
             "she [MASK] the wall .", "--json", "--device")  # fmt: skip
    paths = f"{ROOT / 'base'}{os.pathsep}{testdev}"
    found = []
    for done in (
        command(*words, "testdev", cwd=tmp_path, PYTHONPATH=paths),
        in_process(*words, "cpu", cwd=tmp_path),
    ):
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for theirs, ours in zip(found[0].pop("masks"), found[1].pop("masks"), strict=True):
        assert [word["id"] for word in theirs["words"]] == [word["id"] for word in ours["words"]]
        assert [word["probability"] for word in theirs["words"]] == pytest.approx(
            [word["probability"] for word in ours["words"]], abs=1e-5
        )
    assert found[0].pop("is_next") == pytest.approx(found[1].pop("is_next"), abs=1e-5)
    assert found[0] == found[1]
