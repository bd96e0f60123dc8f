"""Named ranges around the parts of a step, for the profiler that watches; without one, nothing.

`range_of` is called a few times in every step. `use` says what it makes: ranges of torch.profiler,
ranges of an outside profiler such as Nsight Systems, or nothing, which costs a call and no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

# Name -> a context that marks what is done in it.
Maker = Callable[[str], contextlib.AbstractContextManager[object]]

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _nothing(_: str) -> contextlib.AbstractContextManager[object]:
    return _NOTHING


_make: Maker = _nothing


def use(maker: Maker | None) -> None:
    """From now on, `range_of` makes ranges with this maker; None: it marks nothing."""
    global _make
    _make = maker or _nothing


def range_of(name: str) -> contextlib.AbstractContextManager[object]:
    """A context; the profiler that watches shows what is done in it under this name."""
    return _make(name)
