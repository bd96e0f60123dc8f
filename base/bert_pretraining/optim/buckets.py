"""Buckets of a flat gradient, which are sent to the other ranks while backward still runs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch.distributed as dist

from bert_pretraining.optim.flat import FlatLayout
from bert_pretraining.runtime.process_group import InProgress

BUCKET = 2**23  # elements; 16 or 32 MiB per collective
AT_A_TIME = 3  # collectives that gloo may have pending, because it copies what it sends


class PendingCollectives:
    """Collectives in progress, at most AT_A_TIME of them on gloo.

    Attributes:
        started: how many were added since the last `wait`.
    """

    def __init__(self) -> None:
        self.started = 0
        self._works: deque[InProgress] = deque()
        self._limit = AT_A_TIME if dist.get_backend() == "gloo" else None

    def add(self, work: InProgress) -> None:
        """Take over a collective that has begun; waits for the oldest if there are too many."""
        self.started += 1
        self._works.append(work)
        if self._limit is not None and len(self._works) > self._limit:
            self._works.popleft().wait()

    def wait(self) -> None:
        """Wait for all."""
        while self._works:
            self._works.popleft().wait()
        self.started = 0


class Buckets:
    """Sends each bucket once its gradients are complete; every rank in the same order.

    So the sums do not depend on the order in which gradients become complete.

    Args:
        names: of the parameters, for messages.
        length: elements of each bucket; the last one may be shorter.
        send: begins to send the bucket of this number.
    """

    def __init__(
        self,
        names: list[str],
        layout: FlatLayout,
        length: int,
        send: Callable[[int], InProgress],
    ) -> None:
        self._names, self._send = names, send
        self._count = -(-layout.length // length)
        self._of_parameter = [
            range(offset // length, (offset + max(elements, 1) - 1) // length + 1)
            for offset, elements in zip(layout.offsets, layout.sizes, strict=True)
        ]
        self._waits_for = [0] * self._count
        for buckets in self._of_parameter:
            for bucket in buckets:
                self._waits_for[bucket] += 1
        self._overlapping = False
        self._missing: list[int] = []
        self._has_arrived: list[bool] = []
        self._pending = PendingCollectives()

    @contextlib.contextmanager
    def overlap(self, last: bool) -> Iterator[None]:
        """A context for one micro-batch. In the last one, complete buckets are sent."""
        self._missing = list(self._waits_for)
        self._has_arrived = [False] * len(self._of_parameter)
        self._overlapping = last
        try:
            yield
        finally:
            self._overlapping = False

    def arrived(self, index: int) -> None:
        """The gradient of this parameter is complete for the present micro-batch."""
        if not self._overlapping:
            return
        if self._has_arrived[index]:
            raise RuntimeError(
                f"the gradient of {self._names[index]} came twice in one micro-batch: by autograd "
                "and by hand, or twice by hand"
            )
        self._has_arrived[index] = True
        for bucket in self._of_parameter[index]:
            self._missing[bucket] -= 1
        while self._pending.started < self._count and not self._missing[self._pending.started]:
            self._send_next()

    def finish(self) -> None:
        """After the last backward pass, send the remaining buckets and wait for all."""
        while self._pending.started < self._count:
            self._send_next()
        self._pending.wait()

    def _send_next(self) -> None:
        self._pending.add(self._send(self._pending.started))
