"""Machine 0's judgement of all machines: who is absent, differs, has failed or is lost."""

from __future__ import annotations

import json

from bert_pretraining.launch.board import Arrival, Board, Heartbeat, MachineReport
from bert_pretraining.launch.observer import LONGEST_LOOK, LONGEST_SILENCE, Observer, Silence

FAILED = MachineReport(False, 20.0, 2, "rank 9 was killed")


def observer_of(num_nodes: int, here: int | None = None) -> Observer:
    """An observer, and the first machines of the job with their first heartbeats."""
    observer = Observer(num_nodes, "same")
    for node in range(num_nodes if here is None else here):
        observer.arrive(Arrival(node, f"host{node}", "same"))
        observer.hear(node, Heartbeat(0))
    return observer


def pass_time(observer: Observer, seconds: float, beating: list[int], start: float = 0.0) -> float:
    """Rounds, one a second, in which only some machines send heartbeats; the time at the end."""
    now = start
    while now < start + seconds:
        now += 1.0
        observer.look(now)
        for node in beating:
            observer.hear(node, Heartbeat(int(now)))
        observer.board()
    return now


def test_a_machine_that_sends_nothing_new_is_quiet_and_then_lost() -> None:
    observer = observer_of(3)
    now = pass_time(observer, 5, [0, 1, 2])
    assert observer.board().quiet == ()
    now = pass_time(observer, LONGEST_SILENCE, [0, 1], now)
    board = observer.board()
    assert board.quiet == ((2, LONGEST_SILENCE),)
    assert board.lost is None
    assert board.label(2) == "machine 2 (host2)"
    now = pass_time(observer, 1, [0, 1], now)
    assert observer.board().lost == 2
    pass_time(observer, 1, [0, 1, 2], now)
    assert observer.board().lost == 2, "the others are ending already"


def test_machines_that_ended_or_reported_are_not_lost() -> None:
    observer = observer_of(3)
    observer.hear(1, Heartbeat(1, ended=True))
    observer.hear(2, Heartbeat(1, FAILED))
    pass_time(observer, 3 * LONGEST_SILENCE, [0])
    board = observer.board()
    assert (board.lost, board.quiet, board.first_cause) == (None, (), FAILED)


def test_a_report_that_came_before_a_loss_stays_the_cause() -> None:
    observer = observer_of(4)
    observer.hear(2, Heartbeat(1, FAILED))
    pass_time(observer, 3 * LONGEST_SILENCE, [0, 1])
    assert observer.board().lost is None


def test_the_least_report_is_the_first_cause() -> None:
    observer = observer_of(3)
    consequence = MachineReport(True, 10.0, 1, "connection closed")
    observer.hear(1, Heartbeat(1, consequence))
    assert observer.board().first_cause == consequence
    observer.hear(2, Heartbeat(1, FAILED))
    assert observer.board().first_cause == FAILED, "clocks differ; a loss may be a consequence"


def test_a_pause_of_machine_0_is_no_silence_of_the_others() -> None:
    silence = Silence()
    silence.look(0.0)
    silence.hear(1, "beat")
    silence.look(10 * LONGEST_SILENCE)
    assert silence.of(1) == LONGEST_LOOK
    silence.look(LONGEST_SILENCE)  # a clock that goes back counts as no time
    assert silence.of(1) == LONGEST_LOOK
    silence.look(LONGEST_SILENCE + 1.5)
    assert silence.of(1) == LONGEST_LOOK + 1.5
    silence.hear(1, "beat")
    assert silence.longest(LONGEST_LOOK) == [1], "the same again is no news"
    silence.hear(1, "new beat")
    assert silence.of(1) == 0.0
    assert silence.of(2) == 0.0, "never heard"


def test_who_is_here_and_who_is_absent() -> None:
    observer = observer_of(3, here=2)
    board = observer.board()
    assert (board.here, board.absent, board.present) == (2, (2,), (0, 1))
    assert board.hosts == ((0, "host0"), (1, "host1"))
    assert not board.complete
    observer.arrive(Arrival(2, "host2", "same"))
    observer.arrive(Arrival(2, "another", "other"))  # of two with one number the first counts
    board = observer.board()
    assert (board.here, board.absent, board.present, board.complete) == (3, (), (), True)
    assert observer.label(2) == "machine 2 (host2)"


def test_a_machine_with_other_settings() -> None:
    observer = observer_of(4, here=2)
    assert observer.unexplained() is None
    observer.arrive(Arrival(3, "host3", "other"))
    observer.arrive(Arrival(2, "host2", "another"))
    assert observer.unexplained() == 2
    assert not observer.board().complete
    observer.explain(2, "--seed is 1 on machine 0 and 2 on machine 2")
    assert observer.unexplained() is None, "one difference is enough"
    assert observer.board().difference == "--seed is 1 on machine 0 and 2 on machine 2"
    observer = observer_of(1)
    observer.arrive(Arrival(0, "host0", "same"))
    assert observer.board().complete


def test_the_board_does_not_grow_with_the_number_of_machines() -> None:
    def sizes(num_nodes: int) -> list[int]:
        """Of the board while half of the machines are absent, when all are here, and all quiet."""
        observer = observer_of(num_nodes, here=num_nodes // 2)
        waiting = observer.board()
        for node in range(num_nodes):
            observer.arrive(Arrival(node, f"host{node}", "same"))
            observer.hear(node, Heartbeat(0))
        met = observer.board()
        pass_time(observer, LONGEST_SILENCE + 5, [0])
        return [len(board.text()) for board in (waiting, met, observer.board())]

    for small, large in zip(sizes(32), sizes(4096), strict=True):
        assert large <= small + 100, "only the digits of the machines' numbers may grow"


def test_boards_and_heartbeats_are_read_as_they_were_written() -> None:
    observer = observer_of(5, here=4)
    observer.hear(2, Heartbeat(1, FAILED))
    pass_time(observer, 3, [0])
    board = observer.board(ended=True)
    assert board.quiet
    assert Board.read(board.text()) == board
    assert Board.read('{"beat": 3, "of_other_code": 1}') == Board(3, absent=())
    for heartbeat in (Heartbeat(7), Heartbeat(8, FAILED), Heartbeat(9, ended=True)):
        assert Heartbeat.read(heartbeat.text()) == heartbeat
    # From other code, with fields that this one does not know.
    of_other_code = FAILED.__dict__ | {"more": 1}
    read = Heartbeat.read(json.dumps({"beat": 3, "report": of_other_code, "more": 1}))
    assert read == Heartbeat(3, FAILED)
    assert Board.read(json.dumps({"first_cause": of_other_code})).first_cause == FAILED
    line = b'{"node": 1, "host": "a", "digest": "x", "more": 1}'
    assert Arrival.read_all(line) == [Arrival(1, "a", "x")]
    arrivals = [Arrival(0, "a", "x"), Arrival(1, "b", "y")]
    assert Arrival.read_all("".join(a.line() for a in arrivals).encode()) == arrivals
