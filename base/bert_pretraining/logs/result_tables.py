"""What a run tells people in several lines: its outline at the start, its results at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from bert_pretraining.logs.sinks import (
    Energy,
    MatrixRate,
    RankSeconds,
    RunFacts,
    RunOutline,
    RunResult,
    Speed,
    Throughputs,
)
from bert_pretraining.runtime.words import counted

PART_NAMES = {
    "data": "wait for data",
    "forward_backward": "forward, backward",
    "reduction": "reduction",
    "optimizer": "optimizer",
    "other": "other",
}


def outline_lines(run: RunFacts, outline: RunOutline, columns: int | None = None) -> str:
    """What is trained, on what and how, one line each; long ones are wrapped to `columns`."""
    config = run.config
    source = config.train_dir or config.data_dir
    rows = {
        "Model": f"BERT, {counted(outline.layers, 'layer')} of {outline.hidden_size}, "
        f"{_count(outline.parameters)} parameters",
        "Data": f"{counted(outline.sequences, 'sequence')} in "
        f"{counted(outline.shards, 'shard')} of {source}",
        "Ranks": f"{run.world_size} on {run.device_name}, {counted(config.nnodes, 'machine')}",
        "Batch": f"{counted(config.global_batch_size, 'sequence')}, "
        f"{config.train_batch_size:,} x {config.gradient_accumulation_steps:,} a rank",
        "Precision": f"{outline.precision}, kernels: {outline.kernels}",
        "Target": f"MLM accuracy {config.target_mlm_accuracy:g}, at most "
        f"{counted(config.max_steps, 'step')}",
    }
    width = max(map(len, rows)) + 2
    return "\n".join(
        textwrap.fill(
            value,
            width=max(columns or 10**6, 2 * width),
            initial_indent=name.ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, value in rows.items()
    )


def _count(number: int) -> str:
    """ "336.2 M" or "912 k"."""
    return f"{number / 1e6:.1f} M" if number >= 1_000_000 else f"{number / 1e3:.0f} k"


def upstream_rows(run: RunFacts, result: RunResult) -> dict[str, str]:
    """The figures of upstream's table, by its names."""
    config = run.config
    return {
        "Model": f"BERT {config.name} {config.config}",
        "GPUs": f"{run.device_name} x{run.world_size}",
        "E2E": f"{result.e2e_time:.2f}s",
        "MLM Accuracy": f"{result.eval_mlm_accuracy:.3f}",
        "training_sequences_per_second": f"{result.sequences_per_second:.3f}",
        "final_loss": f"{result.eval_loss:.3f}",
    }


def speed_rows(result: RunResult, matrix_rate: MatrixRate | None = None) -> dict[str, str]:
    """How fast the run was, where a step's time went, and what it cost; only what is known."""
    rows = (
        *_throughput_rows(result.throughputs),
        *_speed_rows(result.speed, matrix_rate),
        ("Loss scale", None if result.loss_scale is None else f"{result.loss_scale:,.15g}"),
        *_energy_rows(result.energy),
    )
    return {name: value for name, value in rows if value is not None}


Rows = Iterator[tuple[str, str | None]]


def _throughput_rows(throughputs: Throughputs | None) -> Rows:
    if throughputs is None:
        return
    core = throughputs.core
    yield "p_whole (all time)", f"{throughputs.whole:,.1f} sequences/s"
    yield "p_train (no evaluations)", f"{throughputs.train:,.1f} sequences/s"
    yield "p_core (nor waits for data)", None if core is None else f"{core:,.1f} sequences/s"


def _speed_rows(speed: Speed | None, rate: MatrixRate | None) -> Rows:
    if speed is None:
        return
    yield "Tokens (no padding)", f"{speed.tokens_per_second:,.0f} tokens/s"
    yield "Model TFLOP/s", _tera(speed.flop_per_second)
    yield "- of the matrix rate", _percent(speed.matrix_share)
    if rate is not None:
        yield f"Matrix rate, {rate.dtype}, TFLOP/s", _tera(rate.flop_per_second)
        yield "- measured with", " x ".join(map(str, rate.shape))
    memory = speed.peak_memory
    yield "Peak memory of a rank", None if memory is None else f"{memory / 2**20:,.0f} MiB"
    if speed.seconds is not None:
        whole = sum(speed.seconds.values())
        yield "A step", f"{whole:.4f} s"
        for part, seconds in speed.seconds.items():
            share = "" if not whole else f", {seconds / whole:.1%}"
            yield f"- {PART_NAMES[part]}", f"{seconds:.4f} s{share}"
    if speed.fastest != speed.slowest:  # there are several
        yield "- work of the fastest rank", _rank(speed.fastest)
        yield "- work of the slowest rank", _rank(speed.slowest)


def _energy_rows(energy: Energy | None) -> Rows:
    if energy is None:
        return
    yield "Energy of the run", f"{energy.run:,.0f} J ({energy.source})"
    if energy.sequences > 0:
        yield "- a sequence", f"{energy.run / energy.sequences:.3g} J"
        yield "- a sequence, training", f"{energy.training / energy.sequences:.3g} J"


def _tera(flop_per_second: float) -> str:
    return f"{flop_per_second / 1e12:.4g}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _rank(which: RankSeconds | None) -> str | None:
    return None if which is None else f"{which.seconds:.4f} s, rank {which.rank}"


def one_row_table(rows: Mapping[str, str]) -> str:
    """One row of figures under their names, as a Markdown table."""
    return table([list(rows), list(rows.values())])


def two_column_table(
    head: tuple[str, str], rows: Mapping[str, str], columns: int | None = None
) -> str:
    """A figure a row: its name, then its value, as a Markdown table.

    Where that is wider than `columns`, "name: value" a line.
    """
    found = table([list(head), *map(list, rows.items())])
    if columns is not None and len(found.split("\n", 1)[0]) > columns:
        return "\n".join(f"{name}: {value}" for name, value in rows.items())
    return found


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
