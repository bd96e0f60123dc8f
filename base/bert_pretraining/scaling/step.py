"""One update on N ranks: what each part takes, and what of the exchange backward hides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bert_pretraining.scaling import collectives
from bert_pretraining.scaling.collectives import Cost, Network
from bert_pretraining.scaling.messages import Messages
from bert_pretraining.scaling.rank_parts import RankParts
from bert_pretraining.scaling.stragglers import expected_maximum

# Of forward and backward: the backward pass has twice the products of the forward pass, see
# model/flops.py.
BACKWARD = 2.0 / 3.0
REPLICATED, SHARDED, IN_MACHINE = "replicated", "sharded", "sharded in a machine"


@dataclass(frozen=True)
class Asked:
    """What does not depend on the number of ranks.

    exchange: of EXCHANGES. sharing: who holds the optimizer's state: every rank all of it, all
    ranks a part each, or the ranks of each machine, or group, a part each. accumulation:
    micro-batches of an update. spread: standard deviation of the ranks' computing in an update, as
    a share of it.
    """

    parts: RankParts
    network: Network
    exchange: str = collectives.AUTO
    sharing: str = REPLICATED
    accumulation: int = 1
    spread: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of an update, which follow each other.

    compute: forward and backward, or the host's time to queue it if that is longer, of the average
    rank. waiting: for the slowest rank. exposed: of the gradients' exchange, what is left after the
    backward pass. optimizer. publish: with a sharded state, norms and new weights to all ranks.
    hidden: of the exchange, what runs during backward. is_host_bound: whether the host is slower
    than the device. latency: of exchange and publish, the seconds that no faster link would save.
    """

    compute: float
    exposed: float
    optimizer: float
    publish: float
    hidden: float
    is_host_bound: bool
    latency: float
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.exposed + self.optimizer + self.publish


def step_of(asked: Asked, messages: Messages, ranks: int, batch: float) -> Step:
    """The update on so many ranks. batch: sequences of a rank's micro-batch."""
    parts = asked.parts
    device = parts.forward_backward(batch)
    one = max(device, parts.host.value)
    gradients, publish = costs(asked, messages, ranks)
    seconds = [cost.seconds for cost in gradients]
    backward = BACKWARD * one
    released = releases(messages, backward)
    exposed = exposed_seconds(seconds, released, backward)
    compute = asked.accumulation * one
    holders = {SHARDED: ranks, IN_MACHINE: asked.network.ranks_of_group(ranks)}
    return Step(
        compute,
        exposed,
        parts.optimizer.value / holders.get(asked.sharing, 1),
        publish.seconds,
        sum(seconds) - exposed,
        parts.host.value > device,
        sum(cost.latency for cost in gradients) + publish.latency,
        compute * asked.spread * expected_maximum(ranks) if asked.spread else 0.0,
    )


def costs(asked: Asked, messages: Messages, ranks: int) -> tuple[list[Cost], Cost]:
    """Of each message of gradients, and of publishing norms and all weights in the optimizer."""
    network, exchange = asked.network, asked.exchange
    sizes = messages.gradients
    if ranks == 1:
        return [Cost() for _ in sizes], Cost()
    if asked.sharing == REPLICATED:
        return [collectives.all_reduce(exchange, size, ranks, network) for size in sizes], Cost()
    part = messages.weights / len(sizes)
    if asked.sharing == IN_MACHINE:
        sent = [
            collectives.inner(size, ranks, network) + collectives.outer(size, ranks, network)
            for size in sizes
        ]
        return sent, _times(collectives.inner(part, ranks, network), len(sizes))
    scatter = _scatter(exchange)
    sent = [scatter(size, ranks, network) for size in sizes]
    publish = _times(scatter(part, ranks, network), len(sizes))
    return sent, sum((scatter(size, ranks, network) for size in messages.sums), publish)


def _scatter(exchange: str) -> Callable[[float, int, Network], Cost]:
    """How a reduce-scatter or an all-gather over all ranks runs: a ring, unless in two levels."""
    if exchange != collectives.HIERARCHICAL:
        return collectives.reduce_scatter

    def in_levels(size: float, ranks: int, network: Network) -> Cost:
        outer = collectives.between_groups(size, ranks, network)
        return collectives.inner(size, ranks, network) + collectives.reduce_scatter(*outer)

    return in_levels


def _times(cost: Cost, count: int) -> Cost:
    return Cost(count * cost.latency, count * cost.transfer)


def releases(messages: Messages, backward: float) -> list[float]:
    """Seconds after the start of the backward pass at which each message is complete.

    Backward completes gradients at a steady rate of bytes, in the order of the messages.
    """
    if not messages.overlaps:
        return [backward] * len(messages.gradients)
    found, done = [], 0.0
    for size in messages.gradients:
        done += size
        found.append(backward * done / messages.bytes)
    return found


def exposed_seconds(seconds: Sequence[float], released: Sequence[float], backward: float) -> float:
    """What is left of an exchange when the backward pass ends.

    One message after the other: each begins when it is complete and the one before it has been
    sent. seconds: of each message. released: when each is complete. backward: when all are.
    """
    free = 0.0
    for own, start in zip(seconds, released, strict=True):
        free = max(free, start) + own
    return max(0.0, free - backward)
