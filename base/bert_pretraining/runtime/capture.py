"""Capturing a device's work as a graph, and what a capture that failed must not leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.device_types import Graph, function_of, module_of

Result = TypeVar("Result")


def captured(
    device: torch.device,
    work: Callable[[], Result],
    pool: object = None,
    beside_threads: bool = False,
) -> tuple[Graph, Result]:
    """The graph of what `work` gives the device, and what `work` returned; nothing is computed yet.

    The same work must have run before, on another stream: what is loaded or tuned when a kernel
    runs first cannot be captured. Only for a device with `devices.graphs`.

    pool: the memory pool of another graph, whose memory the work may use too. The graphs must never
        run at the same time. What one has left there is lost when the other one runs.
    beside_threads: other threads may call the device's functions meanwhile, to allocate memory for
        example, as far as the device allows that.

    Raises what the work or the end of the capture raises. The device can then be used as before,
    and `devices.free_unused_memory` gives back the capture's memory, once the error is dropped.
    """
    graphs, on_cuda = devices.graphs(device), devices.is_cuda(device)
    if on_cuda:
        # Matrix products keep working memory for each stream that they ran on. A warm-up's stream
        # is not used again.
        compat.free_product_workspaces()
    if pool is None:
        make_pool = function_of(device.type, "graph_pool_handle")
        pool = make_pool() if make_pool is not None else None
    options: dict[str, Any] = {} if pool is None else {"pool": pool}
    if beside_threads and on_cuda:
        options["capture_error_mode"] = "thread_local"
    stream = devices.current_stream(device)
    graph = graphs.create()
    try:
        with graphs.capture(graph, **options):
            result = work()
    except BaseException:
        _end(device, stream)
        if on_cuda:
            compat.release_failed_pool(_index(device), graph, pool)
            compat.free_product_workspaces()  # what is in the capture's pool would keep all of it
        raise
    return graph, result


def _index(device: torch.device) -> int:
    return function_of(device.type, "current_device")() if device.index is None else device.index


def _end(device: torch.device, stream: Any) -> None:
    """Let the device work on after a capture that failed.

    PyTorch leaves the capture's stream as the current one; stream: the one before. Its generator
    would go on to refuse random numbers outside of a graph. A copy of its state does not.
    """
    select = function_of(device.type, "set_stream")
    if select is not None and stream is not None:
        select(stream)
    generators = getattr(module_of(device.type), "default_generators", ())
    for generator in generators[device.index or 0 :][:1]:
        generator.graphsafe_set_state(generator.clone_state())
