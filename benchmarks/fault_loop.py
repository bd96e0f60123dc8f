"""Kill runs at random moments and resume them: do they end as if nothing had happened?

    PYTHONPATH=base python benchmarks/fault_loop.py --trials 20 \\
        --output results/DATE_faults/fault_loop.json

One run on the mini data set is left alone. Each trial starts the same run. Twice, it kills one
rank or all processes with SIGKILL after a random time (before the first step, during a step, an
evaluation or a save) and resumes with --resume auto. Then it lets the run finish, and compares the
last checkpoint bit for bit: weights, moments, counters, random generators.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bert_pretraining.bench import record

STEPS = 120
KILLS = 2
RUN = (
    "--name mini --config CPUx1x2 --device cpu --seed 7 --log_freq 1 --eval_steps 10 --resume auto "
    f"--max_steps {STEPS} --train_batch_size 8 --save_checkpoint --num_samples_per_checkpoint 80 "
    "--min_samples_to_start_checkpoints 0 --keep_n_most_recent_checkpoints 3"
)  # fmt: skip


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "bert_pretraining", *(str(word) for word in words)]


def below(pid: int) -> list[int]:
    """The children of a process and their children, the deepest first."""
    children = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(entry.name))
    return [one for child in children for one in [*below(child), child]]


def ranks_of(pid: int) -> list[int]:
    found = []
    for process in below(pid):
        with contextlib.suppress(OSError):
            if b"LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes():
                found.append(process)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def launch(data_dir: Path, output_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    words = command("launch", *RUN.split(), "--data_dir", data_dir, "--output_dir", output_dir)
    with open(log, "wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)


def doing(log: str) -> str:
    """What a run was doing when it was killed, as its last lines tell."""
    events = re.findall(r'"event": "(\w+)"|(Checkpoint): |"key": "(eval_start)"', log)
    return "".join(events[-1]) if events else "starting"


def last_checkpoint(output_dir: Path) -> Path:
    return max(output_dir.glob(f"run-*/model.ckpt-{STEPS}.pt"))


def trial(number: int, data_dir: Path, folder: Path, seconds: float, reference: Path) -> dict:
    """Kill, resume, kill, resume, finish, compare."""
    output_dir, moments = folder / f"trial{number}", []
    for kill_number in range(KILLS):
        log = folder / f"trial{number}-{kill_number}.log"
        process = launch(data_dir, output_dir, log)
        after = random.uniform(0.5, seconds)
        time.sleep(after)
        which = random.choice(["one rank", "all"])
        ranks = ranks_of(process.pid)
        if which == "one rank" and ranks:
            kill([random.choice(ranks)])
        else:
            which = "all"
            kill([*below(process.pid), process.pid])
        left = time.monotonic()
        exit_code = process.wait(timeout=60)
        ending = round(time.monotonic() - left, 2)
        moments.append(
            {"after": round(after, 2), "killed": which, "exit_code": exit_code,
             "last_event": doing(log.read_text()), "seconds_to_end": ending}
        )  # fmt: skip
    process = launch(data_dir, output_dir, folder / f"trial{number}-last.log")
    exit_code = process.wait(timeout=600)
    if exit_code != 3:
        raise SystemExit((folder / f"trial{number}-last.log").read_text())
    different = subprocess.run(
        command("checkpoint", "diff", reference, last_checkpoint(output_dir), "--training_state"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"kills": moments, "equal": different.returncode == 0, "diff": different.stdout[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    random.seed(flags.seed)
    os.environ["PYTHONPATH"] = str(record.ROOT / "base")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = folder / "bert_mini"
        subprocess.run(command("data", "make-mini", "--output_dir", data_dir), check=True)
        started = time.monotonic()
        launch(data_dir, folder / "whole", folder / "whole.log").wait(timeout=600)
        seconds = time.monotonic() - started
        reference = last_checkpoint(folder / "whole")
        trials = []
        for number in range(flags.trials):
            trials.append(trial(number, data_dir, folder, seconds, reference))
            print(trials[-1], flush=True)
    equal = sum(one["equal"] for one in trials)
    print(f"{equal} of {len(trials)} runs ended equal to the undisturbed one")
    if flags.output:
        record.write(
            flags.output,
            {"command": RUN, "undisturbed_seconds": seconds, "equal": equal, "trials": trials},
        )
    if equal < len(trials):
        sys.exit(1)


if __name__ == "__main__":
    main()
