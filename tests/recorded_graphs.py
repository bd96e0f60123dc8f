"""A CPU's stand-in for CUDA graphs: operators are recorded, and run again into the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_pretraining.runtime.device_types import Graphs


class RecordedGraph:
    """What `captured` fills. replays: how often it was replayed so far."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, arguments, options, results in self.calls:
                again = tree_leaves(function(*arguments, **options))
                for old, new in zip(tree_leaves(results), again, strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)

    def pool(self) -> object:
        return self


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        results = function(*args, **(kwargs or {}))
        self._graph.calls.append((function, args, kwargs or {}, results))
        return results


@contextlib.contextmanager
def _capture(graph: RecordedGraph, pool: object = None) -> Iterator[None]:
    with _Recorder(graph):
        yield


RECORDED = Graphs(RecordedGraph, _capture)
