"""All ranks of a launched job finish together: they count themselves, and wait in the store."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch.distributed as dist

from bert_pretraining.runtime import process_group
from launching import wait_until


class Ranks:
    """Threads in the place of ranks, which wait for each other at a store of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
        self.store: dist.TCPStore | None = dist.TCPStore(
            "127.0.0.1", 0, None, True, wait_for_workers=False
        )
        for name, value in (
            *(("RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)),
            *(("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", self.store.port)),
        ):
            monkeypatch.setenv(name, str(value))
        self.messages: Counter[str] = Counter()
        self.threads: list[threading.Thread] = []
        counts, make = self.messages, dist.PrefixStore

        class CountingStore:
            def __init__(self, prefix: str, store: dist.Store) -> None:
                self._store = make(prefix, store)

            def __getattr__(self, name: str) -> object:
                if name not in ("timeout", "set_timeout"):  # these send nothing
                    counts[name] += 1
                return getattr(self._store, name)

        monkeypatch.setattr(dist, "PrefixStore", CountingStore)

    def finish(self, ranks: int) -> None:
        """So many ranks more call `wait_for_all_to_finish`."""
        started = [
            threading.Thread(target=process_group.wait_for_all_to_finish, daemon=True)
            for _ in range(ranks)
        ]
        for thread in started:
            thread.start()
        self.threads += started

    def until_waiting(self, ranks: int) -> None:
        wait_until(lambda: self.waits() == ranks, lambda: str(self.messages))

    def waits(self) -> int:
        """Messages that wait in the store; older PyTorch asks for the key's value."""
        return self.messages["wait"] + self.messages["get"]

    def until_ended(self) -> None:
        wait_until(
            lambda: not any(thread.is_alive() for thread in self.threads),
            lambda: f"{self.threads}, {self.messages}",
        )


@pytest.mark.parametrize("world_size", [2, 24])
def test_no_rank_ends_before_the_last_and_none_asks_again(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(monkeypatch, world_size)
    ranks.finish(world_size - 1)
    ranks.until_waiting(world_size - 1)
    assert all(thread.is_alive() for thread in ranks.threads)
    ranks.finish(1)
    ranks.until_ended()
    assert ranks.waits() == world_size
    assert ranks.messages["add"] == world_size
    assert ranks.messages["set"] == 1
    assert ranks.messages.total() == 2 * world_size + 1


def test_ranks_end_when_the_store_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3)
    ranks.finish(2)
    ranks.until_waiting(2)
    ranks.store = None
    ranks.until_ended()


def test_ranks_end_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    process_group.wait_for_all_to_finish(timedelta(milliseconds=10))
    assert ranks.waits() == 1
