"""Train the mini data set to its target with each optimizer that runs here, and compare losses.

    PYTHONPATH=base python benchmarks/optimizer_curves.py --output results/DATE_optimizer

Each optimizer has one run with the same seed on two ranks. This prints how far each loss is from
that of the reference optimizer, early and over the whole run, and draws the curves with `report`.
Rounding differs between implementations, and training amplifies the differences.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bert_pretraining.bench import record

RUNS = {
    "reference": ("--optimizer", "reference"),
    "foreach": ("--optimizer", "foreach"),
    "flat": ("--optimizer", "flat"),
    "flat, distributed_lamb": ("--optimizer", "flat", "--distributed_lamb"),
}
EARLY = 100  # steps


def module(*words: object) -> list[str]:
    return [sys.executable, "-m", "bert_pretraining", *(str(word) for word in words)]


def losses_of(perflog: Path) -> dict[int, float]:
    found = {}
    for line in perflog.read_text().splitlines():
        event = json.loads(line.removeprefix("[PerfLog] "))
        if event["event"] == "STEP_END":
            found[event["value"]["global_steps"]] = event["value"]["loss"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(record.ROOT / "base")
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(name) / "bert_mini"
        subprocess.run(module("data", "make-mini", "--output_dir", data_dir), check=True)
        folders, curves = [], {}
        for run, chosen in RUNS.items():
            output_dir = Path(name) / run
            done = subprocess.run(
                module("launch", "--name", "mini", "--config", "CPUx1x2", "--device", "cpu",
                       "--data_dir", data_dir, "--output_dir", output_dir, "--seed", flags.seed,
                       "--log_freq", 1, *chosen),
                stdout=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            if done.returncode not in (0, 3):
                raise SystemExit(f"{run}: exit code {done.returncode}")
            (folder,) = output_dir.glob("run-*")
            curves[run] = losses_of(folder / "perflog.txt")
            named = Path(name) / "runs" / run.replace(", ", "-")
            named.parent.mkdir(exist_ok=True)
            folders.append(folder.rename(named))
        report = module("report", *folders, "--output_dir", Path(name) / "report",
                        "--title", "Optimizers")  # fmt: skip
        subprocess.run(report, check=True)
        flags.output.mkdir(parents=True, exist_ok=True)
        for picture in ("accuracy.png", "loss.png"):
            (Path(name) / "report" / picture).rename(flags.output / f"curves_{picture}")
    summary = {}
    for run, curve in curves.items():
        apart = {
            step: abs(loss / curves["reference"][step] - 1.0)
            for step, loss in curve.items()
            if step in curves["reference"]
        }
        early = max(value for step, value in apart.items() if step <= EARLY)
        summary[run] = {
            "steps": max(curve),
            f"largest relative difference to step {EARLY}": early,
            "largest relative difference": max(apart.values()),
        }
        print(run, summary[run])
    record.write(flags.output / "curves.json", {"seed": flags.seed, "runs": summary})


if __name__ == "__main__":
    main()
