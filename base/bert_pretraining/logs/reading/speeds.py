"""The figures of speed in RUN_OUTLINE, STEP_END and FINISHED, by the names of `Speed.named`."""

from __future__ import annotations

from bert_pretraining.logs.reading.values import entry, number, text, whole
from bert_pretraining.logs.sinks import PARTS, MatrixRate, RankSeconds, Speed, Throughputs


def speed_of(values: dict, sequences_per_second: float | None) -> Speed | None:
    """Speed from an event's values; None where they have none, as in the logs of other programs.

    A figure that is missing or no number is None, as is one that the run did not know.
    """
    tokens, tflops = number(values.get("tokens/s")), number(values.get("tflop/s"))
    if sequences_per_second is None or tokens is None or tflops is None:
        return None
    peak = number(values.get("peak_memory_mib"))
    seconds = {part: number(values.get(f"seconds_{part}")) for part in PARTS}
    return Speed(
        sequences_per_second=sequences_per_second,
        tokens_per_second=tokens,
        flop_per_second=tflops * 1e12,
        matrix_share=number(values.get("matrix_share")),
        peak_memory=None if peak is None else round(peak * 2**20),
        seconds=None if None in seconds.values() else seconds,
        fastest=_rank(values, "fastest_rank"),
        slowest=_rank(values, "slowest_rank"),
        median_seconds=number(values.get("median_rank_seconds")),
    )


def throughputs_of(values: dict) -> Throughputs | None:
    """FlagPerf's three throughputs from FINISHED; None where they are missing.

    Of them, `core` is None where a run did not know how long it waited for data.
    """
    whole_run, train, core = (
        number(values.get(f"p_{name}")) for name in ("whole", "train", "core")
    )
    if whole_run is None or train is None:
        return None
    return Throughputs(whole_run, train, core)


def matrix_rate_of(outline: object) -> MatrixRate | None:
    """The measured matrix rate from RUN_OUTLINE; None where it is missing."""
    rate = entry(outline, "matrix_rate")
    flops, dtype = number(entry(rate, "flop_per_second")), text(entry(rate, "dtype"))
    shape = entry(rate, "shape")
    if flops is None or dtype is None or not isinstance(shape, list) or len(shape) != 3:
        return None
    return MatrixRate(flops, dtype, tuple(shape))


def _rank(values: dict, name: str) -> RankSeconds | None:
    rank, seconds = whole(values.get(name)), number(values.get(f"{name}_seconds"))
    return None if rank is None or seconds is None else RankSeconds(rank, seconds)
