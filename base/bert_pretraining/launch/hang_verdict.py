"""Which ranks hold up the others: a decision from states, stacks and heartbeats. Pure.

One rank that stops makes all others wait for it in a collective. So the others are silent for as
long as it is, and their heartbeats differ from its own by microseconds only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bert_pretraining.runtime.words import counted

# State letters of /proc/PID/stat in which a rank cannot go on.
HELD = {
    "": "is gone",
    "Z": "is gone",
    "T": "is stopped (state T)",
    "t": "is held by a debugger (state t)",
    "D": "waits for a disk or a device (state D)",
}
# The innermost call of this package in which a rank waits for the others; where PyTorch's own
# functions for collectives are further in, any call is such a one.
WAITING_FILE, WAITING_FUNCTIONS = "runtime/process_group.py", ("wait", "wait_for_all_to_finish")
# On an accelerator a collective holds up the device, and the host waits wherever it reads a result
# or gives the device more work: in these parts of the package.
DEVICE_PARTS = ("kernels/", "model/", "optim/", "runtime/", "training/")
COLLECTIVE, BACKWARD, DEVICE = "a collective", "the backward pass", "its device"
_PACKAGE = "/bert_pretraining/"
_COLLECTIVES = "/torch/distributed/"
# DistributedDataParallel sums the gradients of all ranks inside the engine, in C++.
_ENGINE = "_engine_run_backward"
_SYNCHRONISATION = ("threading.py", "queue.py", "thread.py", "_base.py")


@dataclass(frozen=True)
class Frame:
    """One call of a stack."""

    file: str
    line: int
    function: str

    @property
    def in_package(self) -> str:
        """The file below the package's folder; empty for a file of another package."""
        return self.file.rpartition(_PACKAGE)[2] if _PACKAGE in self.file else ""

    def __str__(self) -> str:
        return f"{self.in_package or self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class RankView:
    """What the launcher sees of a rank, when one or more make no progress.

    Attributes:
        state: its letter in /proc/PID/stat; empty if the process is gone.
        stacks: faulthandler's text; empty if the rank gave no answer, None if it was not asked,
            since it is still starting.
        updates: how many updates it has made.
        heartbeat: when it last made progress, in ns; None before its first step.
        goes_on: whether it made progress a short while ago.
    """

    state: str
    stacks: str | None
    updates: int
    heartbeat: int | None
    goes_on: bool = False


@dataclass(frozen=True)
class Verdict:
    """The guilty ranks with the evidence, such as "is stopped (state T)".

    certain: False if only the age of the heartbeat speaks against them.
    """

    evidence: dict[int, str]
    certain: bool

    def __str__(self) -> str:
        return ", ".join(f"rank {rank} {what}" for rank, what in sorted(self.evidence.items()))


def judge(views: Mapping[int, RankView], on_cpu: bool) -> Verdict | None:
    """Which of the ranks hold up the others, by the strongest evidence that there is.

    None if it speaks only against ranks that go on: the silent ones wait for them.

    on_cpu: whether the ranks compute on the CPU, so that the host's stack shows all that they do.
    """
    waits = {rank: waits_for(view.stacks, on_cpu) for rank, view in views.items()}
    evidence = _held(views) or _free(views, waits) or _behind(views) or _not_yet_there(views, waits)
    if evidence:
        guilty = {rank: what for rank, what in evidence.items() if not views[rank].goes_on}
        return Verdict(guilty, certain=True) if guilty else None
    if any(view.goes_on for view in views.values()):
        return None
    started = {rank: view.heartbeat for rank, view in views.items() if view.heartbeat is not None}
    oldest = min(started or views, key=lambda rank: started.get(rank, 0))
    where = place(views[oldest])
    return Verdict({oldest: f"has the oldest heartbeat, and waits as all do: {where}"}, False)


def _held(views: Mapping[int, RankView]) -> dict[int, str]:
    """The ranks that cannot go on, and why."""
    return {rank: HELD[view.state] for rank, view in views.items() if view.state in HELD}


def _free(views: Mapping[int, RankView], waits: Mapping[int, str | None]) -> dict[int, str]:
    """The ranks that wait for no other rank."""
    return {rank: _described(view) for rank, view in views.items() if waits[rank] is None}


def _described(view: RankView) -> str:
    if view.stacks is None:
        return "is still starting"
    if not view.stacks:
        return "does not answer: it gave no stack"
    return f"is not in a collective: {place(view)}"


def _behind(views: Mapping[int, RankView]) -> dict[int, str]:
    most = max(view.updates for view in views.values())
    return {
        rank: f"is behind, with {counted(view.updates, 'update')} of {most}: {place(view)}"
        for rank, view in views.items()
        if view.updates < most
    }


def _not_yet_there(
    views: Mapping[int, RankView], waits: Mapping[int, str | None]
) -> dict[int, str]:
    """The ranks that may still compute what others, in a collective, wait for."""
    if COLLECTIVE not in waits.values():
        return {}
    return {
        rank: f"waits for {waits[rank]}, and other ranks wait in a collective: {place(view)}"
        for rank, view in views.items()
        if waits[rank] != COLLECTIVE
    }


def waits_for(stacks: str | None, on_cpu: bool) -> str | None:
    """What the main thread may wait for that depends on other ranks; None for anything else."""
    frames = main_thread(stacks or "")
    own = _first_in_package(frames)
    library = frames[: frames.index(own)] if own else frames
    if any(_COLLECTIVES in frame.file for frame in library):
        return COLLECTIVE
    if own and own.in_package == WAITING_FILE and own.function in WAITING_FUNCTIONS:
        return COLLECTIVE
    if any(frame.function == _ENGINE for frame in library):
        return BACKWARD
    if own is not None and not on_cpu and own.in_package.startswith(DEVICE_PARTS):
        return DEVICE
    return None


def place(view: RankView) -> str:
    """Where its main thread is: "in data/loader.py:120 next (queue.py:171 get)"."""
    frames = main_thread(view.stacks or "")
    if not frames:
        return "at an unknown place"
    own = _first_in_package(frames) or frames[0]
    text = f"in {own}"
    if own is not frames[0]:
        text += f" ({_short(frames[0])})"
        busy = _busy_thread(view.stacks or "")
        if busy is not None and _short(frames[0]).startswith(_SYNCHRONISATION):
            text += f", for a thread in {busy}"
    return text


def main_thread(stacks: str) -> list[Frame]:
    """The main thread's calls in faulthandler's text, innermost first.

    faulthandler calls the thread that got the signal, the main one, the current thread.
    """
    _, current, text = stacks.rpartition("Current thread")
    return _frames(text) if current else []


def _busy_thread(stacks: str) -> Frame | None:
    """The innermost call of this package in another thread that waits for no thread itself."""
    for text in re.split(r"^Thread ", stacks.rpartition("Current thread")[0], flags=re.MULTILINE):
        frames = _frames(text)
        own = _first_in_package(frames)
        if own is not None and not _short(frames[0]).startswith(_SYNCHRONISATION):
            return own
    return None


def _frames(text: str) -> list[Frame]:
    found = re.findall(r'File "([^"\n]+)", line (\d+) in (\S+)', text)
    return [Frame(file, int(line), function) for file, line, function in found]


def _first_in_package(frames: list[Frame]) -> Frame | None:
    return next((frame for frame in frames if frame.in_package), None)


def _short(frame: Frame) -> str:
    return f"{frame.file.rpartition('/')[2]}:{frame.line} {frame.function}"
