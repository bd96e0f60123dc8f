"""A submission like the published ones: ten runs derived from one real log."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from helpers import REFERENCE

REAL_LOG = REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt"
REAL_SYSTEM = REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_system.json"
TOKEN = ":::MLLOG "
SYSTEM = "1xH200"
# Evaluations to the target in each run: the real log's 16, one fewer, one more.
EVALUATIONS = (16, 16, 17, 15, 16, 17, 16, 16, 15, 16)
GAP_MS = 90_000  # between runs


def real_events() -> list[dict]:
    """The real log's records, in order."""
    lines = REAL_LOG.read_text(encoding="utf-8").splitlines()
    return [json.loads(line.partition(TOKEN)[2]) for line in lines if TOKEN in line]


def write_events(path: Path, events: list[dict]) -> None:
    path.write_text("".join(f"{TOKEN}{json.dumps(event)}\n" for event in events))


def read_events(path: Path) -> list[dict]:
    return [json.loads(line[len(TOKEN) :]) for line in path.read_text().splitlines()]


def line_of(path: Path, key: str, which: int = 0) -> int:
    """The line, from 1, of a key's first (or which-th) record."""
    lines = path.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if f'"key": "{key}"' in line]
    return found[which]


def vary(events: list[dict], run: int) -> list[dict]:
    """Another run of the same submission: its own seed, clock, samples and accuracies."""
    noise = random.Random(run)
    events = [json.loads(json.dumps(event)) for event in events]
    marks = [index for index, event in enumerate(events) if event["key"] == "eval_start"]
    block_stop = next(i for i, event in enumerate(events) if event["key"] == "block_stop")
    length = events[marks[-1]]["time_ms"] - events[marks[-2]]["time_ms"]
    if EVALUATIONS[run] == 15:
        del events[marks[-1] : block_stop]
    elif EVALUATIONS[run] == 17:
        again = json.loads(json.dumps(events[marks[-1] : block_stop]))
        for event in again:
            event["time_ms"] += length
            if "epoch_num" in event["metadata"]:
                event["metadata"]["epoch_num"] += 150_000
        events[block_stop:block_stop] = again
    duration = events[-1]["time_ms"] - events[0]["time_ms"]
    delay = length * (EVALUATIONS[run] - 16)
    after = next(i for i, event in enumerate(events) if event["key"] == "block_stop")
    for index, event in enumerate(events):
        event["time_ms"] += run * (duration + 2 * length + GAP_MS)
        event["time_ms"] += delay if index >= after else 0
    return _new_figures(events, noise)


def _new_figures(events: list[dict], noise: random.Random) -> list[dict]:
    shift = {}
    accuracies = [event for event in events if event["key"] == "eval_accuracy"]
    for event in accuracies:
        samples = event["metadata"]["epoch_num"]
        shift[samples] = samples + noise.randint(-200, 200)
        event["value"] = min(event["value"], 0.7199) - noise.random() * 1e-4
    accuracies[-1]["value"] = 0.72 + noise.random() * 1e-3
    for event in events:
        samples = event["metadata"].get("epoch_num")
        if samples in shift:
            event["metadata"]["epoch_num"] = shift[samples]
        if event["key"] == "seed":
            event["value"] = noise.randrange(2**31)
        if event["key"] == "train_samples":
            event["value"] = accuracies[-1]["metadata"]["epoch_num"]
    return events


def make_submission(folder: Path, organization: str = "NVIDIA", whole: bool = True) -> Path:
    """folder/ORG: ten runs of one system, its description, and its code.

    whole: with the 398 lines of weights_initialization, which only old rulesets need.
    """
    root = folder / organization
    results = root / "results" / SYSTEM / "bert"
    code = root / "benchmarks" / "bert" / "implementations" / "pytorch"
    for directory in (results, code, root / "systems"):
        directory.mkdir(parents=True)
    shutil.copyfile(REAL_SYSTEM, root / "systems" / f"{SYSTEM}.json")
    events = real_events()
    if not whole:
        events = [event for event in events if event["key"] != "weights_initialization"]
    for run in range(10):
        write_events(results / f"result_{run}.txt", vary(events, run))
    for name in ("README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh"):
        (code / name).write_text("text\n")
    return root
