"""The model of the step: closed forms by hand numbers, limits, and what holds for any input."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from bert_pretraining.bench.optimizer import shapes_of
from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.config import Config
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import OptimizerSettings, ShardedLamb, create_optimizer
from bert_pretraining.optim.flat_torch import TorchKernels
from bert_pretraining.qualify.published import rows
from bert_pretraining.runtime import process_group
from bert_pretraining.scaling import collectives, known_devices
from bert_pretraining.scaling.collectives import Link, Network
from bert_pretraining.scaling.forecast import (
    Problem,
    by_batch,
    by_ranks,
    counts_of,
    evaluation_seconds,
    limit_of,
)
from bert_pretraining.scaling.messages import Memory, Messages, memory_of, messages_of
from bert_pretraining.scaling.rank_parts import RankParts, Sourced, fit
from bert_pretraining.scaling.step import (
    IN_MACHINE,
    REPLICATED,
    SHARDED,
    Asked,
    exposed_seconds,
    releases,
    step_of,
)
from bert_pretraining.scaling.stragglers import expected_maximum
from bert_pretraining.scaling.training_run import Targets, run_of
from fake_ranks import FakeRanks

MODEL = BertConfig(100, 64, 2, 2, 128, 64)
# One machine of 4: 100 bytes/s and 1 s a hop. Between machines: 10 bytes/s and 3 s a hop.
NETWORK = Network(Link(100.0, 1.0), Link(10.0, 3.0), 4)
KINDS = [collectives.ring, collectives.tree, collectives.hierarchical, collectives.in_network]


def parts(fixed: float = 1.0, sequence: float = 0.5, **others: float) -> RankParts:
    values = {"optimizer": 2.0, "host": 0.0, "evaluation": 0.1, **others}
    named = {name: Sourced(value, "a test") for name, value in values.items()}
    return RankParts(
        fixed=Sourced(fixed, "a test"), sequence=Sourced(sequence, "a test"), activation=None,
        has_fixed=True, **named,
    )  # fmt: skip


def messages(*sizes: float, overlaps: bool = True) -> Messages:
    return Messages(100, sizes, float(sum(sizes)), overlaps)


@pytest.mark.parametrize(
    ("kind", "ranks", "latency", "transfer"),
    [
        (collectives.ring, 2, 2 * 1, 800 / 100),  # 2 (N-1)/N = 1
        (collectives.ring, 4, 6 * 1, 1.5 * 800 / 100),
        # 2 machines: of the 7 hops each way, 2 are between; four outer links of 10 give 40.
        (collectives.ring, 8, 2 * (2 * 3 + 5 * 1), 1.75 * 800 / 40),
        (collectives.tree, 4, 2 * 3 * 1, 2 * 800 / 100),
        (collectives.tree, 16, 2 * (3 * 1 + 2 * 3), 2 * 800 / 40),
        # Inside 3/4 of 800 at 100, twice; between 4 machines 200 bytes at 10 as a ring: 6 hops of
        # 3 and 1.5 x 20; as a tree: 4 hops of 3 and 2 x 20. The ring is faster: 48 against 52.
        (collectives.hierarchical, 16, 2 * 3 * 1 + 6 * 3, 2 * 6 + 1.5 * 200 / 10),
        (collectives.in_network, 4, 2 * 1, 5 / 4 * 800 / 100),
        (collectives.in_network, 8, 2 * 1 + 2 * 3, 9 / 8 * 800 / 40),
        (collectives.reduce_scatter, 4, 3 * 1, 0.75 * 800 / 100),
    ],
)
def test_costs_by_hand(kind: object, ranks: int, latency: float, transfer: float) -> None:
    cost = kind(800.0, ranks, NETWORK)
    assert cost.latency == pytest.approx(latency)
    assert cost.transfer == pytest.approx(transfer)


def test_groups_inside_of_a_machine() -> None:
    network = replace(NETWORK, group=2)
    # Inside 1/2 of 800 at 100, twice; between the 2 groups of a machine 400 bytes as a ring.
    cost = collectives.hierarchical(800.0, 4, network)
    assert (cost.latency, cost.transfer) == (pytest.approx(2 * 1 + 2 * 1), pytest.approx(2 * 4 + 4))
    # 4 groups on 2 machines: 2 of the 3 hops are between, over two links of 10 at once.
    outer = collectives.outer(800.0, 8, network)
    assert outer == collectives.ring(400.0, 4, replace(NETWORK, machine=2))
    assert outer.transfer == pytest.approx(1.5 * 400 / 20)
    asked = Asked(parts(), network, "hierarchical", IN_MACHINE)
    assert step_of(asked, messages(800.0), 8, batch=4).optimizer == 2.0 / 2


def test_machines_of_one_rank_have_no_inner_link() -> None:
    network = replace(NETWORK, machine=1)
    assert collectives.ring(800.0, 2, network).seconds == pytest.approx(2 * 3 + 800 / 10)
    assert collectives.hierarchical(800.0, 2, network) == collectives.ring(800.0, 2, network)


def test_auto_takes_the_faster_one() -> None:
    for size, name in ((1.0, "tree"), (1e6, "ring")):
        cost = collectives.all_reduce("auto", size, 16, NETWORK)
        assert cost == collectives.all_reduce(name, size, 16, NETWORK)
        assert cost.seconds < collectives.all_reduce(
            {"tree": "ring", "ring": "tree"}[name], size, 16, NETWORK
        ).seconds  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_exchange(kind: object) -> None:
    draw = random.Random(3)
    for _ in range(200):
        network = Network(
            Link(10 ** draw.uniform(8, 12), 10 ** draw.uniform(-7, -4)),
            Link(10 ** draw.uniform(7, 11), 10 ** draw.uniform(-6, -3)),
            draw.choice([1, 4, 8, 64]),
        )
        size, ranks = 10 ** draw.uniform(0, 10), draw.randrange(2, 5000)
        cost = kind(size, ranks, network)
        assert cost.latency > 0 and cost.transfer > 0
        assert kind(size, 1, network).seconds == 0.0
        assert kind(2 * size, ranks, network).seconds >= cost.seconds
        faster = replace(network, inside=Link(1e15, 0.0), between=Link(1e15, 0.0))
        assert kind(size, ranks, faster).seconds <= cost.seconds
        # A tree sends no fewer bytes than the ring; in the network, a rank sends all it has.
        slack = 1 + 1e-9
        if kind is collectives.tree:
            assert cost.transfer * slack >= collectives.ring(size, ranks, network).transfer
        if kind is collectives.in_network:
            assert cost.transfer * slack >= size / max(
                network.inside.bandwidth, network.machine * network.between.bandwidth
            )


def test_messages_by_the_layout_of_bert_large() -> None:
    plain = messages_of(Config(precision="bf16"), BERT_LARGE, 8)
    assert plain.parameters == 336_232_258
    assert len(plain.gradients) == 41
    assert max(plain.gradients) == 2 * 2**23
    assert 2 * plain.parameters <= plain.bytes < 1.001 * 2 * plain.parameters
    single = messages_of(Config(precision="bf16", gradient_dtype="fp32"), MODEL, 8)
    assert single.bytes == 2 * messages_of(Config(precision="bf16"), MODEL, 8).bytes
    late = Config(precision="bf16", optimizer="adamw", clip_gradients="before_reduction")
    one_by_one = messages_of(late, MODEL, 8)
    shapes = shapes_of(MODEL).values()
    assert one_by_one.gradients == tuple(2.0 * shape.numel() for shape in shapes)
    assert not one_by_one.overlaps
    sharded = messages_of(Config(precision="bf16", distributed_lamb=True), BERT_LARGE, 1024)
    assert len(set(sharded.gradients)) == 1
    assert sharded.gradients[0] / 2 % (1024 * 1024) == 0


@pytest.mark.parametrize("world", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_update_sends_and_holds_what_the_plan_says(
    world: int, dtype: torch.dtype
) -> None:
    """Beside an update of the real optimizer, as rank 0 of many."""
    ranks = FakeRanks(0, world)
    with ranks.here():
        process_group.start("cpu", "gloo")
        ones = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes_of(MODEL).items()}
        named = [(name, nn.Parameter(one)) for name, one in ones.items()]
        optimizer = ShardedLamb(named, OptimizerSettings(), kernels=TorchKernels())
        ranks.calls.clear()
        optimizer.zero_grad()
        optimizer.finish_reduction()
        optimizer.step(0.1)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = Config(precision=precision, distributed_lamb=True)
    found = messages_of(config, MODEL, world)
    sent = {
        name: [one.size * one.dtype.itemsize for one in ranks.calls if one.name == name]
        for name in ("reduce_scatter", "all_gather")
    }
    assert sent["reduce_scatter"] == list(found.gradients)
    count = len(found.gradients)
    assert sent["all_gather"] == [*found.sums, *[found.weights / count] * count]
    assert len(ranks.calls) == 2 * count + 2
    shard = optimizer.shard
    tensors = [optimizer.sink.flat, shard.master, shard.first, shard.second, shard.gradient]
    tensors += [] if shard.rounded is None else [shard.rounded]
    held = sum(one.numel() * one.element_size() for one in tensors)
    held += optimizer.layout.length * dtype.itemsize
    assert memory_of(config, found, world).total == held


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_memory_is_that_of_the_optimizer(precision: str, dtype: torch.dtype) -> None:
    """Beside the real one: weights, gradient and state of flat LAMB."""
    named = [("a", nn.Parameter(torch.ones(5000, dtype=dtype))), ("b", nn.Parameter(torch.ones(7)))]
    named[1] = ("b", nn.Parameter(torch.ones(7, dtype=dtype)))
    optimizer = create_optimizer("flat", named, OptimizerSettings())
    shard = optimizer.shard
    tensors = [shard.master, shard.first, shard.second, shard.gradient]
    tensors += [] if shard.rounded is None else [shard.rounded]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    weights = float(optimizer.layout.length * dtype.itemsize)
    found = memory_of(Config(precision=precision), Messages(5007, (weights,), weights, True), 8)
    assert found.total == real


def test_a_sharded_state_falls_with_the_ranks() -> None:
    config = Config(precision="bf16", distributed_lamb=True)
    sent = messages(1000.0)
    one, eight, many = (memory_of(config, sent, ranks) for ranks in (1, 8, 8000))
    assert one.total == 1000 + 1000 + 500 * 12
    # The part of gradient and new weights, beside the state of 12 bytes.
    assert eight.total == 1000 + 1000 + 500 * 16 / 8
    assert many.total == pytest.approx(2000, rel=0.01)


def test_what_backward_hides() -> None:
    # Complete at 1, 2, 3 and 4 s; each takes 0.5 s: only the last one is seen.
    assert exposed_seconds([0.5] * 4, [1.0, 2.0, 3.0, 4.0], 4.0) == 0.5
    # Each takes 2 s: 1..3, 3..5, 5..7, 7..9, backward ends at 4.
    assert exposed_seconds([2.0] * 4, [1.0, 2.0, 3.0, 4.0], 4.0) == 5.0
    assert releases(messages(10.0, 30.0), 8.0) == [2.0, 8.0]
    assert releases(messages(10.0, 30.0, overlaps=False), 8.0) == [8.0, 8.0]


def test_a_step_by_hand() -> None:
    asked = Asked(parts(), NETWORK, "ring", accumulation=3)
    step = step_of(asked, messages(200.0, overlaps=False), 4, batch=4)
    assert step.compute == 3 * (1.0 + 0.5 * 4)
    assert step.exposed == pytest.approx(6 * 1 + 1.5 * 200 / 100)
    assert (step.optimizer, step.publish, step.hidden) == (2.0, 0.0, 0.0)
    assert step.seconds == pytest.approx(9 + 9 + 2)
    sharded = step_of(replace(asked, sharing=SHARDED), messages(200.0, overlaps=False), 4, batch=4)
    assert sharded.exposed == pytest.approx(3 * 1 + 0.75 * 200 / 100)
    assert sharded.publish == pytest.approx(sharded.exposed)
    assert sharded.optimizer == 0.5
    norms = replace(messages(200.0, overlaps=False), sums=(40.0, 80.0))
    with_norms = step_of(replace(asked, sharing=SHARDED), norms, 4, batch=4)
    assert with_norms.publish == pytest.approx(sharded.publish + 2 * 3 * 1 + 0.75 * 120 / 100)
    machines = step_of(replace(asked, sharing=IN_MACHINE), messages(200.0), 8, batch=4)
    assert machines.optimizer == 0.5
    assert machines.publish == pytest.approx(3 * 1 + 0.75 * 200 / 100)


def test_a_slow_host_sets_the_pace() -> None:
    step = step_of(Asked(parts(host=7.0), NETWORK), messages(1.0), 1, batch=4)
    assert (step.compute, step.is_host_bound) == (7.0, True)


@pytest.mark.parametrize("sharing", [REPLICATED, SHARDED, IN_MACHINE])
@pytest.mark.parametrize("exchange", collectives.EXCHANGES)
def test_one_rank_exchanges_nothing_and_a_perfect_network_scales(
    sharing: str, exchange: str
) -> None:
    asked = Asked(parts(optimizer=0.0), NETWORK, exchange, sharing)
    alone = step_of(asked, messages(1e3, 1e3), 1, 4)
    assert alone.exposed == alone.publish == alone.hidden == alone.latency == 0.0
    perfect = Network(Link(math.inf, 0.0), Link(math.inf, 0.0), 8)
    many = step_of(replace(asked, network=perfect), messages(1e3, 1e3), 4096, 4)
    assert many.seconds == pytest.approx(alone.seconds)


def test_the_expected_slowest_of_many() -> None:
    """The values of published tables of normal order statistics."""
    known = {1: 0.0, 2: 0.56419, 3: 0.84628, 4: 1.02938, 10: 1.53875, 100: 2.50759, 1000: 3.24144}
    for count, value in known.items():
        assert expected_maximum(count) == pytest.approx(value, abs=5e-6)
    assert expected_maximum(65_536) == pytest.approx(4.2911, abs=1e-4)


def test_all_ranks_wait_for_the_slowest() -> None:
    asked = Asked(parts(), NETWORK, "ring", accumulation=3)
    sent = messages(200.0)
    equal = step_of(asked, sent, 4, batch=4)
    uneven = step_of(replace(asked, spread=0.02), sent, 4, batch=4)
    assert equal.waiting == 0.0
    assert uneven.waiting == pytest.approx(9.0 * 0.02 * 1.02938, rel=1e-5)
    assert uneven.seconds == pytest.approx(equal.seconds + uneven.waiting)
    assert step_of(replace(asked, spread=0.02), sent, 1, batch=4).waiting == 0.0


def test_published_results_have_the_wait_in_them_already() -> None:
    sent = known_devices.submitted_messages()
    for name in known_devices.names():
        used = known_devices.one_machine(name)
        asked = known_devices.calibrated(name, used, spread=0.03)
        for row in used:
            step = step_of(asked, sent, row.devices, row.device_batch_size)
            assert step.waiting > 0.02 * step.compute
            assert row.device_batch_size / step.seconds == pytest.approx(
                row.sequences_per_second, rel=1e-3
            )


def test_the_line_through_the_times() -> None:
    exact = fit({8: 1.0 + 0.5 * 8, 32: 1.0 + 0.5 * 32, 64: 1.0 + 0.5 * 64})
    assert (exact.fixed, exact.sequence) == (pytest.approx(1.0), pytest.approx(0.5))
    assert exact.has_fixed and exact.error < 1e-9
    one = fit({10: 5.0})
    assert (one.fixed, one.sequence, one.has_fixed) == (0.0, 0.5, False)
    below = fit({1: 1.0, 2: 4.0})  # a line through both would begin at -2
    assert below.fixed == 0.0 and 1.0 < below.sequence < 2.0


def problem(network: Network = NETWORK, sizes: tuple[int, ...] = (), batch: int = 8) -> Problem:
    class Known(Targets):
        def samples(self, global_batch_size: int) -> float | None:
            return 1000.0 if self.sizes and global_batch_size <= self.sizes[-1] else None

    return Problem(
        Asked(parts(), network), batch, lambda *_: messages(100.0),
        lambda _: Memory(1.0, 1.0, 1.0), Known("4.1.0", sizes), 10, 4,
    )  # fmt: skip


def test_the_batch_of_a_rank_falls_where_rcps_end() -> None:
    rows = by_ranks(problem(sizes=(16, 64)), 20)
    assert [row.ranks for row in rows] == [1, 2, 4, 8, 16, 20]
    assert counts_of(40, 6) == [1, 2, 4, 6, 12, 24, 40]
    assert counts_of(5, 8) == [1, 2, 4, 5] and counts_of(8, 8) == [1, 2, 4, 8]
    assert counts_of(3, 1) == [1, 2, 3] and counts_of(1, 8) == [1]
    assert [row.batch for row in rows] == [8, 8, 8, 8, 4, 3]
    assert [row.run is None for row in rows] == [False] * 6
    assert [row.batch for row in by_batch(problem(sizes=(16, 64)), 4)] == [4, 8]
    # Reference points between batches of a rank: those next to them, none above the largest one.
    assert [row.batch for row in by_batch(problem(sizes=(16, 60)), 10)] == [1, 2, 6]
    assert [row.batch for row in by_batch(problem(sizes=(16, 60)), 7)] == [2, 3, 8]
    assert [row.batch for row in by_batch(problem(sizes=(16,)), 64)] == [1]
    beyond = by_ranks(problem(sizes=(16, 64)), 128)[-1]
    assert (beyond.batch, beyond.run) == (1, None)


def test_where_more_ranks_stop_paying() -> None:
    perfect = Network(Link(1e15, 0.0), Link(1e15, 0.0), 8)
    assert limit_of(by_ranks(problem(perfect), 64)).ranks == 64
    slow = Network(Link(1e15, 0.0), Link(1.0, 100.0), 8)
    limit = limit_of(by_ranks(problem(slow), 64))
    assert (limit.ranks, "less than 50%" in limit.why) == (8, True)
    ended = limit_of(by_ranks(problem(perfect, sizes=(16,)), 64))
    assert ended.ranks <= 16


def test_a_run() -> None:
    # Batches of 448 are evaluated every 150,000 sequences.
    run = run_of(1_000_000, 448, step_seconds=2.0, evaluation_seconds=5.0)
    assert (run.updates, run.evaluations) == (math.ceil(1e6 / 448), 6)
    assert run.seconds == run.updates * 2.0 + 6 * 5.0


def test_an_evaluation_has_a_fixed_part_in_each_pass() -> None:
    # 10 sequences of 0.1 s; passes of 4 with a third of the fixed 1.0 s each.
    by_line = problem()
    assert evaluation_seconds(by_line, 1) == pytest.approx(10 * 0.1 + 3 / 3)
    assert evaluation_seconds(by_line, 3) == pytest.approx(4 * 0.1 + 1 / 3)
    own = replace(by_line.asked.parts, evaluation_has_fixed=True)
    measured = replace(by_line, asked=replace(by_line.asked, parts=own))
    assert evaluation_seconds(measured, 1) == pytest.approx(10 * 0.1)
    assert evaluation_seconds(measured, 10) == pytest.approx(1 / 3)


def test_published_results_are_reproduced_where_they_were_fitted() -> None:
    sent = known_devices.submitted_messages()
    for name in known_devices.names():
        used = known_devices.one_machine(name)
        asked = known_devices.calibrated(name, used)
        for row in used:
            seconds = step_of(asked, sent, row.devices, row.device_batch_size).seconds
            assert row.device_batch_size / seconds == pytest.approx(
                row.sequences_per_second, rel=1e-3
            )
    assert {row.device for row in rows()} >= set(known_devices.names())
    assert known_devices.named("h100") == known_devices.named("NVIDIA H100 80GB HBM3") == "H100 SXM"
    assert known_devices.named("A100") == "A100 SXM 80 GB"
    assert known_devices.named("cuda") is None
