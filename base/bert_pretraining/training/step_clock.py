"""Where the time of a step goes, on each rank and over all of them.

On a CPU the host's clock tells. On a device, events among its work do: the host reads them when
they are long past, so that it never waits for one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bert_pretraining.logs.sinks import OWN_PARTS, RankSeconds, Work
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.flops import NOTHING, Amount, step_flops
from bert_pretraining.runtime import agreement, process_group
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.events import TimedEvent, event_maker
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.process_memory import peak_bytes
from bert_pretraining.runtime.ranges import range_of

MEASURED = ("data", "forward_backward", "reduction", "optimizer")
# Of events that are still to be read, at least: some are read once there are more. The host is at
# most 20 updates ahead of its device, see `outcomes.COPY_EVERY`; an update has about five pairs.
UNREAD = 200


@dataclass
class Tally:
    """What one rank did in some updates. seconds: by MEASURED, in all."""

    updates: int = 0
    amount: Amount = NOTHING
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURED, 0.0))

    def add(self, other: Tally) -> None:
        self.updates += other.updates
        self.amount += other.amount
        for part, seconds in other.seconds.items():
            self.seconds[part] += seconds


class _Span(NamedTuple):
    """A part's time on the device. at_most: seconds above which it was not this part."""

    part: str
    start: TimedEvent
    end: TimedEvent
    at_most: float = float("inf")


class StepClock:
    """Measures the parts of one rank's updates.

    Waiting for data is the host's time; on a device it is no longer than the device stood still
    between two updates, because the host works ahead.

    Args:
        device: of this rank.
        make_event: makes events of the device; None where it has none. By default it is found out.

    Attributes:
        measures: whether the parts' seconds are known: on a CPU, and on devices with events.
        whole: all updates that were taken so far.
    """

    def __init__(
        self, device: torch.device, make_event: Callable[[], TimedEvent] | None = None
    ) -> None:
        self._make_event = make_event or event_maker(device)
        self._is_host = device.type == "cpu" and make_event is None
        self.measures = self._is_host or self._make_event is not None
        self._tally, self.whole = Tally(), Tally()
        self._longest = dict.fromkeys(MEASURED, 0.0)
        self._unread: collections.deque[_Span] = collections.deque()
        self._waited = 0.0  # of the host for data, since the device's last part
        self._last: TimedEvent | None = None  # the end of the device's last part
        self._turned: float | TimedEvent | None = None  # where the present part became reduction

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The work in this context is a part of an update: one of MEASURED."""
        if name == "data" or self._is_host:
            started = time.perf_counter()
            with range_of(name):
                yield
            ended = time.perf_counter()
            self._host_spent(name, started, ended)
        elif self._make_event is None:
            with range_of(name):
                yield
        else:
            start = self._record()
            with range_of(name):
                yield
            self._device_spent(name, start, self._record())

    def waits_from_here(self) -> None:
        """What follows in the present part is waiting for other ranks: it counts as reduction."""
        if self._is_host:
            self._turned = time.perf_counter()
        elif self._make_event is not None:
            self._turned = self._record()

    def count(self, micro_batches: Sequence[PackedBatch]) -> None:
        """An update of these micro-batches was given to the device."""
        self._tally.updates += 1
        for batch in micro_batches:
            amount = Amount(batch.num_tokens, batch.token_pairs, batch.num_masked)
            self._tally.amount += amount
        while len(self._unread) > UNREAD and self._unread[0].end.query():
            self._read(self._unread.popleft())

    def take(self) -> Tally:
        """What was done since the last call. The device must have done all work given to it."""
        while self._unread:
            self._read(self._unread.popleft())
        taken, self._tally = self._tally, Tally()
        self.whole.add(taken)
        return taken

    def take_longest(self) -> dict[str, float]:
        """The longest seconds of a part in one update, since the last call."""
        longest, self._longest = self._longest, dict.fromkeys(MEASURED, 0.0)
        return longest

    def _add(self, part: str, seconds: float) -> None:
        self._tally.seconds[part] += seconds
        self._longest[part] = max(self._longest[part], seconds)

    def _host_spent(self, name: str, started: float, ended: float) -> None:
        turned, self._turned = self._turned, None
        if turned is not None:
            self._add("reduction", ended - turned)
            ended = turned
        if self._is_host:
            self._add(name, ended - started)
        else:
            self._waited += ended - started

    def _device_spent(self, name: str, start: TimedEvent, end: TimedEvent) -> None:
        if self._last is not None and self._waited:
            self._unread.append(_Span("data", self._last, start, self._waited))
        self._waited = 0.0
        turned, self._turned = self._turned, None
        if turned is not None:
            self._unread.append(_Span(name, start, turned))
            name, start = "reduction", turned
        self._unread.append(_Span(name, start, end))
        self._last = end

    def _record(self) -> TimedEvent:
        event = self._make_event()
        event.record()
        return event

    def _read(self, span: _Span) -> None:
        seconds = span.start.elapsed_time(span.end) / 1e3  # it gives milliseconds
        self._add(span.part, min(seconds, span.at_most))


def over_ranks(tally: Tally, measures: bool, config: BertConfig, ranks: Ranks) -> Work:
    """What all ranks did in the same updates; every rank must call this. Waits for the device.

    No message grows with the number of ranks, and no rank looks at all others.

    measures: whether the tally's seconds are known; the same on every rank.
    """
    device, world = ranks.device, ranks.world_size
    updates = max(tally.updates, 1)
    parts = [tally.seconds[part] / updates for part in MEASURED]
    amounts = [tally.amount.tokens, step_flops(tally.amount, config)]
    tokens, flops, *sums = process_group.total([*amounts, *parts], device)
    # As precise as what is exchanged, to find out below whose seconds these are.
    own = sum(tally.seconds[part] for part in OWN_PARTS) / updates
    own = torch.tensor(own, dtype=devices.wide(device)).item()
    peak, most, least = process_group.largest([peak_bytes(device) or 0, own, -own], device)
    work = Work(tally.updates, int(tokens), flops, int(peak) or None)
    if not measures or not tally.updates:
        return work
    slowest, fastest = process_group.smallest(
        [ranks.rank if own == bound else world for bound in (most, -least)], device
    )
    return dataclasses.replace(
        work,
        seconds={part: of / world for part, of in zip(MEASURED, sums, strict=True)},
        fastest=RankSeconds(int(fastest), -least),
        slowest=RankSeconds(int(slowest), most),
        median_seconds=agreement.median(own, device),
    )
