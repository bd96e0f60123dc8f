"""Which rank is blamed for a hang: a decision from states, stacks, updates and heartbeats."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from bert_pretraining.launch.hang import LONGEST_PAUSE, HangDetector, both
from bert_pretraining.launch.hang_verdict import (
    WAITING_FILE,
    WAITING_FUNCTIONS,
    RankView,
    judge,
)
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.result import explain
from bert_pretraining.runtime import rank_reports
from helpers import ROOT

PACKAGE = "/home/me/bert/base/bert_pretraining"
PYTHON = "/usr/lib/python3.11"
TORCH = f"{PYTHON}/site-packages/torch"


def stacks(*calls: str, other: tuple[str, ...] = ()) -> str:
    """faulthandler's text. calls: of the main thread, "FILE:LINE FUNCTION", innermost first."""

    def lines(thread: tuple[str, ...]) -> str:
        parts = (call.replace(":", " ").split() for call in thread)
        return "".join(f'  File "{file}", line {line} in {name}\n' for file, line, name in parts)

    first = f"Thread 0x00007f (most recent call first):\n{lines(other)}\n" if other else ""
    return f"{first}Current thread 0x00007a (most recent call first):\n{lines(calls)}"


TRAIN = f"{PACKAGE}/training/train.py:90 train"
UPDATE = (f"{PACKAGE}/training/update.py:63 __call__", TRAIN)
IN_A_COLLECTIVE = stacks(f"{PACKAGE}/runtime/process_group.py:195 wait", *UPDATE)
IN_A_BARRIER = stacks(
    f"{TORCH}/distributed/distributed_c10d.py:4811 barrier",
    f"{TORCH}/distributed/c10d_logger.py:83 wrapper",
    f"{PACKAGE}/runtime/process_group.py:172 barrier",
    TRAIN,
)
IN_THE_BACKWARD_PASS = stacks(
    f"{TORCH}/autograd/graph.py:865 _engine_run_backward",
    f"{TORCH}/_tensor.py:630 backward",
    f"{PACKAGE}/training/micro_step.py:40 backward",
    *UPDATE,
)
IN_THE_LOADER = stacks(
    f"{PYTHON}/threading.py:327 wait",
    f"{PYTHON}/queue.py:171 get",
    f"{PACKAGE}/data/loader.py:120 next",
    TRAIN,
    other=(
        f"{PYTHON}/site-packages/h5py/_hl/dataset.py:808 __getitem__",
        f"{PACKAGE}/data/shards.py:140 read",
        f"{PACKAGE}/data/loader.py:88 produce",
    ),
)
IN_THE_MODEL = stacks(f"{PACKAGE}/model/bert.py:77 forward", *UPDATE)
# Rank 0 reads the shards' sizes for all: it is called by a function for collectives.
READS_FOR_ALL = stacks(
    f"{PYTHON}/site-packages/h5py/_hl/files.py:564 __init__",
    f"{PACKAGE}/data/shards.py:60 count",
    f"{PACKAGE}/runtime/process_group.py:286 from_main",
    f"{PACKAGE}/training/session.py:76 __init__",
)
SAVES = stacks(f"{PACKAGE}/runtime/files.py:90 write_whole", f"{PACKAGE}/checkpoint/save.py:9 save")


def view(
    text: str | None, state: str = "S", updates: int = 41, heartbeat: int | None = 1000
) -> RankView:
    return RankView(state, text, updates, heartbeat)


WAITS = view(IN_A_COLLECTIVE, heartbeat=900)  # the oldest heartbeat, by 100 ns


def verdict(*views: RankView, on_cpu: bool = True) -> str:
    return str(judge(dict(enumerate(views)), on_cpu))


@pytest.mark.parametrize(
    ("guilty", "evidence"),
    [
        (view(IN_A_COLLECTIVE, "T"), "is stopped (state T)"),
        (view(IN_A_COLLECTIVE, "t"), "is held by a debugger (state t)"),
        (view("", "D"), "waits for a disk or a device (state D)"),
        (view("", ""), "is gone"),
        (
            view(IN_THE_LOADER),
            "is not in a collective: in data/loader.py:120 next (threading.py:327 wait), for a "
            "thread in data/shards.py:140 read",
        ),
        (view(IN_THE_MODEL), "is not in a collective: in model/bert.py:77 forward"),
        (
            view(READS_FOR_ALL),
            "is not in a collective: in data/shards.py:60 count (files.py:564 __init__)",
        ),
        (view(SAVES), "is not in a collective: in runtime/files.py:90 write_whole"),
        (view(""), "does not answer: it gave no stack"),
        (view(None, heartbeat=None), "is still starting"),
        (
            view(IN_A_COLLECTIVE, updates=40),
            "is behind, with 40 updates of 41: in runtime/process_group.py:195 wait",
        ),
        (
            view(IN_THE_BACKWARD_PASS),
            "waits for the backward pass, and other ranks wait in a collective: in "
            "training/micro_step.py:40 backward (graph.py:865 _engine_run_backward)",
        ),
    ],
)
@pytest.mark.parametrize("waits", [IN_A_COLLECTIVE, IN_A_BARRIER], ids=["wait", "barrier"])
def test_the_guilty_one_is_named_and_not_the_oldest_heartbeat(
    guilty: RankView, evidence: str, waits: str
) -> None:
    other = view(waits, heartbeat=900)
    assert verdict(other, guilty, other) == f"rank 1 {evidence}"
    assert verdict(guilty, other) == f"rank 0 {evidence}"


def test_all_guilty_ones_are_named() -> None:
    halted = view(IN_A_COLLECTIVE, "T")
    assert verdict(halted, WAITS, halted) == (
        "rank 0 is stopped (state T), rank 2 is stopped (state T)"
    )
    # A disk that hangs: all ranks read from it.
    assert verdict(view(IN_THE_LOADER), view(IN_THE_LOADER)).count("is not in a collective") == 2
    assert verdict(view(SAVES), WAITS, view(IN_THE_MODEL)).count("is not in a collective") == 2


def test_the_stronger_evidence_decides() -> None:
    free = view(IN_THE_LOADER, updates=40, heartbeat=1)
    assert verdict(free, view(IN_A_COLLECTIVE, "T")) == "rank 1 is stopped (state T)"
    behind = view(IN_A_COLLECTIVE, updates=40, heartbeat=1)
    assert verdict(behind, WAITS, free).startswith("rank 2 is not in a collective")


def test_on_a_device_the_host_waits_where_it_computes() -> None:
    """There a collective holds up the device, and with it the host, at any call to it."""
    computes = view(IN_THE_MODEL)
    reads = view(stacks(f"{PACKAGE}/runtime/transfer.py:36 wait", *UPDATE))
    named = verdict(computes, reads, view(IN_THE_LOADER), on_cpu=False)
    assert named.startswith("rank 2 is not in a collective: in data/loader.py:120")
    assert verdict(computes, WAITS, on_cpu=False).startswith("rank 0 waits for its device")
    assert not judge({0: computes, 1: reads}, on_cpu=False).certain


def test_where_all_wait_alike_the_oldest_heartbeat_is_named_as_no_more_than_that() -> None:
    found = judge({0: view(IN_A_COLLECTIVE), 1: WAITS}, on_cpu=True)
    assert not found.certain, "on another machine a rank may be guilty for certain"
    assert str(found) == (
        "rank 1 has the oldest heartbeat, and waits as all do: in runtime/process_group.py:195 wait"
    )
    assert judge({0: view(IN_A_COLLECTIVE, "T"), 1: WAITS}, on_cpu=True).certain


def test_ranks_that_wait_for_one_that_goes_on_do_not_hang() -> None:
    slow = RankView("R", IN_THE_MODEL, 41, 2000, goes_on=True)
    assert judge({0: WAITS, 1: slow}, on_cpu=True) is None
    just_there = RankView("S", IN_A_COLLECTIVE, 41, 2000, goes_on=True)
    assert judge({0: WAITS, 1: just_there}, on_cpu=True) is None
    halted = view(IN_A_COLLECTIVE, "T")
    assert judge({0: halted, 1: slow}, on_cpu=True).evidence == {0: "is stopped (state T)"}


def test_the_functions_that_wait_are_those_of_the_package() -> None:
    tree = ast.parse((ROOT / "base/bert_pretraining" / WAITING_FILE).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert names >= set(WAITING_FUNCTIONS)


def test_a_state_that_passes_is_no_evidence() -> None:
    assert both("D", "D") == "D"
    assert both("D", "S") == both("S", "D") == "R"
    assert both("S", "Z") == "Z"


def test_a_rank_that_failed_because_another_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank_reports.FOLDER_VARIABLE, str(tmp_path))
    guilty = {1: "is stopped (state T)"}
    reason = "on gpu07 the ranks do not reach each other (Timed out after 91 seconds)"
    rank_reports.record_failure(0, 1, reason, "")
    found = explain(tmp_path, {0: 1, 1: -9}, frozenset({1}), guilty)
    assert found.text({}) == (
        f"Rank 0 ended: {reason}\n"
        "Error: rank 1 is stopped (state T); rank 0 waited in vain, and all ranks were ended"
    )
    assert found.rank == 1
    rank_reports.record_failure(0, 1, "no luck", "")
    assert explain(tmp_path, {0: 1}, frozenset({1}), guilty).message == "no luck"


def test_a_heartbeat_tells_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rank_reports.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    rank_reports.heartbeat()
    first = rank_reports.read_heartbeats(tmp_path)[3]
    for updates in (1, 0, 1):
        rank_reports.heartbeat(updates)
    last = rank_reports.read_heartbeats(tmp_path)[3]
    assert (first.updates, last.updates) == (0, 2)
    assert last.time >= first.time


def test_a_launcher_that_stood_still_says_so_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other machines have given it up, and what it sees of them is a consequence."""
    detector = HangDetector(RankProcesses(tmp_path), 600.0, True, several_machines=True)
    now = time.monotonic()
    detector.look_at_the_clock(now + LONGEST_PAUSE - 1)
    assert capsys.readouterr().err == ""
    detector.look_at_the_clock(now + LONGEST_PAUSE - 1 + 30)
    assert " stood still for 30 s: it was stopped (SIGSTOP" in capsys.readouterr().err
    detector.check(now + LONGEST_PAUSE + 29)
    assert capsys.readouterr().err == "", "once"
    crowded = HangDetector(RankProcesses(tmp_path), 600.0, True, False, "100 ranks compute on 2")
    crowded.look_at_the_clock(now + 1000.0)
    assert capsys.readouterr().err.endswith("or memory for it (100 ranks compute on 2)\n")
