"""Measure the time to the target on the mini data set with several seeds.

    PYTHONPATH=base python benchmarks/mini_seeds.py --seeds 5 --output results/DATE_mini

This runs the launcher once for each seed, one run after the other, and writes a JSON file and a
table.
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


def one_run(data_dir: Path, config: str, seed: int, output_dir: Path) -> dict[str, float]:
    """One run's FINISHED figures, and its steps."""
    command = [
        sys.executable, "-m", "bert_pretraining", "launch", "--name", "mini", "--config", config,
        "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--seed", str(seed),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT / "base")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    events = {}
    for line in done.stdout.splitlines():
        if line.startswith("[PerfLog] "):
            event = json.loads(line.removeprefix("[PerfLog] "))
            events[event["event"]] = event["value"]
    return {
        "seed": seed,
        "steps": events["STEP_END"]["global_steps"],
        "start_accuracy": events["INIT_EVALUATION"]["eval_mlm_accuracy"],
        **events["FINISHED"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="CPUx1x2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "bert_mini"
        subprocess.run(
            [
                *(sys.executable, "-m", "bert_pretraining", "data", "make-mini"),
                *("--output_dir", str(data_dir)),
            ],
            env={**os.environ, "PYTHONPATH": str(record.ROOT / "base")},
            check=True,
        )  # fmt: skip
        runs = []
        for seed in range(1, arguments.seeds + 1):
            runs.append(one_run(data_dir, arguments.config, seed, Path(folder) / "output"))
            print(runs[-1], flush=True)
    keys = ("steps", "e2e_time", "raw_train_time", "final_mlm_accuracy",
            "training_sequences_per_second")  # fmt: skip
    summary = {key: record.spread([run[key] for run in runs]) for key in keys}
    name = f"mini_seeds_{arguments.config}.json"
    record.write(
        arguments.output / name, {"config": arguments.config, "summary": summary, "runs": runs}
    )
    print("| seed | steps | E2E | MLM accuracy | sequences/s | converged |")
    print("|---|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run['seed']} | {run['steps']} | {run['e2e_time']:.1f} s "
            f"| {run['final_mlm_accuracy']:.3f} | {run['training_sequences_per_second']:.0f} "
            f"| {run['converged']} |"
        )


if __name__ == "__main__":
    main()
