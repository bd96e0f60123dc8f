"""The launchers' rendezvous, as threads with the real store: what it sends, and its verdicts."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from bert_pretraining.errors import EXIT_CRASH, EXIT_USAGE
from bert_pretraining.launch import rendezvous as module
from bert_pretraining.launch.observer import LONGEST_LOOK, LONGEST_SILENCE
from bert_pretraining.launch.rendezvous import (
    SECONDS_TO_EXCHANGE,
    Rendezvous,
    RendezvousSettings,
)
from bert_pretraining.launch.result import AttemptResult
from faulty_runs import SlowStore
from helpers import run_port
from launching import wait_until

HOST = os.uname().nodename
KILLED = AttemptResult(EXIT_CRASH, "rank 9 was killed by SIGKILL")
LOST_A_CONNECTION = AttemptResult(EXIT_CRASH, "rank 0: connection closed", "Traceback\n")


class Clock:
    """In the place of `time` in the rendezvous: its seconds pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time, self.sleep = time.time, time.sleep

    def monotonic(self) -> float:
        return self.now


class CountingStore:
    """Counts the messages of each thread, and raises an error for those that have one."""

    def __init__(
        self,
        store: dist.Store,
        counts: dict[threading.Thread, Counter[str]],
        errors: dict[threading.Thread, type[Exception]],
    ) -> None:
        self._store, self._counts, self._errors = store, counts, errors

    def __getattr__(self, name: str) -> Callable:
        thread = threading.current_thread()
        if thread in self._errors:
            raise self._errors[thread]("injected")
        self._counts.setdefault(thread, Counter())[name] += 1
        return getattr(self._store, name)


class Job:
    """Launchers of one job, each in its thread, by the clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.counts: dict[threading.Thread, Counter[str]] = {}
        self.errors: dict[threading.Thread, type[Exception]] = {}
        self.port = run_port()
        self.launchers: dict[int, Rendezvous] = {}
        self.asked: list[Rendezvous] = []  # those that report a result
        make = module.PrefixStore
        monkeypatch.setattr(
            module,
            "PrefixStore",
            lambda *names: CountingStore(make(*names), self.counts, self.errors),
        )
        monkeypatch.setattr(module, "time", self.clock)
        # No verdict depends on how long a round takes by the test's clock.
        monkeypatch.setattr(module, "HEARTBEAT_INTERVAL", 0.02)
        monkeypatch.setattr(module, "WAIT", 0.01)

    def start(self, num_nodes: int, *nodes: int, port: int = 0, **described: str) -> None:
        for node in nodes or range(num_nodes):
            settings = RendezvousSettings("127.0.0.1", port or self.port, node, num_nodes, 0, 300.0)
            self.launchers[node] = Rendezvous(settings, {"--seed": "1", **described})
            self.launchers[node].start()

    def meet(self, num_nodes: int) -> None:
        self.start(num_nodes)
        self.until(lambda: all(launcher.complete for launcher in self.launchers.values()))

    def until(self, what: Callable[[], bool]) -> None:
        wait_until(what, lambda: f"{[one.awaited() for one in self.launchers.values()]}")

    def rounds(self, launcher: Rendezvous) -> int:
        """How often it has written its heartbeat, or machine 0 the board."""
        return self.counts.get(launcher, Counter())["set"]

    def all_go_on(self, rounds: int = 3) -> None:
        """Until every launcher that has not ended has gone through some more rounds."""
        before = {one: self.rounds(one) for one in [*self.launchers.values(), *self.asked]}
        self.until(
            lambda: all(
                self.rounds(launcher) >= count + rounds or not launcher.is_alive()
                for launcher, count in before.items()
            )
        )

    def pass_time(self, seconds: float, with_store: bool = True) -> None:
        """Seconds pass; at least each 2 s every launcher goes through its rounds, and is asked."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            if with_store:
                self.all_go_on()
            self.clock.now = min(self.clock.now + LONGEST_LOOK, end)
            self.faults()

    def faults(self) -> dict[int, AttemptResult | None]:
        return {node: one.fault(self.clock.now) for node, one in self.launchers.items()}

    def all_know(self) -> dict[int, AttemptResult]:
        """Every launcher's fault, once each has one."""
        self.until(lambda: None not in self.faults().values())
        return {node: fault for node, fault in self.faults().items() if fault is not None}

    def die(self, node: int) -> None:
        """This launcher ends without a word."""
        launcher = self.launchers.pop(node)
        self.errors[launcher] = RuntimeError
        launcher.join()

    def stop(self, node: int) -> None:
        """This launcher ends, and says so."""
        self.launchers.pop(node).close()

    def conclude(
        self, node: int, consequence: bool, result: AttemptResult
    ) -> Callable[[], AttemptResult | None]:
        """Begin to report a result on one machine; the function waits for its conclusion."""
        return self._ask(node, lambda launcher: launcher.conclude(consequence, result))

    def settle(self, node: int, result: AttemptResult) -> Callable[[], AttemptResult | None]:
        """As `conclude`, for a machine that another machine's result has ended."""
        return self._ask(node, lambda launcher: launcher.settle(result))

    def _ask(
        self, node: int, what: Callable[[Rendezvous], AttemptResult | None]
    ) -> Callable[[], AttemptResult | None]:
        answers: list[AttemptResult | None] = []
        launcher = self.launchers.pop(node)
        self.asked.append(launcher)
        thread = threading.Thread(target=lambda: answers.append(what(launcher)))
        thread.start()

        def answer() -> AttemptResult | None:
            while thread.is_alive():
                self.clock.now += 0.1
                thread.join(0.02)
            launcher.close()
            return answers[0]

        return answer


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    job = Job(monkeypatch)
    yield job
    for node in sorted(job.launchers, reverse=True):  # the store is machine 0's
        job.stop(node)


@pytest.mark.parametrize("num_nodes", [2, 32])
def test_the_messages_of_a_launcher_do_not_grow_with_their_number(num_nodes: int, job: Job) -> None:
    job.meet(num_nodes)
    job.all_go_on()
    before = {node: job.counts[launcher].copy() for node, launcher in job.launchers.items()}
    job.all_go_on()
    for node, launcher in job.launchers.items():
        sent = job.counts[launcher].copy() - before[node]
        reads = "multi_get" if node == 0 else "get"
        assert sent.keys() == {"set", reads}
        assert abs(sent["set"] - sent[reads]) <= 1, "one of each a round"


def test_a_machine_that_comes_late_and_one_that_does_not_come(job: Job) -> None:
    job.start(3, 0, 1)
    job.until(lambda: all("machine 2 of 3" in one.awaited() for one in job.launchers.values()))
    job.clock.now += 299.0
    assert set(job.faults().values()) == {None}
    job.clock.now += 2.0
    for fault in job.all_know().values():
        assert fault.exit_code == EXIT_CRASH
        assert fault.message.startswith("machine 2 did not come to 127.0.0.1 port")
        assert f"here are machine 0 ({HOST}), machine 1 ({HOST}); " in fault.message
    job.start(3, 2)
    job.until(lambda: all(launcher.complete for launcher in job.launchers.values()))
    job.until(lambda: set(job.faults().values()) == {None})


def test_of_many_absent_machines_the_first_are_named(job: Job) -> None:
    job.start(512, 1)
    job.until(lambda: job.launchers[1].awaited().startswith("machine 0 of 512"))
    job.start(512, 0)
    wanted = "machine 2, 3, 4, 5, 6, 7, 8, 9 and 502 more of 512, at 127.0.0.1 port"
    job.until(lambda: all(one.awaited().startswith(wanted) for one in job.launchers.values()))


def test_another_setting_on_one_machine(job: Job) -> None:
    job.start(4, 0, 1)
    job.start(4, 3, **{"--seed": "2", "--name": "x"})
    wanted = f"--seed is 1 on machine 0 ({HOST}) and 2 on machine 3 ({HOST}); --name is None on "
    for fault in job.all_know().values():
        assert fault.exit_code == EXIT_USAGE
        assert fault.message.startswith(wanted)
    assert not any(launcher.complete for launcher in job.launchers.values())


def test_a_difference_comes_before_the_report_of_the_machine_that_saw_it_first(job: Job) -> None:
    job.start(2, 0)
    job.start(2, 1, **{"--seed": "2"})
    wanted = f"--seed is 1 on machine 0 ({HOST}) and 2 on machine 1 ({HOST}); "
    seen = job.all_know()[0]
    told = job.conclude(0, False, seen)
    job.until(lambda: job.launchers[1].fault(job.clock.now).message.startswith(wanted))
    told()


def test_a_failure_is_told_to_all(job: Job) -> None:
    job.meet(4)
    told = job.conclude(2, False, KILLED)
    for fault in job.all_know().values():
        assert fault.message == f"machine 2 ({HOST}) ended: rank 9 was killed by SIGKILL"
        assert (fault.exit_code, fault.node) == (EXIT_CRASH, 2)
    assert told() is None, "its own failure is the first cause"


def test_a_failure_of_machine_0_is_told_to_all(job: Job) -> None:
    job.meet(3)
    told = job.conclude(0, False, KILLED)
    for fault in job.all_know().values():
        assert fault.message == f"machine 0 ({HOST}) ended: rank 9 was killed by SIGKILL"
    assert told() is None


def test_a_lost_connection_is_the_consequence_of_another_failure(job: Job) -> None:
    job.meet(3)
    consequence = job.conclude(0, True, LOST_A_CONNECTION)
    wanted = f"machine 2 ({HOST}) ended: rank 9 was killed by SIGKILL"
    cause = job.conclude(2, False, KILLED)
    job.until(lambda: job.faults()[1] is not None and job.faults()[1].message == wanted)
    first = consequence()
    assert first is not None
    assert first.message == wanted
    assert cause() is None


def test_bad_input_on_one_machine_ends_all_as_a_usage_error(job: Job) -> None:
    job.start(3)
    job.launchers[1].wait_for_all(60.0)
    told = job.conclude(1, False, AttemptResult(EXIT_USAGE, "no data; pass --data_dir"))
    for fault in job.all_know().values():
        assert fault.exit_code == EXIT_USAGE
        assert fault.message == f"machine 1 ({HOST}) ended: no data; pass --data_dir"
    assert told() is None


def test_a_machine_that_falls_silent_is_lost_for_all(job: Job) -> None:
    job.meet(4)
    job.die(2)
    job.pass_time(LONGEST_SILENCE - 2)
    assert set(job.faults().values()) == {None}
    job.pass_time(4)
    for fault in job.all_know().values():
        assert fault.exit_code == EXIT_CRASH
        assert fault.message.startswith(f"machine 2 ({HOST}) has not been heard of for 20 s")
    # What the machines that end now report does not hide why.
    told = job.conclude(0, False, next(iter(job.all_know().values())))
    assert "machine 2" in job.launchers[3].fault(job.clock.now).message
    told()


def test_a_machine_that_is_gone_without_a_report_is_named(job: Job) -> None:
    job.meet(3)
    job.die(2)
    conclusion = job.conclude(1, True, LOST_A_CONNECTION)
    job.pass_time(SECONDS_TO_EXCHANGE + 1)
    gone = conclusion()
    assert gone is not None
    assert gone.message.startswith(f"machine 2 ({HOST}) is gone without a report")
    assert gone.node == 2


def test_all_name_the_machine_that_is_gone_not_one_that_lost_its_connection(job: Job) -> None:
    """Machine 3 dies. Ranks of 1 and 2 fail by it; machine 0 is ended by their reports."""
    job.meet(4)
    job.die(3)
    answers = [job.conclude(node, True, LOST_A_CONNECTION) for node in (1, 2)]
    told = job.all_know()[0]
    assert told.message.endswith("ended: rank 0: connection closed")
    job.pass_time(SECONDS_TO_EXCHANGE + 1)
    answers.append(job.settle(0, told))
    for answer in [answer() for answer in reversed(answers)]:
        assert answer is not None
        assert answer.message.startswith(f"machine 3 ({HOST}) is gone without a report")


def test_machine_0_is_lost_when_its_store_is_gone(job: Job) -> None:
    job.meet(3)
    job.die(0)
    job.until(lambda: not any(launcher.is_alive() for launcher in job.launchers.values()))
    job.faults()
    job.clock.now += 10 * LONGEST_SILENCE  # a pause of the launcher itself is no silence
    assert set(job.faults().values()) == {None}
    job.pass_time(LONGEST_SILENCE, with_store=False)
    for fault in job.all_know().values():
        assert fault.message.startswith("machine 0 ")
        assert "has not been heard of for 20 s" in fault.message


def test_machines_that_have_finished_are_not_lost(job: Job) -> None:
    # torchrun's agent shares machine 0's store, and keeps it until all agents have ended.
    agents = dist.TCPStore(
        "127.0.0.1", job.port, None, True, wait_for_workers=False, multi_tenant=True
    )
    job.meet(3)
    job.stop(1)
    job.pass_time(LONGEST_SILENCE + 3)
    assert set(job.faults().values()) == {None}
    job.stop(0)
    job.pass_time(LONGEST_SILENCE + 3)
    assert job.faults() == {2: None}
    del agents


def test_a_launcher_that_ended_before_it_arrived_is_absent(job: Job) -> None:
    job.start(2, 0)
    store = dist.TCPStore("127.0.0.1", job.port, None, False, wait_for_workers=False)
    dist.PrefixStore("launchers/0", store).set("described/1", "{}")
    job.all_go_on()
    assert job.launchers[0].awaited().startswith("machine 1 of 2")
    job.clock.now += 301.0
    assert "machine 1 did not come" in job.faults()[0].message


def test_machines_that_ended_before_the_others_are_not_taken_for_the_one_that_is_gone(
    job: Job,
) -> None:
    """Machines 0 and 2 end at once after a lost connection; 1 and 3 wait for their ranks."""
    agents = dist.TCPStore(
        "127.0.0.1", job.port, None, True, wait_for_workers=False, multi_tenant=True
    )
    job.meet(4)
    ended = [job.conclude(0, True, LOST_A_CONNECTION)]
    told = job.all_know()
    ended.append(job.settle(2, told[2]))
    for answer in reversed(ended):
        answer()
    job.pass_time(SECONDS_TO_EXCHANGE + 3)
    wanted = f"machine 0 ({HOST}) ended: rank 0: connection closed"
    late = [job.settle(1, told[1]), job.conclude(3, True, LOST_A_CONNECTION)]
    for answer in [answer() for answer in late]:
        assert answer is not None
        assert answer.message == wanted
    del agents


@pytest.mark.parametrize("node", [0, 1])
def test_an_error_in_the_rendezvous_itself_is_told(node: int, job: Job) -> None:
    job.meet(2)
    job.errors[job.launchers[node]] = KeyError
    job.launchers[node].join()
    fault = job.faults()[node]
    assert fault is not None
    assert fault.exit_code == EXIT_CRASH
    assert fault.message.startswith(f"the rendezvous on machine {node} ({HOST}) failed, see above")
    assert fault.detail.rstrip().endswith("KeyError: 'injected'")


def test_a_forwarder_that_drops_connections_until_machine_0_is_up(job: Job) -> None:
    """A container's port, for one: it takes a connection before machine 0 does."""
    forwarder = SlowStore(job.port)
    job.start(2, 1, port=forwarder.port)
    job.until(lambda: forwarder.dropped > 1)
    assert job.launchers[1].awaited().startswith("machine 0 of 2, at 127.0.0.1")
    fault = job.launchers[1].fault(job.clock.now + 301.0)
    assert fault is not None
    assert fault.message.startswith("machine 0 did not answer at 127.0.0.1")
    job.start(2, 0)
    job.until(lambda: all(launcher.complete for launcher in job.launchers.values()))
    forwarder.close()
