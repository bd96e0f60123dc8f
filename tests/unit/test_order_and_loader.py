"""Order and loader: every sequence once an epoch, and a pure function of the sample number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bert_pretraining.data.balance import balance, window_of
from bert_pretraining.data.loader import LoaderConfig, TrainingLoader, load_evaluation_set
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.shards import list_shards, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from helpers import padded_arrays

SIZES = [[7, 5, 9, 4], [1], [3, 0, 10], [2] * 11, [50]]


def where(order: SampleOrder, samples: range) -> list[tuple[int, int]]:
    """(shard, row) of each sample, one at a time."""
    places = []
    for sample in samples:
        shard_of, row_of = order.locate(np.array([sample]))
        places.append((int(shard_of[0]), int(row_of[0])))
    return places


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_every_sequence_once_an_epoch(sizes: list[int], lanes: int) -> None:
    order = SampleOrder(sizes, seed=3, lanes=lanes)
    everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    total = len(everything)
    for epoch in range(3):
        places = where(order, range(epoch * total, (epoch + 1) * total))
        assert set(places) == everything
        assert len(places) == total


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = SampleOrder([20, 20], seed=3, lanes=2)
    first, second = where(order, range(40)), where(order, range(40, 80))
    assert first != second
    assert first == where(SampleOrder([20, 20], seed=3, lanes=2), range(40))
    assert first != where(SampleOrder([20, 20], seed=4, lanes=2), range(40))


@pytest.mark.parametrize("sizes", SIZES)
def test_located_together_is_located_one_by_one(sizes: list[int]) -> None:
    order = SampleOrder(sizes, seed=5, lanes=3)
    samples = np.arange(2 * sum(sizes) + 1)
    shard_of, row_of = order.locate(samples)
    together = list(zip(shard_of.tolist(), row_of.tolist(), strict=True))
    assert together == where(order, range(len(samples)))


def test_a_rank_reads_its_own_lanes_only() -> None:
    order = SampleOrder([10] * 8, seed=1, lanes=4)
    shards = [set(order.locate(np.arange(rank, 80, 4))[0].tolist()) for rank in range(4)]
    assert all(len(own) == 2 for own in shards)
    assert set.union(*shards) == set(range(8))


def test_following_shards_are_those_that_come_next() -> None:
    order = SampleOrder([4] * 6, seed=2, lanes=2)
    for rank in range(2):
        samples = np.arange(rank, 48, 2)
        for step in range(0, len(samples) - 4, 4):
            ahead = order.following_shards(samples[step : step + 1])
            shards = order.locate(samples)[0].tolist()
            later = [shard for shard in shards[step:] if shard != shards[step]]
            assert not later or ahead == later[:1]


def test_shard_ordinal_counts_shards_of_the_lane() -> None:
    order = SampleOrder([4] * 6, seed=2, lanes=2)
    assert [order.shard_ordinal(sample) for sample in range(0, 24, 2)] == [0] * 4 + [1] * 4 + [
        2
    ] * 4


def test_no_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        SampleOrder([0, 0], seed=1, lanes=1)


@pytest.fixture
def shard_dir(tmp_path: Path) -> Path:
    """Three shards of 5, 8 and 3 sequences whose first token numbers them 1000 on."""
    number = 1000
    for index, size in enumerate([5, 8, 3]):
        arrays = padded_arrays([9 + index] * size, 16, vocab_size=900, seed=index)
        arrays["input_ids"][:, 0] = np.arange(number, number + size)
        number += size
        write_shard(tmp_path / f"part_{index:05d}_of_00003.hdf5", arrays)
    return tmp_path


def take(
    directory: Path, rank: int, world_size: int, count: int, seen: int = 0, batching: str = "random"
) -> list:
    shards = list_shards(directory)
    order = SampleOrder([shard.num_sequences for shard in shards], seed=7, lanes=world_size)
    loader_config = LoaderConfig(3, rank, world_size, 2000, 16, batching, samples_seen=seen)
    batches = iter(TrainingLoader(shards, order, loader_config))
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def first_tokens(batches: list[PackedBatch]) -> list[int]:
    return [
        token
        for batch in batches
        for token in batch.input_ids[batch.cu_seqlens[:-1].long()].tolist()
    ]


@pytest.mark.parametrize("batching", ["random", "balanced"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_loader_gives_each_sequence_once_an_epoch(
    shard_dir: Path, world_size: int, batching: str
) -> None:
    steps = 16  # 16 * 3 * world_size samples: whole epochs of 16 sequences
    tokens = [
        token
        for rank in range(world_size)
        for token in first_tokens(take(shard_dir, rank, world_size, steps, batching=batching))
    ]
    counts = np.bincount(tokens, minlength=1016)[1000:]
    assert counts.tolist() == [3 * world_size] * 16


@pytest.mark.parametrize("batching", ["random", "balanced"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_loader_seeks_to_where_it_would_have_been(
    shard_dir: Path, world_size: int, batching: str
) -> None:
    all_batches = take(shard_dir, 0, world_size, 12, batching=batching)
    resumed = take(shard_dir, 0, world_size, 5, 7 * 3 * world_size, batching)
    for batch, again in zip(all_batches[7:], resumed, strict=True):
        assert batch.input_ids.tolist() == again.input_ids.tolist()
        assert batch.masked_positions.tolist() == again.masked_positions.tolist()


def in_sample_order(batches_of_ranks: list[list[PackedBatch]], seen: int) -> list[int]:
    """First tokens of all ranks' sequences, ordered by sample number from `seen` on."""
    world_size = len(batches_of_ranks)
    streams = [iter(first_tokens(batches)) for batches in batches_of_ranks]
    count = sum(batch.num_sequences for batches in batches_of_ranks for batch in batches)
    return [next(streams[sample % world_size]) for sample in range(seen, seen + count)]


def expected_first_tokens(order: SampleOrder, samples: range) -> list[int]:
    """First tokens of these samples, of shards numbered as in shard_dir."""
    shard_of, row_of = order.locate(np.array(samples))
    first_numbers = 1000 + np.cumsum(order.shard_sizes) - order.shard_sizes
    return (first_numbers[shard_of] + row_of).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seen", [0, 1, 2, 7, 16, 29, 101])
def test_any_number_of_ranks_goes_on_with_the_next_sample(
    shard_dir: Path, seen: int, world_size: int
) -> None:
    order = SampleOrder([5, 8, 3], seed=7, lanes=world_size)
    ranks = [take(shard_dir, rank, world_size, 4, seen) for rank in range(world_size)]
    samples = range(seen, seen + 4 * 3 * world_size)
    assert in_sample_order(ranks, seen) == expected_first_tokens(order, samples)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_balanced_batches_go_on_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr("bert_pretraining.data.loader.BALANCE_WINDOW", 4)
    arrays = padded_arrays([9] * 200, 16, vocab_size=900)
    arrays["input_ids"][:, 0] = np.arange(1000, 1200)
    write_shard(tmp_path / "part_0.hdf5", arrays)
    order = SampleOrder([200], seed=7, lanes=world_size)
    per_step = 3 * world_size
    for seen in range(per_step):
        ranks = [
            take(tmp_path, rank, world_size, 12, seen, "balanced") for rank in range(world_size)
        ]
        for batches in (slice(0, 4), slice(4, 12)):  # whole windows
            found = first_tokens([batch for rank in ranks for batch in rank[batches]])
            samples = range(seen + batches.start * per_step, seen + batches.stop * per_step)
            assert sorted(found) == sorted(expected_first_tokens(order, samples)), seen
        # Going on within a window, with the same ranks, changes nothing.
        later = take(tmp_path, 0, world_size, 5, seen + 7 * per_step, "balanced")
        assert first_tokens(later) == first_tokens(ranks[0][7:]), seen


def test_seeking_reads_nothing_before_it(tmp_path: Path) -> None:
    for index in range(4):
        write_shard(tmp_path / f"part_{index}.hdf5", padded_arrays([9] * 50, 16, 900))
    shards = list_shards(tmp_path)
    order = SampleOrder([50] * 4, seed=7, lanes=1)
    first = order.locate(np.arange(1))[0].item()
    assert first not in order.locate(np.arange(60, 200))[0]
    shards[first].path.write_bytes(b"gone bad")
    batches = iter(TrainingLoader(shards, order, LoaderConfig(2, 0, 1, 2000, 16, samples_seen=60)))
    assert next(batches).num_sequences == 2
    batches.close()


@pytest.mark.parametrize("fault", ["truncated", "vanished", "wrong ids"])
def test_a_bad_shard_ends_the_loader_with_its_name(shard_dir: Path, fault: str) -> None:
    shards = list_shards(shard_dir)
    path = shards[1].path
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif fault == "vanished":
        path.unlink()
    else:
        write_shard(path, padded_arrays([9] * 8, 16, vocab_size=30000))
    order = SampleOrder([shard.num_sequences for shard in shards], seed=7, lanes=1)
    batches = iter(TrainingLoader(shards, order, LoaderConfig(3, 0, 1, 2000, 16)))
    with pytest.raises(UserError, match=path.name):
        for _ in range(20):
            next(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_batches_are_the_same_at_any_world_size(
    shard_dir: Path, world_size: int
) -> None:
    count, everything = load_evaluation_set(
        list_shards(shard_dir), 14, LoaderConfig(4, 0, 1, 2000, 16)
    )
    dealt = {}
    for rank in range(world_size):
        loader_config = LoaderConfig(4, rank, world_size, 2000, 16)
        total, mine = load_evaluation_set(list_shards(shard_dir), 14, loader_config)
        assert total == count
        dealt.update(mine)
    assert sum(batch.num_sequences for batch in dealt.values()) == 14
    for number, batch in everything:
        assert dealt[number].input_ids.tolist() == batch.input_ids.tolist()


def test_a_sequence_longer_than_the_model_takes(shard_dir: Path) -> None:
    shards = list_shards(shard_dir)
    order = SampleOrder([shard.num_sequences for shard in shards], seed=7, lanes=1)
    batches = iter(TrainingLoader(shards, order, LoaderConfig(16, 0, 1, 2000, max_seq_length=10)))
    with pytest.raises(UserError, match="a sequence of 11 tokens"):
        next(batches)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (4, 4), (64, 8), (48 * 41, 48), (30, 1)])
def test_balancing_uses_each_sequence_once(count: int, batch_size: int) -> None:
    lengths = np.random.RandomState(1).randint(1, 513, count)
    batches = balance(lengths, batch_size, np.random.RandomState(2))
    assert batches.shape == (count // batch_size, batch_size)
    assert sorted(batches.flatten().tolist()) == list(range(count))


def test_balanced_batches_are_level_and_random() -> None:
    lengths = np.random.RandomState(1).randint(20, 513, 48 * 256)
    batches = balance(lengths, 48, np.random.RandomState(2))
    totals = lengths[batches].sum(axis=1)
    plain = lengths.reshape(-1, 48).sum(axis=1)
    assert np.ptp(totals) <= 0.005 * totals.mean()
    assert np.ptp(plain) > 0.2 * plain.mean()
    again = balance(lengths, 48, np.random.RandomState(2))
    assert np.array_equal(batches, again)
    other = balance(lengths, 48, np.random.RandomState(3))
    together = {frozenset(batch.tolist()) for batch in batches}
    assert not together & {frozenset(batch.tolist()) for batch in other}


def test_windows_tile_an_epoch_and_never_span_two() -> None:
    # 10 samples an epoch, batches of 3: batch 3 holds samples 9, 10, 11 of two epochs
    windows = [window_of(number, 3, 0, (0, 10), 2) for number in range(4)]
    assert windows == [range(0, 2), range(0, 2), range(2, 3), range(3, 4)]
    assert window_of(4, 3, 0, (10, 20), 2) == range(4, 6)
    assert window_of(6, 3, 0, (10, 20), 2) == range(6, 7)


def test_balanced_batches_of_a_rank_are_level(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for index in range(3):
        arrays = padded_arrays(random.randint(2, 65, 200).tolist(), 64, 900, seed=index)
        write_shard(tmp_path / f"part_{index}.hdf5", arrays)
    shards = list_shards(tmp_path)
    order = SampleOrder([200, 200, 200], seed=1, lanes=2)
    spreads = {}
    for batching in ("random", "balanced"):
        batches = iter(TrainingLoader(shards, order, LoaderConfig(10, 1, 2, 900, 64, batching)))
        totals = [next(batches).num_tokens for _ in range(30)]
        batches.close()
        spreads[batching] = np.ptp(totals)
    assert spreads["balanced"] < 0.1 * spreads["random"]


def test_balancing_in_slices_is_balancing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.RandomState(1).randint(20, 513, 9 * 64)
    at_once = balance(lengths, 9, np.random.RandomState(2))
    monkeypatch.setattr("bert_pretraining.data.balance.SWAPS_AT_ONCE", 1)
    assert np.array_equal(balance(lengths, 9, np.random.RandomState(2)), at_once)
