"""Train the mini data set to its target in fp32, bf16 and emulated fp8, with the same seeds.

    PYTHONPATH=base python benchmarks/fp8_curves.py --seeds 3 --output results/DATE

Each run begins with the same weights; a seed decides the order of the samples. This writes
fp8_curves.json, with the steps that each run needed and its losses, and fp8_curves.svg.
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

PRECISIONS = ("fp32", "bf16", "fp8")
COLORS = ("#777777", "#1f77b4", "#d62728")
TARGET = 0.72
EVAL_STEPS = 25  # losses are averaged over as many steps too
LATE = 4  # last averages that all runs of a seed have, over which their losses are compared


def module(*words: object) -> list[str]:
    return [sys.executable, "-m", "bert_pretraining", *(str(word) for word in words)]


def one_run(data_dir: Path, output_dir: Path, precision: str, seed: int, config: str) -> dict:
    """Steps to the target, mean losses of EVAL_STEPS steps by the last of them, accuracies."""
    done = subprocess.run(
        module("launch", "--name", "mini", "--config", config, "--device", "cpu",
               "--data_dir", data_dir, "--output_dir", output_dir, "--seed", seed,
               "--threads", 1, "--log_freq", 1, "--eval_steps", EVAL_STEPS,
               "--precision", precision),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 3):
        raise SystemExit(f"{precision}, seed {seed}: exit code {done.returncode}\n{done.stderr}")
    (folder,) = output_dir.glob("run-*")
    losses, accuracies = {}, {}
    for line in (folder / "perflog.txt").read_text().splitlines():
        event = json.loads(line.removeprefix("[PerfLog] "))
        value = event["value"]
        if event["event"] == "STEP_END":
            losses[value["global_steps"]] = value["loss"]
        elif event["event"] in ("INIT_EVALUATION", "EVALUATION"):
            accuracies[value.get("global_steps", 0)] = value["eval_mlm_accuracy"]
    return {
        "precision": precision,
        "seed": seed,
        "reached": done.returncode == 0,
        "steps": max(losses),
        "losses": averaged(losses),
        "accuracies": accuracies,
    }


def averaged(losses: dict[int, float]) -> dict[int, float]:
    """The means of EVAL_STEPS losses each, by the last step; the steps at the end are left out."""
    return {
        end: round(statistics.fmean(losses[end - back] for back in range(EVAL_STEPS)), 5)
        for end in range(EVAL_STEPS, max(losses) + 1, EVAL_STEPS)
    }


def summary_of(runs: list[dict]) -> dict[str, object]:
    """Steps by precision, and how the late losses differ from those of fp32 with the same seed."""
    by_key = {(run["precision"], run["seed"]): run for run in runs}
    summary: dict[str, object] = {}
    for precision in PRECISIONS:
        mine = [run for run in runs if run["precision"] == precision]
        apart = []
        for run in mine:
            same_seed = [by_key[each, run["seed"]] for each in PRECISIONS]
            late = sorted(set.intersection(*(set(one["losses"]) for one in same_seed)))[-LATE:]
            own, plain = (
                statistics.fmean(one["losses"][step] for step in late)
                for one in (run, same_seed[0])
            )
            apart.append(own / plain - 1.0)
        summary[precision] = {
            "reached": sum(run["reached"] for run in mine),
            "steps": record.spread([run["steps"] for run in mine]),
            "late loss relative to fp32": record.spread(apart),
        }
    return summary


def draw(runs: list[dict], path: Path) -> None:
    """Accuracy and loss over steps: every run thin, medians of the accuracy wide."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fp8"  # the same file for the same figures
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for precision, color in zip(PRECISIONS, COLORS, strict=True):
        mine = [run for run in runs if run["precision"] == precision]
        for run in mine:
            left.plot(*zip(*run["accuracies"].items(), strict=True), color=color, alpha=0.35, lw=1)
            right.plot(*zip(*run["losses"].items(), strict=True), color=color, alpha=0.7, lw=1)
        steps = sorted(set.intersection(*(set(run["accuracies"]) for run in mine)))
        middle = [statistics.median(run["accuracies"][step] for run in mine) for step in steps]
        label = f"{precision}: {len(mine)} runs (thin), median (wide)"
        left.plot(steps, middle, color=color, lw=2.4, label=label)
        right.plot([], [], color=color, label=precision)
    left.axhline(TARGET, color="black", lw=1, ls="--")
    left.set(xlabel="updates", ylabel="MLM accuracy (evaluation)")
    right.set(xlabel="updates", ylabel=f"training loss, mean of {EVAL_STEPS} updates")
    left.legend(loc="lower right")
    right.legend(loc="upper right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", default="CPUx1x1")
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(record.ROOT / "base")
    runs = []
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(name) / "bert_mini"
        subprocess.run(module("data", "make-mini", "--output_dir", data_dir), check=True)
        for seed in range(1, flags.seeds + 1):
            for precision in PRECISIONS:
                folder = Path(name) / f"{precision}-{seed}"
                runs.append(one_run(data_dir, folder, precision, seed, flags.config))
                last = runs[-1]
                print(precision, seed, last["reached"], last["steps"], flush=True)
    summary = summary_of(runs)
    for precision, figures in summary.items():
        print(precision, figures)
    content = {"config": flags.config, "target": TARGET, "summary": summary, "runs": runs}
    record.write(flags.output / "fp8_curves.json", content)
    draw(runs, flags.output / "fp8_curves.svg")


if __name__ == "__main__":
    main()
