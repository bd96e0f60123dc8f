"""Launchers by the hundred on one machine: what their rendezvous costs, and what it takes to end.

    PYTHONPATH=base python benchmarks/launchers.py --output results/DATE_launchers/after.json

Each simulated launcher is a thread with the real `Rendezvous`; several processes share the threads,
so that no interpreter lock bounds them all. The store is the real one, in a process of its own, so
that its CPU time can be read apart. The processes share this machine's cores: with many launchers
these are the bound, not the store alone. For each number of launchers it records

- the seconds until all have met,
- messages and bytes a second at the store while the job runs, and the CPU time of the store's
  process and of a launcher for each second,
- the seconds from the silent death of one launcher, and from the report of a failure, until every
  other one knows why it must end; --without_death leaves out the death, which takes 20 s and more,
- the messages of `process_group.wait_for_all_to_finish` a rank, while one rank comes late,
- up to --c10d launchers: seconds and messages until torchrun's dynamic rendezvous has met.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist

from bert_pretraining.bench import record
from bert_pretraining.launch import rendezvous as launching
from bert_pretraining.launch.rendezvous import Rendezvous, RendezvousSettings
from bert_pretraining.launch.result import AttemptResult
from bert_pretraining.runtime import consistency, process_group, process_stat

HOST = "127.0.0.1"
PROCESSES = 4
STEADY = 5.0  # seconds of the running job in which messages are counted
LATE = 2.0  # seconds by which the last rank comes late to the finish
SPAWN = multiprocessing.get_context("spawn")
LOCAL_METHODS = ("set_timeout", "timeout")  # of a store: they send nothing

counted: Counter[str] = Counter()
dead: set[threading.Thread] = set()  # launchers whose connection is cut


class CountingStore:
    """A store that counts its own messages, and the bytes of keys, values and answers."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        method = getattr(self._store, name)
        if name in LOCAL_METHODS:
            return method

        def call(*arguments: object) -> object:
            if threading.current_thread() in dead:
                raise RuntimeError("the connection is cut")
            counted["messages"] += 1
            counted[name] += 1
            answer = method(*arguments)
            counted["bytes"] += size_of(arguments) + size_of(answer)
            return answer

        return call


def size_of(value: object) -> int:
    """Bytes of a message's content; a number takes 8."""
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    return len(value) if isinstance(value, (bytes, str)) else 8


def counting_prefix_store(
    prefix: str, store: dist.Store, make: Callable = dist.PrefixStore
) -> CountingStore:
    return CountingStore(make(prefix, store))


def client_store(
    host: str, port: int, *_: object, make: Callable = dist.TCPStore, **__: object
) -> dist.TCPStore:
    """A client also where the caller would be the server."""
    return make(host, port, None, False, timedelta(seconds=300), wait_for_workers=False)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all its threads."""
    return (process_stat.cpu_ticks(pid) or 0) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(pipe: Connection) -> None:
    """The process of the store: it ends when the benchmark closes the pipe."""
    store = dist.TCPStore(HOST, 0, None, True, timedelta(seconds=300), wait_for_workers=False)
    pipe.send((store.port, os.getpid()))
    with contextlib.suppress(EOFError):
        pipe.recv()


def settings_of_a_run() -> dict[str, object]:
    return {f"setting_of_the_run_{number}": f"value {number}" for number in range(80)}


class Share:
    """The launchers of one process; each public method is a command of the benchmark."""

    def __init__(self, port: int, nodes: list[int], num_nodes: int) -> None:
        self._port, self._nodes, self._num_nodes = port, nodes, num_nodes
        self._launchers: dict[int, Rendezvous] = {}
        self._threads: list[threading.Thread] = []
        self._handlers: list[object] = []

    def meet(self, attempt: int, limit: float) -> float | None:
        """Start the launchers; the time when the last one knows that all are here."""
        described = consistency.describe(settings_of_a_run())
        self._launchers = {
            node: Rendezvous(
                RendezvousSettings(HOST, self._port, node, self._num_nodes, attempt, 300.0),
                described,
            )
            for node in self._nodes
        }
        for launcher in self._launchers.values():
            launcher.start()
        return self._until(lambda launcher: launcher.complete, limit)

    def counts(self) -> tuple[Counter[str], float]:
        """Messages so far, and this process's CPU seconds."""
        return counted.copy(), time.process_time()

    def die(self, node: int) -> None:
        """This launcher stops without a word, if it is here."""
        if node in self._launchers:
            dead.add(self._launchers.pop(node))

    def fail(self, node: int) -> None:
        """This launcher reports a failure, if it is here."""
        if node in self._launchers:
            killed = AttemptResult(1, "rank 9 was killed by SIGKILL")
            self._start(self._launchers.pop(node).conclude, False, killed)

    def know(self, limit: float) -> float | None:
        """The time when the last launcher here knows why it must end."""
        return self._until(lambda launcher: launcher.fault(time.monotonic()) is not None, limit)

    def faults(self) -> set[str]:
        """What the launchers here give as the cause."""
        found = [launcher.fault(time.monotonic()) for launcher in self._launchers.values()]
        return {fault.message for fault in found if fault is not None}

    def close(self) -> None:
        for launcher in self._launchers.values():
            self._start(launcher.close)
        while self._threads:
            self._threads.pop().join()

    def _start(self, what: Callable, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=what, args=arguments))
        self._threads[-1].start()

    def finish(self, late: float) -> tuple[float, float]:
        """All ranks here finish, the first one late: when it came, and when the last one left."""
        os.environ.update(
            RANK="0", WORLD_SIZE=str(self._num_nodes), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=HOST, MASTER_PORT=str(self._port),
        )  # fmt: skip
        ends: list[float] = []
        came = 0.0

        def rank() -> None:
            process_group.wait_for_all_to_finish()
            ends.append(time.monotonic())

        threads = [threading.Thread(target=rank) for _ in self._nodes]
        for thread in threads[1:]:
            thread.start()
        if late:
            time.sleep(late)
            came = time.monotonic()
        threads[0].start()
        for thread in threads:
            thread.join()
        return came, max(ends)

    def meet_c10d(self, limit: float) -> float | None:
        """torchrun's dynamic rendezvous in the same place: when all here have met."""
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
            C10dRendezvousBackend,
        )
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
            DynamicRendezvousHandler,
            RendezvousTimeout,
        )

        met: list[float] = []

        def join() -> None:
            store = client_store(HOST, self._port)
            handler = DynamicRendezvousHandler.from_backend(
                "c10d", store, C10dRendezvousBackend(CountingStore(store), "c10d"),
                self._num_nodes, self._num_nodes, HOST,
                RendezvousTimeout(join=timedelta(seconds=limit)),
            )  # fmt: skip
            self._handlers.append(handler)
            with contextlib.suppress(Exception):  # counts as "has not met"
                handler.next_rendezvous()
                met.append(time.monotonic())

        threads = [threading.Thread(target=join) for _ in self._nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(met) if len(met) == len(self._nodes) else None

    def _until(self, what: Callable[[Rendezvous], bool], limit: float) -> float | None:
        deadline = time.monotonic() + limit
        waiting = list(self._launchers.values())
        while waiting and time.monotonic() < deadline:
            waiting = [launcher for launcher in waiting if not what(launcher)]
            time.sleep(0.02)
        return None if waiting else time.monotonic()


def work(pipe: Connection, port: int, nodes: list[int], num_nodes: int) -> None:
    """A process with some of the launchers: it does what the benchmark says."""
    launching.TCPStore = client_store
    launching.PrefixStore = counting_prefix_store
    dist.PrefixStore = counting_prefix_store
    share = Share(port, nodes, num_nodes)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(share, name)(*arguments))
    os._exit(0)  # threads may block in the store


class Job:
    """The store's process and those of the launchers."""

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self._store, theirs = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(theirs,), daemon=True).start()
        self.port, self.store_pid = self._store.recv()
        self._pipes = []
        processes = min(PROCESSES, num_nodes)
        for number in range(processes):
            ours, theirs = SPAWN.Pipe()
            arguments = (theirs, self.port, list(range(number, num_nodes, processes)), num_nodes)
            SPAWN.Process(target=work, args=arguments, daemon=True).start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def tell(self, name: str, *arguments: object) -> list:
        """Every process does it at once; their answers."""
        return self.tell_each(name, [arguments] * len(self._pipes))

    def tell_each(self, name: str, arguments: list[tuple]) -> list:
        for pipe, own in zip(self._pipes, arguments, strict=True):
            pipe.send((name, own))
        return [pipe.recv() for pipe in self._pipes]

    def counts(self) -> tuple[Counter[str], float, float, float]:
        """Messages, CPU seconds of all launchers and of the store, and the time."""
        answers = self.tell("counts")
        messages: Counter[str] = sum((answer[0] for answer in answers), Counter())
        cpu = sum(answer[1] for answer in answers)
        return messages, cpu, cpu_seconds(self.store_pid), time.monotonic()

    def steady(self, seconds: float) -> dict[str, float]:
        """What the running job costs a second."""
        before = self.counts()
        time.sleep(seconds)
        after = self.counts()
        passed = after[3] - before[3]
        sent = (messages := after[0] - before[0])["messages"]
        return {
            "messages_a_second": round(sent / passed, 1),
            "messages_a_launcher_a_second": round(sent / passed / self.num_nodes, 2),
            "bytes_a_second": round(messages["bytes"] / passed),
            "store_cpu_share": round((after[2] - before[2]) / passed, 4),
            "launcher_cpu_share": round((after[1] - before[1]) / passed / self.num_nodes, 5),
            "store_mib": round(resident_mib(self.store_pid), 1),
        }

    def close(self) -> None:
        for pipe in [*self._pipes, self._store]:
            pipe.close()


def latest(times: list[float | None], since: float) -> float | None:
    """Seconds until the last one; None if one of them never came."""
    known = [at for at in times if at is not None]
    return round(max(known) - since, 2) if len(known) == len(times) else None


def measure(num_nodes: int, limit: float, c10d: int, death: bool) -> dict[str, object]:
    job = Job(num_nodes)
    victim = num_nodes - 1
    figures: dict[str, object] = {"launchers": num_nodes}
    try:
        start, before = time.monotonic(), job.counts()[0]
        figures["seconds_to_meet"] = latest(job.tell("meet", 0, limit), start)
        figures["messages_to_meet"] = (job.counts()[0] - before)["messages"]
        figures |= job.steady(STEADY)
        if death:
            start = time.monotonic()
            job.tell("die", victim)
            figures["seconds_from_silent_death"] = latest(job.tell("know", limit), start)
            figures["verdicts_of_death"] = sorted(set().union(*job.tell("faults")))
            job.tell("close")
            job.tell("meet", 1, limit)
        start = time.monotonic()
        job.tell("fail", victim)
        figures["seconds_from_a_report"] = latest(job.tell("know", limit), start)
        job.tell("close")
        before = job.counts()[0]
        share_late = [(LATE,)] + [(0.0,)] * (min(PROCESSES, num_nodes) - 1)
        answers = job.tell_each("finish", share_late)
        sent = (job.counts()[0] - before)["messages"]
        figures["finish_messages_a_rank"] = round(sent / num_nodes, 1)
        ends = [end for _, end in answers]
        figures["seconds_from_last_rank_to_all_finished"] = latest(ends, answers[0][0])
        if num_nodes <= c10d:
            start, before = time.monotonic(), job.counts()[0]
            figures["c10d_seconds_to_meet"] = latest(job.tell("meet_c10d", limit), start)
            figures["c10d_messages_to_meet"] = (job.counts()[0] - before)["messages"]
    finally:
        job.close()
    return figures


def ask(pipe: Connection, port: int, seconds: float) -> None:
    """Ask the store again and again for the same small key."""
    store = client_store(HOST, port)
    store.set("key", "x" * 200)
    deadline, asked = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        store.get("key")
        asked += 1
    pipe.send(asked)


def capacity(seconds: float = 3.0, askers: int = 4) -> dict[str, float]:
    """The most messages a second that the store answers here, and its CPU time for one."""
    pipe, theirs = SPAWN.Pipe()
    SPAWN.Process(target=serve, args=(theirs,), daemon=True).start()
    port, pid = pipe.recv()
    pipes = [SPAWN.Pipe() for _ in range(askers)]
    for _, answer in pipes:
        SPAWN.Process(target=ask, args=(answer, port, seconds), daemon=True).start()
    before = cpu_seconds(pid)
    asked = sum(ours.recv() for ours, _ in pipes)
    spent = cpu_seconds(pid) - before
    pipe.close()
    return {
        "messages_a_second": round(asked / seconds),
        "store_cpu_microseconds_a_message": round(spent / asked * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--launchers", type=int, nargs="+", default=[2, 16, 64, 256])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to wait for each step")
    parser.add_argument("--c10d", type=int, default=64, help="up to so many launchers (default 64)")
    parser.add_argument("--without_death", action="store_true", help="leave the death out: faster")
    given = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher sets it
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # torch looks up every client
    runs = []
    for num_nodes in given.launchers:
        runs.append(measure(num_nodes, given.limit, given.c10d, not given.without_death))
        print(runs[-1], flush=True)
    for name in [name for name in runs[0] if name != "verdicts_of_death"]:
        print(f"| {name} | " + " | ".join(str(run.get(name)) for run in runs) + " |")
    if given.output is not None:
        record.write(given.output, {"store": capacity(), "runs": runs})


if __name__ == "__main__":
    main()
