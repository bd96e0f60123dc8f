"""Do loss curves differ if the gradients of 8 micro-batches are summed in bf16 or in float32?

    PYTHONPATH=base python benchmarks/gradient_dtype.py --output results/DATE_gradient_dtype

Trains the mini data set on one CPU rank, with the same batches and dropout masks: in bf16 with
`--gradient_dtype param` and `fp32`, and in fp32. Each is repeated with several seeds. What the
sums' dtype changes is compared with what the precision and the seed change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bert_pretraining.bench import record

KINDS = {
    "bf16, sums in bf16": "--precision bf16 --gradient_dtype param",
    "bf16, sums in fp32": "--precision bf16 --gradient_dtype fp32",
    "fp32": "--precision fp32",
}
COMMON = "--name mini --config CPUx1x1 --train_batch_size 4 --gradient_accumulation_steps 8 " \
    "--log_freq 1 --target_mlm_accuracy 1"  # fmt: skip
LATE = 30  # steps at the end of which the mean is taken


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
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(record.ROOT / "base")
    runs: dict[str, dict[int, dict]] = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "bert_mini"
        subprocess.run(module("data", "make-mini", "--output_dir", data), check=True)
        for seed in range(1, flags.seeds + 1):
            for place, (kind, chosen) in enumerate(KINDS.items()):
                folder = Path(name) / f"{seed}-{place}"
                runs[kind][seed] = train(data, folder, chosen, seed, flags.steps)
                run = runs[kind][seed]
                print(
                    f"seed {seed}, {kind}: {late(run):.4f}, {run['eval_mlm_accuracy']:.4f}",
                    flush=True,
                )
    result = {"flags": COMMON, "kinds": KINDS, "steps": flags.steps, "late": LATE}
    summary = summary_of(runs)
    record.write(flags.output / "gradient_dtype.json", {**result, "summary": summary, "runs": runs})
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
