"""Several ranks as threads of this process, which exchange real objects and numbers.

PyTorch tests its own collectives in this way. It takes milliseconds, where processes take seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg

Result = TypeVar("Result")


def as_ranks(count: int, work: Callable[[int], Result]) -> list[Result | Exception]:
    """What `work(rank)` returned or raised, as each of `count` ranks of one process group."""
    results: list[Result | Exception] = [RuntimeError("did not end")] * count
    store = dist.HashStore()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error
        finally:
            dist.destroy_process_group()

    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        multi_threaded_pg.ProcessLocalGroup.reset()
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        isolate(False)
    return results
