"""What goes into a plan, each number with its source: from flags, files, devices and defaults."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.config import Config, Resolved
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig
from bert_pretraining.optim import choose
from bert_pretraining.scaling import known_devices, measured
from bert_pretraining.scaling.collectives import AUTO, IN_NETWORK, TREE, Link, Network
from bert_pretraining.scaling.forecast import Problem
from bert_pretraining.scaling.messages import Messages, is_flat, memory_of, messages_of
from bert_pretraining.scaling.rank_parts import UNKNOWN, RankParts, Sourced, fit
from bert_pretraining.scaling.step import BACKWARD, REPLICATED, SHARDED, Asked
from bert_pretraining.scaling.tables import milliseconds, part
from bert_pretraining.scaling.training_run import targets

Entries = list[tuple[str, str, str]]
# The settings of a configuration that a plan looks at, beside its name.
USED = frozenset({
    "name", "config", "device", "nproc_per_node", "data_dir", "bert_config_path", "precision",
    "fp16", "use_cuda_graph", "optimizer", "distributed_lamb", "gradient_dtype", "clip_gradients",
    "gradient_accumulation_steps", "train_batch_size", "eval_batch_size", "num_eval_examples",
})  # fmt: skip
OF_EVALUATIONS = ("eval_batch_size", "num_eval_examples")  # published results have them in
AS_BETWEEN = "as between machines"
NO_SPREAD = "default: no rank waits for a slower one"
HOW_TO_MEASURE = (
    "pass --measured FILE ... of 'python -m bert_pretraining bench step --output FILE' at two "
    "batch sizes, or --device NAME"
)


@dataclass(frozen=True)
class Inputs:
    """problem: what is planned. model: its sizes, in words. entries: name, value and source of
    each number. notes: what the user should know of them."""

    problem: Problem
    model: str
    entries: Entries
    notes: list[str]


def gather(resolved: Resolved, flags: argparse.Namespace) -> Inputs:
    """Everything that the flags, the configuration and the files tell.

    Raises UserError where a part is not known and not guessed.
    """
    config = resolved.config
    model, model_source = _model(config)
    device = known_devices.named(config.device)
    files = measured.read(flags.measured, model, config.resolved_precision)
    notes: list[str] = []
    spread = flags.spread / 100.0
    parts = _parts(config, model, device, files, notes, spread)
    network, links = _network(resolved, flags, device, files)
    if flags.ranks > network.machine and flags.ranks % network.machine:
        notes.append(
            f"{flags.ranks:,} ranks do not fill machines of {network.machine}: computed as if the "
            "last one were full; a real run needs the same number of ranks on every machine"
        )
    notes += _without_effect(resolved, flags, network, links, parts)
    found = targets(flags.ruleset)
    if model != BERT_LARGE:
        found = replace(found, sizes=(), missing="reference points are of BERT-large alone")
    if found.missing:
        notes.append(f"no time to the target: {found.missing}")
    sharing = SHARDED if config.distributed_lamb else REPLICATED
    _require_known_exchange(config, flags.exchange)
    asked = Asked(
        parts, network, flags.exchange, sharing, config.gradient_accumulation_steps, spread
    )

    @functools.cache
    def messages(ranks: int, of: str) -> Messages:
        return messages_of(config, model, ranks, is_sharded=of == SHARDED)

    problem = Problem(
        asked,
        config.train_batch_size,
        messages,
        lambda ranks: memory_of(config, messages(ranks, sharing), ranks),
        found,
        config.num_eval_examples,
        config.eval_batch_size,
        is_flat(config),
    )
    own = [
        part("fixed part of a micro-batch", parts.fixed),
        part("each sequence", parts.sequence),
        part("host, a micro-batch", parts.host),
        part("optimizer, all parameters", parts.optimizer),
        part("evaluating a sequence", parts.evaluation),
        ("spread of the ranks", f"{flags.spread:g}%", "flag" if spread else NO_SPREAD),
    ]
    if parts.activation is None:
        notes.append(
            f"the memory of activations is not known: nothing tells whether a "
            f"batch of {config.train_batch_size} fits"
        )
    else:
        value = f"{parts.activation.value * config.train_batch_size / 2**30:.3g} GiB"
        own.append((f"activations of {config.train_batch_size}", value, parts.activation.source))
    text = f"{model.num_hidden_layers} layers of {model.hidden_size} ({model_source})"
    return Inputs(problem, text, own + links, notes)


def _without_effect(
    resolved: Resolved,
    flags: argparse.Namespace,
    network: Network,
    links: Entries,
    parts: RankParts,
) -> Iterator[str]:
    """A note of the flags that were given and change nothing.

    Every plan also computes one whole machine, to which it compares.
    """
    given = [name for name, source in resolved.sources.items() if source == "flag"]
    without = OF_EVALUATIONS if parts.includes_evaluation else ()
    unused = [name for name in given if name not in USED or name in without]
    is_between = flags.ranks > network.machine
    is_inside = network.machine > 1
    used_by = {
        "bandwidth": is_between or (is_inside and any(one[2] == AS_BETWEEN for one in links)),
        "latency": is_between,
        "inside_bandwidth": is_inside,
        "inside_latency": is_inside,
        "exchange": is_between or is_inside,
        # From the parts of published devices, the wait of their own ranks is taken off.
        "spread": is_between or is_inside or parts.includes_evaluation,
    }
    usual = {"exchange": AUTO, "spread": 0.0}
    unused += [
        name
        for name, is_used in used_by.items()
        if not is_used and getattr(flags, name) != usual.get(name)
    ]
    if unused:
        yield f"without effect on this plan: {', '.join(f'--{name}' for name in unused)}"


def _require_known_exchange(config: Config, exchange: str) -> None:
    """UserError for a sharded state that nothing can hold, or whose exchange is not known."""
    if not config.distributed_lamb:
        return
    if not is_flat(config):
        choose(config.optimizer, torch.device("cpu"), sharded=True)
    if exchange in (TREE, IN_NETWORK):
        raise UserError(
            f"--exchange {exchange}: with distributed_lamb, ranks reduce-scatter and all-gather, "
            "of which the model knows a ring and two levels",
            "pass --exchange ring or hierarchical, or --distributed_lamb false",
        )


def _model(config: Config) -> tuple[BertConfig, str]:
    """The model's sizes, and where they come from."""
    if config.bert_config_path:
        return BertConfig.load(Path(config.bert_config_path)), config.bert_config_path
    if config.data_dir is None:
        return BERT_LARGE, "BERT-large, the default"
    path = Path(config.data_dir) / BERT_CONFIG_NAME
    if path.exists():
        return BertConfig.load(path), str(path)
    return BERT_LARGE, f"BERT-large, the default: {path} is not there"


def _parts(
    config: Config,
    model: BertConfig,
    device: str | None,
    files: measured.Measured,
    notes: list[str],
    spread: float,
) -> RankParts:
    """Of a rank: what was measured, else what was published."""
    if not files.seconds:
        if device is None:
            raise UserError(_not_known(config), HOW_TO_MEASURE)
        if model != BERT_LARGE:
            raise UserError(
                f"--device {config.device}: published results are of BERT-large, not of "
                f"{model.num_hidden_layers} layers of {model.hidden_size}",
                "pass --measured FILE of this model",
            )
        notes.append(
            f"published results of {device} are in fp8; configured is {config.resolved_precision}"
        )
        notes.append(
            "evaluations are in the published times of a step, and their share is not known: no "
            "advice is about them"
        )
        return known_devices.parts_of(device, spread).parts
    notes += files.notes
    times = files.medians()
    line, source = fit(times), files.source
    sizes = ", ".join(map(str, sorted(times)))
    if line.has_fixed and line.fixed == 0.0:
        notes.append(
            f"the line through the times of {sizes} sequences would begin below 0: it goes through "
            f"0, off by at most {line.error:.0%} of a time; measure again on an idle machine"
        )
    elif len(times) == 2:
        notes.append(f"the line goes through {sizes} sequences, and no third size checks it")
    elif line.has_fixed:
        notes.append(
            f"the line through {sizes} sequences is off by at most {line.error:.0%} of a time"
        )
    else:
        notes.append(
            f"measured at {sizes} sequences only: the fixed part of a step is not known; measure "
            "another batch size"
        )
    unknown = Sourced(0.0, UNKNOWN)
    third = Sourced(line.sequence * (1.0 - BACKWARD), "a third of forward and backward")
    return RankParts(
        fixed=Sourced(line.fixed, source if line.has_fixed else UNKNOWN),
        sequence=Sourced(line.sequence, source),
        optimizer=files.optimizer or unknown,
        host=files.host or unknown,
        evaluation=files.evaluation or third,
        activation=files.activation,
        has_fixed=line.has_fixed,
        evaluation_has_fixed=files.evaluation is not None,
    )


def _not_known(config: Config) -> str:
    if config.device in ("auto", "cpu"):
        return "nothing tells how long one rank takes"
    return (
        f"--device {config.device}: no published result of one machine, of "
        f"{', '.join(known_devices.names())}"
    )


def _network(
    resolved: Resolved, flags: argparse.Namespace, device: str | None, files: measured.Measured
) -> tuple[Network, Entries]:
    """The links: flags before measurements before the device's before defaults."""
    machine = known_devices.machines().get(device) if device else None
    ranks = Sourced(resolved.config.nproc_per_node, resolved.sources["nproc_per_node"])
    if machine is not None and ranks.source != "flag":
        ranks = Sourced(machine.machine, f"{device}: the ranks that its fast links join")
    link = files.link
    inside = _chosen(
        flags.inside_bandwidth and Sourced(1e9 * flags.inside_bandwidth, "flag"),
        link and Sourced(link.bandwidth, files.link_source),
        machine and Sourced(1e9 * machine.inside_gb_s, machine.inside_source),
    )
    between = _chosen(
        flags.bandwidth and Sourced(1e9 * flags.bandwidth, "flag"),
        machine and Sourced(1e9 * machine.between_gb_s, machine.between_source),
    )
    if inside is None and between is None and flags.ranks > 1:
        raise UserError(
            "nothing tells how fast the ranks' links are",
            "pass --bandwidth GB/s, or a qualification.json of several ranks to --measured",
        )
    if between is None and flags.ranks > ranks.value:
        raise UserError(
            f"--ranks {flags.ranks} take several machines of {ranks.value:.0f} ranks, and nothing "
            "tells how fast the links between them are",
            "pass --bandwidth GB/s, or a higher --nproc_per_node",
        )
    near = _chosen(
        flags.inside_latency and Sourced(1e-6 * flags.inside_latency, "flag"),
        link and Sourced(link.latency, files.link_source),
        Sourced(known_devices.INSIDE_LATENCY, f"default: {known_devices.LATENCY_SOURCE}"),
    )
    far = _chosen(
        flags.latency and Sourced(1e-6 * flags.latency, "flag"),
        Sourced(known_devices.BETWEEN_LATENCY, f"default: {known_devices.LATENCY_SOURCE}"),
    )
    nothing = Sourced(1e9, "one rank: not used")
    inside = inside or (between and Sourced(between.value, AS_BETWEEN)) or nothing
    entries = [
        ("ranks of a machine", f"{ranks.value:.0f}", ranks.source),
        ("bandwidth inside", f"{inside.value / 1e9:.4g} GB/s", inside.source),
        ("latency inside", f"{milliseconds(1e3 * near.value)} us", near.source),
    ]
    if between is not None:
        entries += [
            ("bandwidth between machines", f"{between.value / 1e9:.4g} GB/s", between.source),
            ("latency between machines", f"{milliseconds(1e3 * far.value)} us", far.source),
        ]
    outside = Link((between or inside).value, far.value)
    return Network(Link(inside.value, near.value), outside, int(ranks.value)), entries


def _chosen(*candidates: Sourced | None) -> Sourced | None:
    """The first one that is there."""
    return next((one for one in candidates if one is not None), None)
