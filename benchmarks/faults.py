"""Inject faults into real runs on this machine, and record what users see.

    PYTHONPATH=base python benchmarks/faults.py --output results/DATE_faults

Each scene states what the documentation promises, and stops the program where a run ends with
another exit code. The mini data set, on the CPU over gloo; --scenes runs some of them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bert_pretraining.bench import record
from bert_pretraining.launch.port import free_port

sys.path.insert(0, str(record.ROOT / "tests"))
from faulty_runs import SlowStore, faulty, launch, signal_group, slow_writes
from hosts import Launcher, end

RUN = (
    "--seed 7 --log_freq 1 --eval_steps 100000 --num_eval_examples 64 --target_mlm_accuracy 1 "
    "--machine_lines on"
).split()
TELLING = (
    "Error", "Notice: rank", "Notice: writing", "Notice: the launcher", "Notice: not bit",
    "Restart", "Resumed",
)  # fmt: skip
RANKS = 8
FOR_EVER = 100_000
Row = dict[str, object]


class Stage:
    """A folder with the data set and the runs; flags of a run."""

    def __init__(self, folder: Path, data: Path | None) -> None:
        self.folder = folder
        self.data = data or folder / "bert_mini"
        if data is not None:
            return
        words = ["data", "make-mini", "--output_dir", str(self.data)]
        subprocess.run([sys.executable, "-m", "bert_pretraining", *words], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip

    def start(self, name: str, *flags: object, ranks: int = RANKS, **environment: str) -> Launcher:
        """A run on one machine, called `name`."""
        shape = ["--nproc_per_node", ranks, "--train_batch_size", 8]
        return launch(self.folder, name, *RUN, *shape, "--data_dir", self.data, "--output_dir",
                      self.folder / f"run_{name}", *flags, **environment)  # fmt: skip

    def machines(
        self, name: str, count: int, *flags: object, ports: dict[int, int] | None = None
    ) -> list[Launcher]:
        """A run on `count` machines of one rank each. ports: of machines with one of their own."""
        port = free_port(0) if ports is None or 0 not in ports else ports[0]
        return [
            launch(
                self.folder, f"{name}_machine{node}", *RUN, "--nproc_per_node", 1, "--nnodes",
                count, "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port",
                (ports or {}).get(node, port), "--train_batch_size", 8, "--data_dir", self.data,
                "--output_dir", self.folder / f"run_{name}", *flags,
            )
            for node in range(count)
        ]  # fmt: skip


def row(
    promised: str,
    launchers: list[Launcher],
    codes: list[int],
    since: float,
    or_codes: list[int] | None = None,
) -> Row:
    """What became of a run, once it has ended with these codes."""
    found = end(launchers, 200)
    if found not in (codes, or_codes):
        errors = "\n".join(each.errors[-3000:] + each.output[-1500:] for each in launchers)
        raise SystemExit(f"expected the exit codes {codes}, found {found}\n{errors}")
    return {
        "documented": promised,
        "exit_codes": found,
        "seconds": round(time.monotonic() - since, 1),
        "lines": [line for each in launchers for line in told(each)],
    }


def told(launcher: Launcher) -> list[str]:
    """The lines of a run that tell of a fault."""
    found = [
        line
        for line in (launcher.output + launcher.errors).splitlines()
        if line.startswith(
            ("Notice: rank", "Notice: writing", "Notice: the launcher", "Error", "Notice: not bit")
        )
    ]
    return list(dict.fromkeys(found))


def step_ends(launcher: Launcher) -> list[dict]:
    """The values of a run's STEP_END events."""
    lines = re.findall(r"^\[PerfLog\] (.*)$", launcher.output, flags=re.MULTILINE)
    events = map(json.loads, lines)
    return [event["value"] for event in events if event["event"] == "STEP_END"]


def after_step(launcher: Launcher, step: int) -> None:
    launcher.wait_for(f'"global_steps": {step},')


def rank_pid(launcher: Launcher, rank: int) -> int:
    for pid in launcher.trainers():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise SystemExit(f"no rank {rank}")


def held(pids: list[int], seconds: float) -> float:
    """Stop processes for so long; returns when they went on."""
    signal_group(pids, signal.SIGSTOP)
    time.sleep(seconds)
    signal_group(pids, signal.SIGCONT)
    return time.monotonic()


# ---- a rank


def slow_by_work(stage: Stage) -> Row:
    """Rank 5 of 8 computes 20% longer."""
    path = faulty(stage.folder / "slow", [5], "work(0.2 * seconds)")
    since = time.monotonic()
    run = stage.start(
        "slow", "--train_batch_size", 32, "--max_steps", 125, PYTHONPATH=path_of(path)
    )
    return row("goes on; rank 5 is named after 20 logged steps or more", [run], [3], since)


def slow_by_data(stage: Stage) -> Row:
    """Rank 5 of 8 waits 0.4 s for each batch."""
    path = faulty(stage.folder / "slow_data", [5], read="time.sleep(0.4)")
    since = time.monotonic()
    run = stage.start("slow_data", "--max_steps", 40, PYTHONPATH=path_of(path))
    return row("goes on; rank 5 is named after 20 logged steps or more", [run], [3], since)


def paused(stage: Stage) -> Row:
    """Rank 2 stopped for 5 s; rank 5 keeps the interpreter lock for 5 s; rank 3 waits 6 s for a
    batch; the launcher stopped for 5 s."""
    path = faulty(
        stage.folder / "pauses",
        [3, 5],
        "hold_the_lock(5) if rank == 5 and made == 30 else None",
        "time.sleep(6) if rank == 3 and made == 40 else None",
    )
    since = time.monotonic()
    run = stage.start("paused", "--max_steps", 60, PYTHONPATH=path_of(path))
    after_step(run, 10)
    held([rank_pid(run, 2)], 5)
    after_step(run, 50)
    held([run.process.pid], 5)
    return row("goes on; each rank is named with its seconds", [run], [3], since)


def stopped_for_long(stage: Stage) -> Row:
    """Rank 2 stopped, with --hang_timeout 6."""
    run = stage.start("stopped", "--max_steps", FOR_EVER, "--hang_timeout", 6)
    after_step(run, 5)
    os.kill(rank_pid(run, 2), signal.SIGSTOP)
    since = time.monotonic()
    return row("ends with 1 after --hang_timeout; rank 2 is named", [run], [1], since)


def lock_held_for_long(stage: Stage) -> Row:
    """Rank 5 keeps the interpreter lock for 300 s, with --hang_timeout 6."""
    path = faulty(stage.folder / "lock", [5], "hold_the_lock(300) if made == 5 else None")
    run = stage.start(
        "lock", "--max_steps", FOR_EVER, "--hang_timeout", 6, PYTHONPATH=path_of(path)
    )
    after_step(run, 4)
    since = time.monotonic()
    return row("ends with 1 after --hang_timeout; rank 5 is named", [run], [1], since)


# ---- two machines


def late_store(stage: Stage) -> Row:
    """The store answers machine 1 by 0.2 s or 2 s late, or not for 5 s, or not any more."""
    scene: Row = {}
    for delay in (0.2, 2.0):
        since = time.monotonic()
        launchers, store = behind_a_store(stage, f"late{delay}", delay, "--max_steps", 20)
        # A round of the launchers has several answers; if it takes 20 s, that is silence.
        promised = "meets, goes on; or ends with 1 after 20 s of silence"
        scene[f"{delay:g} s late"] = row(promised, launchers, [3, 3], since, or_codes=[1, 1])
        store.close()
    launchers, store = behind_a_store(stage, "late5", 0.0, "--max_steps", 400)
    after_step(launchers[0], 10)
    store.stop_for(5)
    since = time.monotonic()
    scene["no answer for 5 s"] = row("goes on", launchers, [3, 3], since)
    launchers, store = behind_a_store(stage, "lost", 0.0, "--max_steps", FOR_EVER)
    after_step(launchers[0], 10)
    store.stop_for(3600)
    since = time.monotonic()
    promised = "ends with 1 after 20 s of silence; within 30 s"
    scene["no answer any more"] = row(promised, launchers, [1, 1], since)
    return scene


def behind_a_store(
    stage: Stage, name: str, delay: float, *flags: object
) -> tuple[list[Launcher], SlowStore]:
    """Two machines; the second one has a slow way to the first."""
    port = free_port(0)
    store = SlowStore(port, delay)
    return stage.machines(name, 2, *flags, ports={0: port, 1: store.port}), store


def launcher_stopped(stage: Stage) -> Row:
    """The launchers of two machines stopped for 5 s, one after the other; one for 30 s."""
    scene: Row = {}
    run = stage.machines("short", 2, "--max_steps", 400)
    after_step(run[0], 10)
    since = time.monotonic()
    for launcher in run:
        held([launcher.process.pid], 5)
    scene["each for 5 s"] = row("goes on", run, [3, 3], since)
    for node in (0, 1):
        run = stage.machines(f"long{node}", 2, "--max_steps", FOR_EVER)
        after_step(run[0], 10)
        since = time.monotonic()
        held([run[node].process.pid], 30)
        promised = "ends with 1 after 20 s of silence"
        scene[f"of machine {node}, 30 s"] = row(promised, run, [1, 1], since)
    return scene


# ---- disks


def slow_log(stage: Stage) -> Row:
    """Each write to the run's log files takes 0.2 s longer; the reader of stdout stops for 5 s."""
    scene: Row = {}
    environments = {
        "as it is": {},
        "0.2 s a write": slow_writes(stage.folder, "/run-", 200),
    }
    for name, environment in environments.items():
        for log_freq in (1, 10) if environment else (1,):
            since, called = time.monotonic(), f"log{len(scene)}"
            flags = ["--max_steps", 40, "--log_freq", log_freq, "--machine_lines", "on"]
            run = stage.start(called, *flags, ranks=2, **environment)
            found = row("goes on; tells that the logs are slow", [run], [3], since)
            steps = step_ends(run)[2:]
            other = [values["seconds_other"] for values in steps]
            found["seconds_other_of_a_step"] = record.spread(other) if other else None
            scene[f"{name}, --log_freq {log_freq}"] = found
    scene["reader of stdout stops for 5 s"] = slow_reader(stage)
    return scene


def slow_reader(stage: Stage) -> Row:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    lines: list[str] = []

    def read() -> None:
        with open(reading) as pipe:
            for line in pipe:
                lines.append(line)
                if '"global_steps": 20,' in line:
                    time.sleep(5)

    thread = threading.Thread(target=read)
    thread.start()
    words = [sys.executable, "-m", "bert_pretraining", "launch", "--name", "mini", "--config",
             "CPUx1x2", "--device", "cpu", "--bind", "none", *RUN, "--max_steps", "40",
             "--train_batch_size", "8", "--data_dir", str(stage.data), "--output_dir",
             str(stage.folder / "run_reader")]  # fmt: skip
    since = time.monotonic()
    path = {"PYTHONPATH": str(record.ROOT / "base"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, stdout=writing, env={**os.environ, **path}, check=False)
    os.close(writing)
    thread.join()
    return {
        "documented": "goes on; tells that stdout is slow",
        "exit_codes": [done.returncode],
        "seconds": round(time.monotonic() - since, 1),
        "lines": [line.rstrip() for line in lines if line.startswith("Notice: writing")],
    }


def slow_checkpoint(stage: Stage) -> Row:
    """Each write to a checkpoint takes 0.05 s longer: training goes on meanwhile."""
    since = time.monotonic()
    flags = ["--max_steps", 60, "--save_checkpoint", "--num_samples_per_checkpoint", 160,
             "--min_samples_to_start_checkpoints", 0]  # fmt: skip
    slow = slow_writes(stage.folder, "model.ckpt", 50)
    run = stage.start("checkpoint", *flags, ranks=2, **slow)
    found = row("goes on, training meanwhile", [run], [3], since)
    found["steps_logged"] = len(step_ends(run))
    found["seconds_other_of_a_step"] = record.spread(
        [values["seconds_other"] for values in step_ends(run)[2:]]
    )
    return found


# ---- fewer machines

SAVES = ("--save_checkpoint --resume auto --num_samples_per_checkpoint 96 "
         "--min_samples_to_start_checkpoints 0").split()  # fmt: skip


def fewer_machines(stage: Stage) -> Row:
    """4 machines, then 3, then 4 again; each time the next samples follow."""
    scene: Row = {}
    for part, (count, step) in enumerate(((4, 12), (3, 24), (4, 36))):
        since = time.monotonic()
        run = stage.machines("fewer", count, "--max_steps", FOR_EVER, *SAVES)
        after_step(run[0], step)
        run[0].process.terminate()
        found = row("stops with 4, and resumes where it was", run, [4] * count, since)
        found["resumed"] = resumed(run[0])
        found["samples_at_end"] = step_ends(run[0])[-1]["num_trained_samples"]
        found["samples_at_first_step"] = step_ends(run[0])[0]["num_trained_samples"]
        scene[f"part {part + 1}: {count} machines"] = found
    return scene


def resumed(launcher: Launcher) -> dict | None:
    """The value of RESUMED, without its path."""
    found = re.search(r'^\[PerfLog\] (.*"RESUMED".*)$', launcher.output, flags=re.MULTILINE)
    value = json.loads(found[1])["value"] if found else None
    return value and {name: value[name] for name in ("num_trained_samples", "differences")}


def machine_lost(stage: Stage) -> Row:
    """Machine 3 of 4 killed, with --max_restarts 1; then 3 machines by hand."""
    flags = ["--max_steps", FOR_EVER, *SAVES]
    run = stage.machines("lost4", 4, *flags, "--max_restarts", 1, "--rendezvous_timeout", 12)
    after_step(run[0], 12)
    since = time.monotonic()
    signal_group([*run[3].trainers(), run[3].process.pid], signal.SIGKILL)
    promised = "the others restart, and end with 1 after --rendezvous_timeout; machine 3 is named"
    scene: Row = {"killed": row(promised, run, [1, 1, 1, -9], since)}
    since = time.monotonic()
    again = stage.machines("lost4", 3, *flags)
    after_step(again[0], 24)
    again[0].process.terminate()
    scene["3 by hand"] = row("resumes from the last checkpoint", again, [4] * 3, since)
    scene["3 by hand"]["resumed"] = resumed(again[0])
    return scene


def path_of(folder: str) -> str:
    return f"{folder}:{record.ROOT / 'base'}"


SCENES: list[Callable[[Stage], Row]] = [
    slow_by_work, slow_by_data, paused, stopped_for_long, lock_held_for_long, late_store,
    launcher_stopped, slow_log, slow_checkpoint, fewer_machines, machine_lost,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--data_dir", type=Path, help="a mini data set; by default one is made")
    names = [scene.__name__ for scene in SCENES]
    parser.add_argument("--scenes", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), arguments.data_dir)
        for scene in SCENES:
            if scene.__name__ in arguments.scenes:
                found = json.loads(json.dumps(scene(stage)).replace(folder, "DIR"))
                print(scene.__name__, json.dumps(found, indent=1), flush=True)
                if arguments.output:
                    figures = {"what": " ".join((scene.__doc__ or "").split()), "found": found}
                    record.write(arguments.output / f"{scene.__name__}.json", figures)


if __name__ == "__main__":
    main()
