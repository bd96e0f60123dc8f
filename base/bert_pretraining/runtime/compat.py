"""Differences between the versions of PyTorch that the package runs on, 2.4 to the newest.

Differences between versions of Triton's language are in kernels/triton_common.py, since only
kernels see them.

Each entry names the version from which on it is not needed. When that version is the oldest one
supported, delete the entry. No other module asks for a version.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import re
import time
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from bert_pretraining.runtime import packages


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "2.4.1+corex.4.3.0" -> (2, 4)."""
    return packages.release(version)[:2]


TORCH = release(torch.__version__)

# Before 2.13 these two have other names, and 2.13 warns of the old ones.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Before 2.14 there is no public function for it, and 2.14 warns of the private one.
set_collective_timeout: Callable[[timedelta], None] = (
    getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
)


def custom_op(name: str, random: bool = False) -> Callable[[Callable], torch.library.CustomOpDef]:
    """torch.library.custom_op for a function that changes none of its arguments.

    random: the operator draws random numbers from the generator. torch.compile must then restore
        the generator's state before it computes the operator again.

    Before 2.5, torch infers no schema from annotations that are strings, as they are in modules
    with `from __future__ import annotations`. Before 2.8, custom_op takes no tags.
    """

    def define(function: Callable) -> torch.library.CustomOpDef:
        if TORCH < (2, 5):
            function.__annotations__ = typing.get_type_hints(function)
        if not random:
            return torch.library.custom_op(name, function, mutates_args=())
        tags = (torch.Tag.nondeterministic_seeded,)
        if TORCH >= (2, 8):
            return torch.library.custom_op(name, function, mutates_args=(), tags=tags)
        with _tags_added(tags):
            return torch.library.custom_op(name, function, mutates_args=())

    return define


@contextlib.contextmanager
def _tags_added(tags: tuple[torch.Tag, ...]) -> Iterator[None]:
    """Operators that are defined meanwhile get these tags too."""
    define = torch.library.Library.define

    def define_with_tags(
        library: torch.library.Library, schema: str, *arguments: typing.Any, **options: typing.Any
    ) -> object:
        options["tags"] = [*options.get("tags", ()), *tags]
        return define(library, schema, *arguments, **options)

    with _replaced(torch.library.Library, "define", define_with_tags):
        yield


def scaled_mm(left: torch.Tensor, right: torch.Tensor, **options: typing.Any) -> torch.Tensor:
    """torch._scaled_mm: the product of two fp8 matrices.

    Before 2.5 it returns the result's largest number too. There is no public function for it
    before 2.10.
    """
    product = torch._scaled_mm(left, right, **options)
    return product[0] if isinstance(product, tuple) else product


def add_wide_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target += left right, for a float32 target and 16-bit factors; the sum is not rounded.

    CUDA devices do it in one kernel, for which early versions have no function. Elsewhere the
    product is rounded to 16 bits before it is added.
    """
    add = getattr(torch.ops.aten.addmm, "dtype_out", None)
    if add is not None and target.is_cuda:
        add(target, left, right, target.dtype, out=target)
    else:
        target.add_(torch.mm(left, right))


def release_failed_pool(index: int, graph: typing.Any, pool: object) -> None:
    """Give up the share in a memory pool that a CUDA graph has whose capture failed.

    index: of the device. graph: it was captured with this pool. Of a capture that the driver ended
    with an error, every version to 2.13 keeps the pool for ever, and all tensors that were made in
    it. There are only private functions for it; one of them got another name after 2.4.
    """
    try:
        graph.pool()
    except RuntimeError:  # the graph is not complete, so that its end will not release the pool
        pass
    else:
        return
    for name in ("endAllocateToPool", "endAllocateCurrentStreamToPool", "releasePool"):
        release = getattr(torch._C, f"_cuda_{name}", None)
        if release is not None:
            # Each raises where the capture failed before or after the step that it undoes.
            with contextlib.suppress(RuntimeError):
                release(index, pool)


def free_product_workspaces() -> None:
    """Free the working memory of cuBLAS, 32 MiB a stream on Hopper; it is made again when needed.

    There is no public function for it, and none at all in a PyTorch without CUDA.
    """
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if free is not None:
        free()


@contextlib.contextmanager
def cheap_captures() -> Iterator[None]:
    """Captures of CUDA graphs look for garbage only among what was made meanwhile.

    2.4 looks through all objects of Python before each capture, which takes 0.15 s; 2.11 does not.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def compile_once_for_equal_modules() -> None:
    """torch.compile makes one program for all modules of one class, not one for each.

    Before 2.5 this has to be switched on.
    """
    if TORCH < (2, 5):
        torch._dynamo.config.inline_inbuilt_nn_modules = True


def called_functions(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """The functions that a file of torch.save would call; [] where they are not known.

    error: torch.load's, when it refused the file. Before 2.6 only this error names one of them.
    """
    if TORCH < (2, 6):
        return re.findall(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive, or a cut one, which the caller reports anyway
        return []


def detail_breaks_ddp() -> bool:
    """Whether DistributedDataParallel crashes under TORCH_DISTRIBUTED_DEBUG=DETAIL.

    2.13.0 ends by a segmentation fault in the first backward pass, with one rank too; 2.4.1 does
    not. The versions between have not been tried.
    """
    return TORCH >= (2, 13)


def let_gloo_finish() -> None:
    """Give gloo's threads time to free their tensors before the process group is destroyed.

    The destructor waits for these threads while it holds Python's lock, which they need to free a
    tensor. In 2.4.1 three exits of eighteen hung under load, and none of twelve with this. Which
    version has mended it is not known; 2.11 and later have not shown it.
    """
    if TORCH < (2, 11):
        time.sleep(0.2)  # without the lock


@contextlib.contextmanager
def torchrun_without_signal_handlers() -> Iterator[None]:
    """torchrun's agent sets no signal handlers meanwhile.

    Before 2.5 it sets them on every thread, and Python allows that on the main thread only.
    """
    if TORCH >= (2, 5):
        yield
        return
    from torch.distributed.elastic.multiprocessing import api

    names = [name for name in dir(api.signal) if name.startswith("SIG") or name == "Signals"]
    constants = {name: getattr(api.signal, name) for name in names}
    with _replaced(api, "signal", SimpleNamespace(signal=lambda *_: None, **constants)):
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
