"""Losses of short runs with fixed seeds, to hold a change that must not alter them against.

    PYTHONPATH=base python benchmarks/losses.py --output before.json
    ... the change ...
    PYTHONPATH=base python benchmarks/losses.py --output after.json --compare before.json

Every case runs through the command line, so that the same program measures any layout of the
package. Exit code 1 if a loss, a gradient norm, an evaluation or a final weight differs in a bit.
The numbers depend on processor and PyTorch: compare files from one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bert_pretraining.bench import record

COMMON = "--name mini --device cpu --seed 7 --log_freq 1 --eval_steps 10 --max_steps 30 " \
    "--save_checkpoint --target_mlm_accuracy 1"  # fmt: skip
CASES = {
    "one rank": "--config CPUx1x1",
    "one rank, reference operators and LAMB": "--config CPUx1x1 --kernels reference "
    "--optimizer reference --train_batch_size 16",
    "one rank, compiled": "--config CPUx1x1 --compile on --batching balanced --static_tokens 3600",
    "one rank, accumulation, recomputation, global mean": "--config CPUx1x1 --train_batch_size 16 "
    "--gradient_accumulation_steps 3 --checkpoint_activations --mlm_loss_normalization global",
    "two ranks": "--config CPUx1x2",
    "two ranks, bf16": "--config CPUx1x2 --precision bf16",
    "two ranks, distributed LAMB": "--config CPUx1x2 --distributed_lamb",
    "two ranks, balanced, clipped before the reduction": "--config CPUx1x2 --batching balanced "
    "--clip_gradients before_reduction --optimizer foreach",
    "three ranks, distributed LAMB in bf16, clipped before": "--config CPUx1x2 --nproc_per_node 3 "
    "--train_batch_size 8 --distributed_lamb --precision bf16 --clip_gradients before_reduction",
}  # fmt: skip
# Their embedding gradients are added up by both threads at once, in no fixed order: one thread.
ONE_THREAD = ("one rank, reference operators and LAMB", "one rank, compiled")
FIGURES = ("loss", "mlm_acc", "grad_norm", "eval_loss", "eval_mlm_accuracy", "global_steps")


def launch(folder: Path, data: Path, flags: str, **environment: str) -> Path:
    """Train; returns the run's folder."""
    words = [*COMMON.split(), *flags.split(), "--data_dir", str(data), "--output_dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "bert_pretraining", "launch", *words],
        env={**os.environ, "PYTHONPATH": str(record.ROOT / "base"), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 3:
        raise SystemExit(f"{flags}: exit code {done.returncode}\n{done.stderr}")
    return max(folder.glob("run-*"))


def events(run: Path) -> list[dict[str, object]]:
    """The figures of every logged step and evaluation, in order."""
    found = []
    for line in (run / "perflog.txt").read_text().splitlines():
        event = json.loads(line.removeprefix("[PerfLog] "))
        if event["event"] in ("INIT_EVALUATION", "STEP_END", "EVALUATION"):
            found.append({key: event["value"][key] for key in FIGURES if key in event["value"]})
    return found


def digest(run: Path, step: int) -> str:
    """Of the weights, moments and master weights after a step."""
    saved = torch.load(run / f"model.ckpt-{step}.pt", weights_only=True)
    sha = hashlib.sha256()
    for group in (saved["model"], *saved["optimizer"].values()):
        for name, value in sorted(group.items()) if isinstance(group, dict) else ():
            sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def measure(data: Path) -> dict[str, dict]:
    """Case -> its figures and the digest of what it saved last."""
    results = {}
    for name, flags in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            threads = {"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {}
            run = launch(Path(folder), data, flags, **threads)
            results[name] = {"flags": flags, "figures": events(run), "weights": digest(run, 30)}
        print(f"{name}: {results[name]['figures'][-1]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        launch(Path(folder), data, "--config CPUx1x2 --max_steps 20")
        run = launch(Path(folder), data, "--config CPUx1x2 --resume required")
        name = "two ranks, resumed after step 20"
        results[name] = {"figures": events(run), "weights": digest(run, 30)}
        print(f"{name}: {results[name]['figures'][-1]}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="an earlier file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make = ["data", "make-mini", "--output_dir", str(data)]
        subprocess.run([sys.executable, "-m", "bert_pretraining", *make], check=True)
        results = measure(data)
    record.write(flags.output, {"cases": results})
    if flags.compare is None:
        return 0
    earlier = json.loads(flags.compare.read_text())["cases"]
    differing = [name for name in earlier if earlier[name] != results.get(name)]
    print(f"{len(earlier) - len(differing)} of {len(earlier)} cases equal to the last bit")
    for name in differing:
        print(f"differs: {name}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
