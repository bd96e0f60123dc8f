"""Do gradients and loss curves differ if micro-batches are summed in bf16 or in float32?

    PYTHONPATH=base python benchmarks/gradient_dtype.py --output results/DATE_gradient_dtype

First it sums the gradients of up to 64 micro-batches of the mini data set without dropout, with the
start weights, and compares the sums with those of a float32 model added in float64. Then it trains
on one CPU rank with 8 micro-batches an update, with the same batches and dropout masks: in bf16
with `--gradient_dtype param` and `fp32`, and in fp32, with several seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.bench import record
from bert_pretraining.checkpoint import load_weights
from bert_pretraining.data.packing import pack_rows
from bert_pretraining.data.shards import read_shard
from bert_pretraining.kernels import select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.optim import OptimizerSettings, create_optimizer

KINDS = {
    "bf16, sums in bf16": "--precision bf16 --gradient_dtype param",
    "bf16, sums in fp32": "--precision bf16 --gradient_dtype fp32",
    "fp32": "--precision fp32",
}
COMMON = "--name mini --config CPUx1x1 --train_batch_size 8 --gradient_accumulation_steps 8 " \
    "--log_freq 1 --target_mlm_accuracy 1"  # fmt: skip
LATE = 50  # steps at the end of which the mean is taken


def module(*words: object) -> list[str]:
    return [sys.executable, "-m", "bert_pretraining", *(str(word) for word in words)]


def train(data: Path, folder: Path, flags: str, seed: int, steps: int) -> dict[str, object]:
    """The loss and gradient norm of each step, and the last evaluation."""
    done = subprocess.run(
        module("launch", *COMMON.split(), *flags.split(), "--data_dir", data, "--seed", seed,
               "--max_steps", steps, "--eval_steps", steps, "--output_dir", folder),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 3:
        raise SystemExit(f"{flags}: exit code {done.returncode}\n{done.stderr}")
    return figures(folder)


def figures(folder: Path) -> dict[str, object]:
    """What `train` returns, from a run that is over."""
    losses, norms, evaluation = [], [], {}
    (run,) = folder.glob("run-*")
    for line in (run / "perflog.txt").read_text().splitlines():
        event = json.loads(line.removeprefix("[PerfLog] "))
        if event["event"] == "STEP_END":
            losses.append(event["value"]["loss"])
            norms.append(event["value"]["grad_norm"])
        elif event["event"] == "EVALUATION":
            evaluation = event["value"]
    return {
        "losses": losses,
        "gradient_norms": norms,
        "eval_loss": evaluation["eval_loss"],
        "eval_mlm_accuracy": evaluation["eval_mlm_accuracy"],
    }


def model_of(data: Path, config: BertConfig, dtype: torch.dtype) -> BertForPreTraining:
    """With the start weights, in evaluation mode: without dropout."""
    kernels = select("auto", torch.device("cpu"), dtype, config.head_size)
    model = BertForPreTraining(config, kernels, 1)
    load_weights(model, next(data.glob("model.ckpt-*")))
    return model.to(dtype).eval()


def sum_errors(data: Path) -> dict[str, dict[str, float]]:
    """Error of the summed gradient, relative to its norm, by the number of micro-batches.

    "backward alone": of bf16 gradients that are added in float64.
    """
    config = BertConfig.load(data / "bert_config.json")
    exact, rounded = (model_of(data, config, dtype) for dtype in (torch.float32, torch.bfloat16))
    shard = read_shard(sorted((data / "2048_shards_uncompressed").iterdir())[0], config.vocab_size)
    true = {name: torch.zeros(p.shape).double() for name, p in exact.named_parameters()}
    alone = {name: torch.zeros_like(value) for name, value in true.items()}
    sums = {}
    for kind, dtype in (("sums in bf16", None), ("sums in fp32", torch.float32)):
        model = model_of(data, config, torch.bfloat16)
        named = list(model.named_parameters())
        optimizer = create_optimizer("flat", named, OptimizerSettings(), gradient_dtype=dtype)
        optimizer.zero_grad()
        sums[kind] = model, optimizer
    errors: dict[str, dict[str, float]] = {}
    for number in range(1, 65):
        batch = pack_rows(shard, np.arange(4 * number - 4, 4 * number))
        for model, into in ((exact, true), (rounded, alone)):
            model.zero_grad()
            mean_loss(model(batch), batch).backward()
            for name, parameter in model.named_parameters():
                into[name] += parameter.grad.double()
        for model, _ in sums.values():
            mean_loss(model(batch), batch).backward()
        if number in (1, 8, 64):
            found = {kind: its.gradients_by_name() for kind, (_, its) in sums.items()}
            errors[str(number)] = {
                kind: apart(gradients, true)
                for kind, gradients in {"backward alone": alone, **found}.items()
            }
    return errors


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of the difference, relative to the second."""
    difference = sum((ours[name].double() - value).square().sum() for name, value in theirs.items())
    return float((difference / sum(value.square().sum() for value in theirs.values())).sqrt())


def late(run: dict[str, object]) -> float:
    """The mean loss of the last steps."""
    return statistics.fmean(run["losses"][-LATE:])


def summary_of(runs: dict[str, dict[int, dict]]) -> dict[str, object]:
    """Late losses of each kind, and the differences from fp32 with the same seed."""
    exact, seeds = runs["fp32"], list(runs["fp32"])
    found: dict[str, object] = {
        "late_loss": {kind: record.spread([late(of[seed]) for seed in seeds])
                      for kind, of in runs.items()},
        "late_loss_minus_fp32s": {
            kind: record.spread([late(of[seed]) - late(exact[seed]) for seed in seeds])
            for kind, of in runs.items() if of is not exact
        },
        "eval_mlm_accuracy": {
            kind: record.spread([of[seed]["eval_mlm_accuracy"] for seed in seeds])
            for kind, of in runs.items()
        },
        "first_gradient_norm_relative_to_fp32": {
            kind: record.spread([
                of[seed]["gradient_norms"][0] / exact[seed]["gradient_norms"][0] for seed in seeds
            ])
            for kind, of in runs.items() if of is not exact
        },
    }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(record.ROOT / "base")
    runs: dict[str, dict[int, dict]] = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "bert_mini"
        subprocess.run(module("data", "make-mini", "--output_dir", data), check=True)
        errors = sum_errors(data)
        print(json.dumps(errors, indent=2), flush=True)
        for seed in range(1, flags.seeds + 1):
            for place, (kind, chosen) in enumerate(KINDS.items()):
                folder = Path(name) / f"{seed}-{place}"
                runs[kind][seed] = train(data, folder, chosen, seed, flags.steps)
                run = runs[kind][seed]
                print(
                    f"seed {seed}, {kind}: {late(run):.4f}, {run['eval_mlm_accuracy']:.4f}",
                    flush=True,
                )
    result = {
        "gradient_errors": errors,
        "flags": COMMON,
        "kinds": KINDS,
        "steps": flags.steps,
        "late": LATE,
    }
    summary = summary_of(runs)
    record.write(flags.output / "gradient_dtype.json", {**result, "summary": summary, "runs": runs})
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
