"""What each of thousands of ranks gets: samples, evaluation batches, a seed, a share of state."""

from __future__ import annotations

import collections
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.data import loader
from bert_pretraining.data.flat_shard import flatten
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader, load_evaluation_set
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.shards import list_shards, write_shard
from bert_pretraining.optim import OptimizerSettings, ShardedLamb
from bert_pretraining.optim.flat import BLOCK
from bert_pretraining.optim.flat_torch import TorchKernels
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.seeds import derive, worker_seed, worker_seeds
from fake_ranks import FakeRanks
from helpers import padded_arrays

# ---- the order of samples

UNEVEN = [1700, 1, 0, 2500, 812, 3]  # fewer shards than ranks
SINGLE = [1] * 2003  # shards of one row, fewer than 4,096 ranks


@pytest.mark.parametrize("sizes", [UNEVEN, SINGLE], ids=["uneven", "one row each"])
@pytest.mark.parametrize(
    ("world", "lanes"),
    [(64, 64), (1024, 1024), (4096, 4096), (4095, 4095), (777, 777), (333, 4096), (1, 4096)],
)
def test_each_sequence_comes_once_an_epoch_over_all_ranks(
    sizes: list[int], world: int, lanes: int
) -> None:
    """Also where there are more ranks than shards, and a run goes on with other ranks."""
    order, total = SampleOrder(sizes, seed=5, lanes=lanes), sum(sizes)
    for epoch in range(2):
        seen = np.zeros(total, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for rank in range(world):
            first = epoch * total
            samples = np.arange(first + (rank - first) % world, first + total, world)
            shard_of, row_of = order.locate(samples)
            np.add.at(seen, starts[shard_of] + row_of, 1)
        assert (seen == 1).all()


def test_what_a_rank_reads_next_is_known_among_thousands_of_lanes() -> None:
    order = SampleOrder([10] * 3000, seed=2, lanes=1000)
    # Three shards of a lane: after its first sequences, the others follow.
    for rank in (0, 500, 999):
        samples = np.arange(rank, 30_000, 1000)
        shards = order.locate(samples)[0]
        changes = np.flatnonzero(np.diff(shards)) + 1
        for start, change in zip([0, *changes], changes, strict=False):
            assert order.following_shards(samples[start : start + 1]) == [shards[change]]
    # A rank alone that goes on with a thousand lanes: one shard of each, in the order of lanes.
    ahead = order.following_shards(np.arange(1000))
    assert ahead == [order.following_shards(np.array([lane]))[0] for lane in range(1000)]


@pytest.mark.parametrize("batching", ["random", "balanced"])
def test_the_loaders_of_all_ranks_give_each_sequence_once(tmp_path: Path, batching: str) -> None:
    """The text of a sequence is its number. 25 ranks: an odd number, more than shards."""
    world, batch, rows = 25, 4, 500
    for number in range(5):
        arrays = padded_arrays([6] * rows, 8, 50)
        index = number * rows + np.arange(rows)
        arrays["input_ids"][:, 0], arrays["input_ids"][:, 1] = 5 + index // 50, 5 + index % 50
        arrays["masked_lm_positions"][:], arrays["masked_lm_ids"][:] = 2, 7
        write_shard(tmp_path / f"part_{number:05d}_of_00005.hdf5", arrays)
    shards = list_shards(tmp_path)
    order = SampleOrder([shard.num_sequences for shard in shards], 3, world)
    counts: collections.Counter[int] = collections.Counter()
    for rank in range(world):
        batches = iter(
            TrainingLoader(shards, order, LoaderConfig(batch, rank, world, 60, 8, batching))
        )
        for _ in range(5 * rows // world // batch):
            ids = next(batches).input_ids.view(batch, 6).long()
            counts.update(((ids[:, 0] - 5) * 50 + ids[:, 1] - 5).tolist())
        batches.close()
    assert counts == dict.fromkeys(range(5 * rows), 1)


@pytest.mark.parametrize("world", [64, 1024, 4096])
def test_ten_thousand_evaluation_sequences_come_once(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 625 batches of 16: of 4,096 ranks, most have none, and know how many there are in all."""
    arrays = padded_arrays([5] * 10_000, 8, 60)
    arrays["input_ids"][:, 0] = 5 + np.arange(10_000) // 200
    arrays["input_ids"][:, 1] = 5 + np.arange(10_000) % 200
    write_shard(tmp_path / "part_eval.hdf5", arrays)
    shard = flatten(arrays, 300, "test")
    monkeypatch.setattr(loader, "read_listed", lambda *_: shard)
    batches, texts = collections.Counter(), collections.Counter()
    infos = list_shards(tmp_path)
    for rank in range(world):
        found = load_evaluation_set(infos, 10_000, LoaderConfig(16, rank, world, 300, 8))
        assert found.num_batches == 625
        assert len(found.batches) in (625 // world, 625 // world + 1)
        for number, batch in found.batches:
            batches[number] += 1
            ids = batch.input_ids.view(-1, 5).long()
            texts.update(((ids[:, 0] - 5) * 200 + ids[:, 1] - 5).tolist())
    assert batches == dict.fromkeys(range(625), 1)
    assert texts == dict.fromkeys(range(10_000), 1)


# ---- seeds


@pytest.mark.parametrize("master", [0, 11, 349, 2**31 - 2])
def test_the_master_seed_reaches_every_rank_differently(master: int) -> None:
    seeds = [seed for one in (master, master + 1) for seed in worker_seeds(one, 4096)]
    assert len(set(seeds)) == 2 * 4096
    assert [worker_seed(master, rank) for rank in (0, 63, 4095)] == [
        seeds[rank] for rank in (0, 63, 4095)
    ]
    windows = {derive(master, "balance", rank, 4096, 0) for rank in range(4096)}
    assert len(windows) == 4096
    draws = set()
    for rank in range(0, 4096, 256):
        torch.manual_seed(worker_seed(master, rank))
        draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 16


def test_two_ranks_whose_hashes_are_equal_get_different_seeds() -> None:
    hashes = [derive(349, "worker", rank) for rank in range(4096)]
    assert hashes[3339] == hashes[4085]
    seeds = worker_seeds(349, 4096)
    assert seeds[:4085] == hashes[:4085]
    assert seeds[4085] == derive(349, "worker", 4085, 1)


# ---- the optimizer's state

SHAPES = {"word": (997, 128), "query": (128, 128), "bias": (128,), "one": (1,), "norm": (1500,)}


@functools.cache
def parameters() -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.full(shape, 0.5)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("bucket", [2**23, 16 * BLOCK])
@pytest.mark.parametrize("world", [64, 1024, 4096])
def test_a_rank_keeps_its_share_of_the_state(world: int, bucket: int) -> None:
    """Padding: less than a block a bucket and rank, also with more ranks than there are blocks."""
    needed = sum(-(-one.numel() // BLOCK) for one in parameters().values()) * BLOCK
    buckets = -(-needed // bucket)
    layouts = set()
    main = FakeRanks(0, world)
    others = (FakeRanks(rank, world, main) for rank in (world // 2, world - 1))
    for ranks in (main, *others):
        with ranks.here():
            process_group.start("cpu", "gloo")
            own = {name: nn.Parameter(one.detach().clone()) for name, one in parameters().items()}
            sharded = ShardedLamb(
                own.items(), OptimizerSettings(), kernels=TorchKernels(), bucket=bucket
            )
        shard = sharded.shard
        for part in (shard.master, shard.first, shard.second, shard.gradient):
            assert part.numel() * world == sharded.layout.length
        assert needed <= sharded.layout.length < needed + buckets * world * BLOCK
        if world * BLOCK > needed:
            assert shard.master.numel() == BLOCK
        layouts.add((sharded.layout.length, tuple(sharded.layout.offsets)))
    assert len(layouts) == 1
