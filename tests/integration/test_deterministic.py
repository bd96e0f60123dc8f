"""--deterministic: a resumed run is the uninterrupted one, on a GPU too where there is one.

On a CPU, operators add in a fixed order in any case; the runs there show that none is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import command, perf_events

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--seed", 5, "--log_freq", 1,
         "--num_eval_examples", 64, "--save_checkpoint", "--min_samples_to_start_checkpoints", 0,
         "--max_steps", 4, "--train_batch_size", 8, "--num_samples_per_checkpoint", 16,
         "--device", DEVICE)  # fmt: skip
GRAPH = ("--batching", "balanced", "--use_cuda_graph")


def run(data: Path, output_dir: Path, *flags: object) -> tuple[dict, list[dict]]:
    """The last checkpoint's content and the steps' figures."""
    done = command(
        "train", *FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags,
        cwd=output_dir.parent,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    (path,) = output_dir.glob("run-*/model.ckpt-4.pt")
    return torch.load(path, weights_only=True), perf_events(done.stdout, "STEP_END")


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp32"),
        pytest.param(("--precision", "bf16"), marks=pytest.mark.slow),
        pytest.param(("--precision", "bf16", *GRAPH), marks=pytest.mark.slow),
        pytest.param(("--precision", "bf16", "--kernels", "torch"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_bit_identical(mini_data: Path, tmp_path: Path, flags: tuple) -> None:
    config = json.loads((mini_data / "bert_config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    flags = (*flags, "--deterministic", "--bert_config_path", tmp_path / "bert_config.json")
    whole, steps = run(mini_data, tmp_path / "whole", *flags)
    (half,) = (tmp_path / "whole").glob("run-*/model.ckpt-2.pt")
    resumed, later = run(mini_data, tmp_path / "resumed", *flags, "--init_checkpoint", half)
    figures = ("loss", "grad_norm", "mlm_acc")
    assert [[step[key] for key in figures] for step in later] == [
        [step[key] for key in figures] for step in steps[2:]
    ]
    for part in ("model", "optimizer"):
        assert_same(whole[part], resumed[part], part)


def assert_same(one: object, other: object, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    else:
        assert one == other, where
