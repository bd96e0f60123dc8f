"""A capture that failed leaves neither its stream nor its memory behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from bert_pretraining.runtime import capture, compat
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.device_types import Graphs
from recorded_graphs import RECORDED, RecordedGraph

CUDA = torch.device("cuda", 1)  # nothing here touches it
POOL = (0, 7)


class Failed:
    """A graph whose capture the driver ended with an error, as PyTorch has it."""

    def pool(self) -> object:
        raise RuntimeError("pool() without a preceding successful capture")


def replace_allocator(
    monkeypatch: pytest.MonkeyPatch, end: str | None, is_recording: bool = True
) -> list[tuple]:
    """Stand-ins for the allocator's private functions; returns the list of their calls."""
    calls: list[tuple] = []

    def noted(name: str) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            calls.append((name, *arguments))
            if name == end and not is_recording:
                raise RuntimeError("not currently recording to mempool_id")

        return call

    for name in ("endAllocateToPool", "endAllocateCurrentStreamToPool", "releasePool"):
        monkeypatch.delattr(torch._C, f"_cuda_{name}", raising=False)
    for name in filter(None, (end, "releasePool")):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", noted(name), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", noted("clear"), raising=False)
    return calls


@pytest.mark.parametrize("is_recording", [True, False])
@pytest.mark.parametrize("end", ["endAllocateToPool", "endAllocateCurrentStreamToPool"])
def test_the_pool_of_a_failed_capture_is_released(
    monkeypatch: pytest.MonkeyPatch, end: str, is_recording: bool
) -> None:
    calls = replace_allocator(monkeypatch, end, is_recording)
    compat.release_failed_pool(1, Failed(), POOL)
    assert calls == [(end, 1, POOL), ("releasePool", 1, POOL)]


def test_a_graph_that_is_complete_releases_its_pool_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = replace_allocator(monkeypatch, "endAllocateToPool")
    compat.release_failed_pool(1, RecordedGraph(), POOL)
    assert calls == []


@contextlib.contextmanager
def ends_with_an_error(graph: Failed, **options: object) -> Iterator[None]:
    assert options == {"pool": POOL, "capture_error_mode": "thread_local"}
    yield
    raise RuntimeError("the capture was spoiled")


def fails() -> None:
    raise ValueError("the work failed")


@pytest.mark.parametrize(
    ("work", "error"), [(fails, ValueError), (lambda: None, RuntimeError)], ids=["work", "end"]
)
def test_stream_and_memory_are_as_before(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], error: type
) -> None:
    calls = replace_allocator(monkeypatch, "endAllocateToPool")
    monkeypatch.setattr(devices, "graphs", lambda _: Graphs(Failed, ends_with_an_error))
    monkeypatch.setattr(devices, "current_stream", lambda _: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(("set", stream)))
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    with pytest.raises(error):
        capture.captured(CUDA, work, POOL, beside_threads=True)
    assert calls == [
        ("clear",),
        ("set", "before"),
        ("endAllocateToPool", 1, POOL),
        ("releasePool", 1, POOL),
        ("clear",),
    ]


def test_a_graph_repeats_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "graphs", lambda _: RECORDED)
    given = torch.tensor([1.0, 2.0])
    graph, result = capture.captured(torch.device("cpu"), lambda: given * 3.0)
    given.add_(1.0)
    graph.replay()
    assert result.tolist() == [6.0, 9.0]


def test_captures_do_not_search_what_was_there_before() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ValueError, match="the work failed"), compat.cheap_captures():
        assert gc.get_freeze_count() > before + 1000
        fails()
    assert gc.get_freeze_count() == 0
