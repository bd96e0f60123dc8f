"""`plan`: what N ranks would give, from measured or published parts of one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bert_pretraining import config
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted
from bert_pretraining.scaling import collectives, published_table, tables
from bert_pretraining.scaling.advice import Advice, advice_of
from bert_pretraining.scaling.forecast import (
    Problem,
    Row,
    allowed_batch,
    by_batch,
    by_ranks,
    limit_of,
    row_of,
)
from bert_pretraining.scaling.inputs import Inputs, gather
from bert_pretraining.scaling.step import REPLICATED, SHARDED, Asked
from bert_pretraining.scaling.training_run import targets
from bert_pretraining.submission.rulesets import DEFAULT_RULESET, RULESETS

POSITIVE = ("bandwidth", "latency", "inside_bandwidth", "inside_latency")
MOST_RANKS = 2**16
LEGEND = (
    "Batch: sequences of a rank's micro-batch. Global: of an update. Step and its parts in ms. "
    "Exchange: what backward does not hide of the gradients' exchange, and new weights to all "
    "ranks if the optimizer is sharded. vs 1 rank, vs machine: speed of a rank, in percent of that "
    "of one rank alone, and of one in a full machine. GiB: weights, gradients, optimizer state of "
    "a rank, without activations. Target: time of updates and evaluations to the target accuracy, "
    "without start-up and checkpoints."
)
ABOVE_BY_SHARDS = "Above 100%: each rank updates only its share of the weights."
ABOVE_BY_FEWER = "Above 100% vs machine: fewer ranks than those of a machine exchange less."
ABOVE_BY_FEWER_WAIT = (
    "Above 100% vs machine: fewer ranks than those of a machine exchange and wait less."
)
LEGEND_OF_SPREAD = "Wait: for the slowest rank, as a share of the step."
WITH_PUBLISHED = ("published", "ruleset", "json")  # flags that go together
OWN = ("ranks", "measured", *POSITIVE, "exchange", "spread", "ruleset", "published", "json")
MOST_SPREAD = 100.0  # percent; a normal value of more would often be below 0


def main(arguments: list[str]) -> int:
    """Print the plan, or with --published what the model says of published results."""
    flags = _parser().parse(arguments)
    _check(flags)
    if flags.published:
        _require_alone(flags)
        found = published_table.held(targets(flags.ruleset))
        as_json = [published_table.to_json(one) for one in found]
        print(json.dumps(as_json, indent=2) if flags.json else published_table.markdown(found))
        if not flags.json:
            print(f"\n{published_table.MADE}")
        return 0
    if flags.ranks is None:
        raise UserError("--ranks is missing", "pass --ranks N, or --published")
    settings = {name: value for name, value in vars(flags).items() if name not in OWN}
    resolved = config.resolve(settings)
    inputs = gather(resolved, flags)
    rows = by_ranks(inputs.problem, flags.ranks)
    sizes = by_batch(inputs.problem, flags.ranks)
    if flags.json:
        print(json.dumps(_to_json(inputs, rows, sizes), indent=2))
    else:
        print(_text(resolved, inputs, rows, sizes))
    return 0


def _parser() -> config.FlagParser:
    parser = config.FlagParser(
        prog="python -m bert_pretraining plan", allow_abbrev=False,
        description="What N ranks would give: seconds of an update and its parts, sequences a "
        "second, efficiency, memory, time to the target, and where more ranks stop paying. "
        "Computed, not measured: docs/scaling.md has the assumptions. The other flags are those "
        "of a launch; --device also takes the name of a device with published results, such as "
        "H100.",
    )  # fmt: skip
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="plan for 1, 2, 4, ... to N ranks (required)")
    add("--measured", type=Path, nargs="+", default=[], metavar="FILE",
        help="figures of one rank: files of 'bench step --output' (two batch sizes or more), "
        "'bench optimizer --output', or a qualification.json, which also has links (default: "
        "published ones of --device)")  # fmt: skip
    add("--bandwidth", type=float, metavar="GB/S",
        help="10^9 bytes a second of a rank to other machines (default: the device's)")  # fmt: skip
    add("--latency", type=float, metavar="US",
        help="microseconds of a message between machines (default: 14, NCCL's)")  # fmt: skip
    add("--inside_bandwidth", type=float, metavar="GB/S",
        help="--bandwidth inside of a machine (default: measured, or the device's)")  # fmt: skip
    add("--inside_latency", type=float, metavar="US",
        help="--latency inside of a machine (default: measured, or 3.4, NCCL's)")  # fmt: skip
    add("--exchange", choices=collectives.EXCHANGES, default=collectives.AUTO,
        help="how the ranks exchange gradients; auto: ring or tree, the faster one (default: "
        "auto)")  # fmt: skip
    add("--spread", type=float, default=0.0, metavar="PERCENT",
        help="standard deviation of the ranks' computing in an update, in percent of its mean: all "
        "wait for the slowest rank (default: 0)")  # fmt: skip
    add("--ruleset", default=DEFAULT_RULESET, metavar="VERSION",
        help=f"whose reference convergence points count: {', '.join(RULESETS)} (default: "
        f"{DEFAULT_RULESET})")  # fmt: skip
    add("--published", action="store_true",
        help="print what the model says of published results, and end; only --ruleset and --json "
        "go with it (default: no)")  # fmt: skip
    add("--json", action="store_true", help="print the figures as JSON (default: as text)")
    config.add_config_flags(parser)
    return parser


def _check(flags: argparse.Namespace) -> None:
    if flags.ranks is not None and not 1 <= flags.ranks <= MOST_RANKS:
        raise UserError(
            f"--ranks {flags.ranks}: it must be from 1 to {MOST_RANKS:,}", "pass another number"
        )
    if "nnodes" in flags:
        raise UserError(
            f"--nnodes {flags.nnodes}: the number of machines follows from --ranks and the ranks "
            "of a machine",
            "leave it out, or pass --nproc_per_node",
        )
    for name in POSITIVE:
        value = getattr(flags, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value:g}: it must be above 0", f"pass another --{name}")
    if not 0.0 <= flags.spread <= MOST_SPREAD:
        raise UserError(
            f"--spread {flags.spread:g}: it must be from 0 to {MOST_SPREAD:g} percent",
            "pass another --spread",
        )


def _require_alone(flags: argparse.Namespace) -> None:
    """Raise UserError for a flag that says nothing about the published results."""
    usual = vars(_parser().parse([]))
    given = [
        f"--{name}" for name, value in vars(flags).items()
        if name not in WITH_PUBLISHED and (name not in usual or value != usual[name])
    ]  # fmt: skip
    if given:
        raise UserError(
            f"--published takes no {given[0]}: its table is of published results alone",
            f"leave out {', '.join(given)}, or leave out --published to plan your own run",
        )


def _exchange_words(asked: Asked) -> str:
    if asked.exchange == collectives.AUTO and asked.sharing == SHARDED:
        return "ring (auto, as the optimizer is sharded)"
    return asked.exchange


def _machine_rate(problem: Problem) -> float:
    """Sequences a second of a rank on one whole machine."""
    ranks = problem.asked.network.machine
    return row_of(problem, ranks, allowed_batch(problem, ranks)).rate / ranks


def _text(
    resolved: config.Resolved, inputs: Inputs, rows: Sequence[Row], sizes: Sequence[Row]
) -> str:
    problem, last = inputs.problem, rows[-1]
    asked, messages = problem.asked, problem.messages_at(last.ranks)
    machine = _machine_rate(problem)
    lines = [
        tables.wrapped(f"Plan of {resolved.path} on {_up_to(last.ranks)}; computed, not run"),
        tables.wrapped(f"Model      {inputs.model}, {messages.parameters / 1e6:.1f} M parameters"),
        tables.wrapped(
            f"Exchange   {_exchange_words(asked)}, {messages.bytes / 1e6:.4g} MB of gradients in "
            f"{counted(len(messages.gradients), 'message')}, "
            f"{'while backward runs' if messages.overlaps else 'after backward'}; optimizer "
            f"{asked.sharing}"
        ),
        "",
        "What goes in:",
        tables.sources(inputs.entries),
        *(tables.wrapped(f"  Note: {note}", "    ") for note in inputs.notes),
        "",
        tables.wrapped(" ".join(_legend(problem, [*rows, *sizes], machine))),
        tables.of_rows(rows, machine),
        "",
    ]
    limit = limit_of(rows)
    pays = f"More ranks pay up to {limit.ranks:,}: {limit.why}." if limit.why else (
        f"Every row still pays; try --ranks above {limit.ranks:,} to see where that ends."
    )  # fmt: skip
    if len(rows) > 1:
        lines.append(tables.wrapped(pays))
    if problem.targets.sizes:
        known = ", ".join(f"{size:,}" for size in problem.targets.sizes)
        lines += [
            tables.wrapped(
                f"RCPs of ruleset {problem.targets.ruleset} are at global batches of {known}: "
                "interpolated between them, none above them; below them the smallest counts."
            ),
            "",
            f"Batch sizes at {counted(last.ranks, 'rank')}:",
            tables.of_rows(sizes, machine),
        ]
    found = [(row, advice) for row in rows for advice in advice_of(problem, row)]
    if found:
        lines += ["", "What would help:"]
        lines += [tables.wrapped(f"  {told}", "    ") for told in _grouped(found)]
    return "\n".join(lines)


def _legend(problem: Problem, rows: Sequence[Row], machine: float) -> Iterator[str]:
    """What the columns of the table are, and why a share is above 100% where one is."""
    yield LEGEND
    if problem.asked.spread:
        yield LEGEND_OF_SPREAD
    if problem.asked.sharing != REPLICATED and _is_above(row.efficiency for row in rows):
        yield ABOVE_BY_SHARDS
    elif _is_above(row.rate / row.ranks / machine for row in rows):
        yield ABOVE_BY_FEWER_WAIT if problem.asked.spread else ABOVE_BY_FEWER


def _is_above(shares: Iterable[float]) -> bool:
    return round(max(shares), 2) > 1.0


def _up_to(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"up to {ranks:,} ranks"


def _grouped(found: list[tuple[Row, Advice]]) -> list[str]:
    """One sentence for each kind of advice: that of the last row, and from which ranks on."""
    by_kind: dict[str, list[tuple[Row, Advice]]] = {}
    for row, advice in found:
        by_kind.setdefault(advice.kind, []).append((row, advice))
    told = []
    for entries in by_kind.values():
        first, (last, advice) = entries[0][0].ranks, entries[-1]
        since = "" if first == last.ranks else f" (from {counted(first, 'rank')} on)"
        told.append(f"{advice.at(last.ranks)}{since}.")
    return told


def _to_json(inputs: Inputs, rows: Sequence[Row], sizes: Sequence[Row]) -> dict[str, object]:
    problem, limit, machine = inputs.problem, limit_of(rows), _machine_rate(inputs.problem)
    entries = [dict(zip(("name", "value", "source"), one, strict=True)) for one in inputs.entries]
    return {
        "model": inputs.model,
        "inputs": entries,
        "notes": inputs.notes,
        "exchange": problem.asked.exchange,
        "optimizer": problem.asked.sharing,
        "spread": problem.asked.spread,
        "rcp_batch_sizes": problem.targets.sizes,
        "by_ranks": [_row(problem, row, machine) for row in rows],
        "by_batch": [_row(problem, row, machine) for row in sizes],
        "pays_up_to_ranks": limit.ranks,
        "why": limit.why,
    }


def _row(problem: Problem, row: Row, machine: float) -> dict[str, object]:
    step = row.step
    return {
        "ranks": row.ranks,
        "batch_a_rank": row.batch,
        "global_batch": row.global_batch,
        "step_seconds": step.seconds,
        "compute_seconds": step.compute,
        "waiting_seconds": step.waiting,
        "exchange_seconds": step.exposed,
        "hidden_exchange_seconds": step.hidden,
        "publish_seconds": step.publish,
        "latency_seconds": step.latency,
        "optimizer_seconds": step.optimizer,
        "is_host_bound": step.is_host_bound,
        "sequences/s": row.rate,
        "efficiency_of_one_rank": row.efficiency,
        "efficiency_of_machine": row.rate / row.ranks / machine,
        "memory_bytes": asdict(row.memory),
        "to_target": None if row.run is None else asdict(row.run),
        "advice": [f"{advice.at(row.ranks)}." for advice in advice_of(problem, row)],
    }
