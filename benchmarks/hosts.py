"""Train over separate hosts (network namespaces on this machine), and cause failures.

    sudo PYTHONPATH=base python benchmarks/hosts.py --output results/DATE_hosts

Each scene records the exit codes of all hosts, the seconds until all have ended, the last lines
and the processes that are left, and compares them with what they must be. It needs root and
iproute2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bert_pretraining.bench import record

sys.path.insert(0, str(record.ROOT / "tests"))
from hosts import Hosts, Launcher, end, kill, obstacle

STEPS = 300
RUN = (
    f"--seed 7 --log_freq 1 --eval_steps 100 --max_steps {STEPS} --train_batch_size 8 --bind none "
    "--target_mlm_accuracy 1 --resume auto --save_checkpoint --num_samples_per_checkpoint 320 "
    "--min_samples_to_start_checkpoints 0 --keep_n_most_recent_checkpoints 3"
).split()
MIDDLE = '"global_steps": 60,'
Scene = dict[str, object]


class Stage:
    """A folder with the data set and the runs of the hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "bert_mini"
        command("data", "make-mini", "--output_dir", self.data)

    def flags(self, output: str, *more: object) -> list[object]:
        return [*RUN, "--data_dir", self.data, "--output_dir", self.folder / output, *more]

    def last_checkpoint(self, output: str) -> Path:
        return max((self.folder / output).glob(f"run-*/model.ckpt-{STEPS}.pt"))

    def equal(self, one: str, other: str) -> bool:
        """Whether two runs ended with the same checkpoint, moments and counters included."""
        pair = self.last_checkpoint(one), self.last_checkpoint(other)
        return command("checkpoint", "diff", *pair, "--training_state", check=False) == 0


def command(*words: object, check: bool = True) -> int:
    line = [sys.executable, "-m", "bert_pretraining", *map(str, words)]
    return subprocess.run(line, stdout=subprocess.DEVNULL, check=check).returncode


def ending(hosts: Hosts, launchers: list[Launcher], codes: list[int], since: float) -> Scene:
    """How the launchers ended. Exits unless the exit codes are `codes` and no process is left."""
    found = end(launchers)
    seconds = round(time.monotonic() - since, 1)
    scene = {
        "exit_codes": found,
        "seconds_to_end": seconds,
        "left_behind": len(hosts.processes()),
        "last_lines": [launcher.last_line for launcher in launchers],
    }
    if found != codes or scene["left_behind"]:
        errors = "\n".join(launcher.errors for launcher in launchers)
        raise SystemExit(f"expected the exit codes {codes}: {scene}\n{errors}")
    return scene


def same_weights(stage: Stage) -> Scene:
    """Train on one host, and on two and three with as many ranks: the checkpoints are equal."""
    scene: Scene = {}
    for count in (2, 3):
        with Hosts(1) as one:
            alone = one.launch(0, stage.folder, *stage.flags(f"one{count}"), "--nproc_per_node",
                               count)  # fmt: skip
            ending(one, [alone], [3], time.monotonic())
        with Hosts(count) as several:
            began = time.monotonic()
            launchers = several.launch_all(stage.folder, *stage.flags(f"whole{count}"))
            scene[f"{count} hosts"] = {
                **ending(several, launchers, [3] * count, began),
                "equal_to_one_host": stage.equal(f"one{count}", f"whole{count}"),
                "logs_elsewhere": sum("[PerfLog]" in each.output for each in launchers[1:]),
            }
    return scene


def target_met(stage: Stage) -> Scene:
    with Hosts(2) as hosts:
        flags = stage.flags("target", "--target_mlm_accuracy", 0.33)
        return ending(hosts, hosts.launch_all(stage.folder, *flags), [0, 0], time.monotonic())


def output_that_cannot_be_written(stage: Stage) -> Scene:
    with Hosts(2) as hosts:
        (stage.folder / "file").touch()
        launchers = hosts.launch_all(stage.folder, *stage.flags("file/output"))
        return ending(hosts, launchers, [2, 2], time.monotonic())


def data_missing_on_one(stage: Stage) -> Scene:
    with Hosts(2) as hosts:
        other = hosts.launch(1, stage.folder, *stage.flags("data", "--data_dir", "nowhere"))
        launchers = [hosts.launch(0, stage.folder, *stage.flags("data")), other]
        return ending(hosts, launchers, [2, 2], time.monotonic())


def other_code_on_one(stage: Stage) -> Scene:
    changed = stage.folder / "changed"
    shutil.copytree(record.ROOT / "base", changed / "base")
    shutil.copytree(record.ROOT / "configs", changed / "configs")
    with (changed / "base" / "bert_pretraining" / "training" / "micro_step.py").open("a") as file:
        file.write("# edited\n")
    with Hosts(2) as hosts:
        first = hosts.launch(0, stage.folder, *stage.flags("code"))
        second = hosts.launch(
            1, stage.folder, *stage.flags("code"), PYTHONPATH=str(changed / "base")
        )
        return ending(hosts, [first, second], [2, 2], time.monotonic())


def one_never_comes(stage: Stage) -> Scene:
    scene = {}
    for host in (0, 1):
        with Hosts(2) as hosts:
            flags = stage.flags("absent", "--rendezvous_timeout", 12)
            launcher = hosts.launch(host, stage.folder, *flags)
            scene[f"only host {host}"] = ending(hosts, [launcher], [1], time.monotonic())
    return scene


def interface_that_leads_nowhere(stage: Stage) -> Scene:
    with Hosts(2) as hosts:
        launchers = hosts.launch_all(
            stage.folder, *stage.flags("interface"), GLOO_SOCKET_IFNAME="lo"
        )
        return ending(hosts, launchers, [1, 1], time.monotonic())


def rank_killed(stage: Stage) -> Scene:
    scene = {}
    for host in (0, 1):
        with Hosts(2) as hosts:
            launchers = hosts.launch_all(stage.folder, *stage.flags(f"killed{host}"))
            launchers[0].wait_for(MIDDLE)
            kill(launchers[host].trainers()[0])
            scene[f"on host {host}"] = ending(hosts, launchers, [1, 1], time.monotonic())
    return scene


def launcher_killed(stage: Stage) -> Scene:
    scene = {}
    for host in (0, 1):
        with Hosts(2) as hosts:
            launchers = hosts.launch_all(stage.folder, *stage.flags(f"launcher{host}"))
            launchers[0].wait_for(MIDDLE)
            kill(launchers[host].process.pid)
            codes = [-9 if which == host else 1 for which in (0, 1)]
            scene[f"on host {host}"] = ending(hosts, launchers, codes, time.monotonic())
    return scene


def link_cut(stage: Stage) -> Scene:
    """Cut a link during training, repair it, and resume with the same command."""
    with Hosts(2) as hosts:
        launchers = hosts.launch_all(stage.folder, *stage.flags("cut"))
        launchers[0].wait_for(MIDDLE)
        hosts.cut(1)
        scene = ending(hosts, launchers, [1, 1], time.monotonic())
        hosts.fix(1)
        again = hosts.launch_all(stage.folder, *stage.flags("cut"))
        resumed = ending(hosts, again, [3, 3], time.monotonic())
    return {**scene, "resumed": resumed, "equal_to_undisturbed": stage.equal("whole2", "cut")}


def link_cut_and_restarts(stage: Stage) -> Scene:
    """Cut a link for 40 s: with --max_restarts, the launchers go on by themselves."""
    with Hosts(2) as hosts:
        launchers = hosts.launch_all(stage.folder, *stage.flags("again", "--max_restarts", 1))
        launchers[0].wait_for(MIDDLE)
        hosts.cut(1)
        cut = time.monotonic()
        time.sleep(40)
        hosts.fix(1)
        scene = ending(hosts, launchers, [3, 3], cut)
    return {**scene, "equal_to_undisturbed": stage.equal("whole2", "again")}


def terminated(stage: Stage) -> Scene:
    """Send SIGTERM to one launcher: all stop and save. Then resume with the same command."""
    scene: Scene = {}
    for host in (0, 1):
        output = f"terminated{host}"
        with Hosts(2) as hosts:
            launchers = hosts.launch_all(stage.folder, *stage.flags(output))
            launchers[0].wait_for(MIDDLE)
            launchers[host].process.terminate()
            stopped = ending(hosts, launchers, [4, 4], time.monotonic())
            again = hosts.launch_all(stage.folder, *stage.flags(output))
            ending(hosts, again, [3, 3], time.monotonic())
        equal = stage.equal("whole2", output)
        scene[f"host {host}"] = {**stopped, "resumed_equal_to_undisturbed": equal}
    return scene


def terminated_while_waiting(stage: Stage) -> Scene:
    with Hosts(3) as hosts:
        launchers = [hosts.launch(host, stage.folder, *stage.flags("early")) for host in (0, 1)]
        time.sleep(15)  # the third host is never started
        launchers[1].process.terminate()
        return ending(hosts, launchers, [143, 143], time.monotonic())


SCENES: list[Callable[[Stage], Scene]] = [
    same_weights, target_met, output_that_cannot_be_written, data_missing_on_one,
    other_code_on_one, one_never_comes, interface_that_leads_nowhere, rank_killed,
    launcher_killed, link_cut, link_cut_and_restarts, terminated, terminated_while_waiting,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    names = [scene.__name__ for scene in SCENES]
    parser.add_argument("--scenes", nargs="+", choices=names, default=names,
                        help="same_weights makes what the others compare with")  # fmt: skip
    arguments = parser.parse_args()
    reason = obstacle()
    if reason:
        raise SystemExit(f"Error: {reason}")
    figures: Scene = {"command": " ".join(RUN)}
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        for scene in SCENES:
            if scene.__name__ in arguments.scenes:
                figures[scene.__name__] = scene(stage)
                print(scene.__name__, figures[scene.__name__], flush=True)
    if arguments.output:
        shown = json.dumps(figures).replace(folder, "DIR")
        record.write(arguments.output / "hosts.json", json.loads(shown))


if __name__ == "__main__":
    main()
