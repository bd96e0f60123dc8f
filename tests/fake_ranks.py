"""One rank of many in this process, by PyTorch's fake process group, which sends nothing.

Rank 0 runs first. The other ranks are taken to do as this one does: a sum is this rank's value
times their number, and each of them sends what it sends. That is exact where their number is a
power of two. Rank 0 alone is known from its own run: its objects, and its part in the largest and
smallest value, which decides who has something to say.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from bert_pretraining.runtime import compat
from helpers import in_process


class Call(NamedTuple):
    """A collective. size: elements that this rank sends or receives; None for an object."""

    name: str
    size: int | None = None
    dtype: torch.dtype | None = None


class FakeRanks:
    """The exchanges of rank `rank` of `world`.

    main: rank 0, after the same run; None for rank 0 itself.

    Attributes:
        calls: the collectives so far.
        sent: the objects that this rank sent to all as rank 0.
        offered: its values in reductions to the largest and smallest one.
    """

    def __init__(self, rank: int, world: int, main: FakeRanks | None = None) -> None:
        assert (main is None) == (rank == 0)
        self.rank, self.world = rank, world
        self.calls: list[Call] = []
        self.sent: list[list] = []
        self.offered: list[Tensor] = []
        self._sent_by_main = iter(main.sent if main else [])
        self._offered_by_main = iter(main.offered if main else [])
        self._connect, self._work = dist.init_process_group, dist.all_reduce

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Meanwhile this process is that rank."""
        environment = {
            "RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.rank % 8,
            "MASTER_ADDR": "localhost", "MASTER_PORT": 29500,
        }  # fmt: skip
        with contextlib.ExitStack() as patched:
            words = {name: str(value) for name, value in environment.items()}
            patched.enter_context(mock.patch.dict("os.environ", words))
            for name in (
                "init_process_group", "all_reduce", "broadcast_object_list",
                "all_gather_object", "barrier",
            ):  # fmt: skip
                patched.enter_context(mock.patch.object(dist, name, getattr(self, name)))
            for name in ("all_gather", "reduce_scatter"):
                patched.enter_context(mock.patch.object(compat, name, getattr(self, name)))
            patched.enter_context(mock.patch.object(compat, "set_collective_timeout"))
            try:
                yield
            finally:
                if dist.is_initialized():  # after an error
                    dist.destroy_process_group()

    def init_process_group(self, backend: str, **_: object) -> None:
        """Connect to nobody."""
        assert backend == "gloo"
        self._connect("fake", store=FakeStore(), rank=self.rank, world_size=self.world)

    def all_reduce(
        self, values: Tensor, op: Any = dist.ReduceOp.SUM, async_op: bool = False
    ) -> dist.Work | None:
        """All other ranks have this one's values, but for rank 0 in the largest and smallest."""
        self._note("all_reduce", values)
        if op == dist.ReduceOp.SUM:
            values.mul_(self.world)
        else:
            self.offered.append(values.clone())
            combine = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum}[op]
            if self.rank != 0:
                values.copy_(combine(values, next(self._offered_by_main)))
        return self._work(torch.zeros(1), async_op=async_op)

    def reduce_scatter(self, piece: Tensor, values: Tensor, async_op: bool) -> dist.Work:
        """All ranks have the same values."""
        self._note("reduce_scatter", values)
        piece.copy_(values.view(self.world, -1)[self.rank] * self.world)
        return self._work(torch.zeros(1), async_op=async_op)

    def all_gather(self, values: Tensor, piece: Tensor, async_op: bool) -> dist.Work:
        """All ranks have the same piece."""
        self._note("all_gather", values)
        values.view(self.world, -1).copy_(piece.clone().view(1, -1))  # it may lie in values
        return self._work(torch.zeros(1), async_op=async_op)

    def broadcast_object_list(self, box: list, src: int) -> None:
        """Rank 0's objects are those of its own run."""
        assert src == 0
        self.calls.append(Call("broadcast_object_list"))
        if self.rank == 0:
            self.sent.append(copy.deepcopy(box))
        else:
            box[:] = next(self._sent_by_main)

    def all_gather_object(self, items: list, item: object) -> None:
        """All ranks have the same object."""
        self.calls.append(Call("all_gather_object"))
        items[:] = [item] * self.world

    def barrier(self) -> None:
        """Nobody is waited for."""
        self.calls.append(Call("barrier"))

    def _note(self, name: str, values: Tensor) -> None:
        self.calls.append(Call(name, values.numel(), values.dtype))

    def run(
        self, *words: object, cwd: Path, during: Callable[[], Any] = contextlib.nullcontext
    ) -> subprocess.CompletedProcess[str]:
        """`train` with these flags, as this rank; during: makes a context for it."""
        with self.here(), during():
            return in_process("train", *words, cwd=cwd)
