"""Kill a random rank at a random moment of a real run, many times: does everything end?

    PYTHONPATH=base python benchmarks/kill_ranks.py --output results/DATE_launch

Each time it records the seconds until the launcher has ended, its exit code, its last line, and
the processes that are left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bert_pretraining.bench import record
from bert_pretraining.preparation.mini import MiniSettings, make_mini


def trainers(launcher: int) -> list[int]:
    """The process ids of the ranks of a launcher."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            command = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"train" in command:
            found.append(int(directory.name))
    return found


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def kill_once(data: Path, ranks: int, latest: float) -> dict[str, object]:
    """Start one run and kill one of its ranks."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/errors", "w+") as errors:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "bert_pretraining", "launch", "--name", "mini", "--config",
             "CPUx1x2", "--device", "cpu", "--nproc_per_node", str(ranks), "--data_dir", str(data),
             "--target_mlm_accuracy", "1", "--max_steps", "100000"],
            stdout=subprocess.DEVNULL, stderr=errors, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(record.ROOT / "base")},
        )  # fmt: skip
        while len(pids := trainers(launcher.pid)) < ranks:
            if launcher.poll() is not None:
                raise SystemExit(f"the launcher ended by itself:\n{Path(errors.name).read_text()}")
            time.sleep(0.05)
        moment = random.uniform(0.0, latest)
        time.sleep(moment)
        victim = random.choice(pids)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        code = launcher.wait(60)
        seconds = time.monotonic() - killed
        errors.seek(0)
        return {
            "killed_after_s": round(moment, 2),
            "ended_after_s": round(seconds, 2),
            "exit_code": code,
            "left_behind": sum(map(exists, pids)),
            "last_line": errors.read().splitlines()[-1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument(
        "--latest",
        type=float,
        default=15.0,
        help="the last moment to kill, in seconds after the ranks start (default: 15)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "bert_mini"
        make_mini(MiniSettings(data))
        runs = []
        for _ in range(arguments.repeats):
            runs.append(kill_once(data, arguments.ranks, arguments.latest))
            print(runs[-1], flush=True)
    good = [run for run in runs if run["exit_code"] == 1 and not run["left_behind"]]
    summary = {
        "runs": len(runs),
        "ended_with_code_1_and_nothing_left": len(good),
        "slowest_end_s": max(run["ended_after_s"] for run in runs),
        "ranks": arguments.ranks,
        "each": runs,
    }
    record.write(arguments.output / "kill_ranks.json", summary)


if __name__ == "__main__":
    main()
