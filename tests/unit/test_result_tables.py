"""The outline and the tables of a run: every figure that is known, and none that is not."""

from __future__ import annotations

import dataclasses

import pytest

from bert_pretraining.logs.result_tables import (
    one_row_table,
    outline_lines,
    speed_rows,
    two_column_table,
    upstream_rows,
)
from bert_pretraining.logs.sinks import (
    Energy,
    MatrixRate,
    RankSeconds,
    RunOutline,
    RunResult,
    Speed,
    Throughputs,
)
from mlperf_logs import facts

RATE = MatrixRate(4.5e15, "bf16", (8192, 8192, 8192))
KERNELS = "triton; torch for bias_gelu"
OUTLINE = RunOutline(
    336_226_108, 24, 1024, 156_725_653, 2048, "triton; torch for bias_gelu", "bf16", RATE
)
SPEED = Speed(
    sequences_per_second=8248.0,
    tokens_per_second=2_101_340.4,
    flop_per_second=4.124e15,
    matrix_share=0.9164,
    peak_memory=67_000 * 2**20,
    seconds={
        "data": 0.0001,
        "forward_backward": 0.0779,
        "reduction": 0.01,
        "optimizer": 0.008,
        "other": 0.004,
    },
    fastest=RankSeconds(3, 0.0851),
    slowest=RankSeconds(12, 0.0899),
    median_seconds=0.086,
)
RESULT = RunResult(
    step=3125,
    samples=2_400_000,
    converged=True,
    reason="target",
    eval_loss=1.2345,
    eval_mlm_accuracy=0.72049,
    e2e_time=331.234,
    train_time=298.5,
    init_time=20.0,
    sequences_per_second=8040.2013,
    resumed_from=None,
    speed=SPEED,
    throughputs=Throughputs(8040.2, 8248.0, 8256.25),
    energy=Energy("NVML", 2_500_000.0, 2_016_000.0, 2_400_000),
    loss_scale=2.0**20,
)
LARGE = {"name": "nvidia", "config": "H200x1x8", "data_dir": "/data/bert"}


def test_every_known_figure_has_a_row() -> None:
    assert speed_rows(RESULT, RATE) == {
        "p_whole (all time)": "8,040.2 sequences/s",
        "p_train (no evaluations)": "8,248.0 sequences/s",
        "p_core (nor waits for data)": "8,256.2 sequences/s",
        "Tokens (no padding)": "2,101,340 tokens/s",
        "Model TFLOP/s": "4124",
        "- of the matrix rate": "91.6%",
        "Matrix rate, bf16, TFLOP/s": "4500",
        "- measured with": "8192 x 8192 x 8192",
        "Peak memory of a rank": "67,000 MiB",
        "A step": "0.1000 s",
        "- wait for data": "0.0001 s, 0.1%",
        "- forward, backward": "0.0779 s, 77.9%",
        "- reduction": "0.0100 s, 10.0%",
        "- optimizer": "0.0080 s, 8.0%",
        "- other": "0.0040 s, 4.0%",
        "- work of the fastest rank": "0.0851 s, rank 3",
        "- work of the slowest rank": "0.0899 s, rank 12",
        "Loss scale": "1,048,576",
        "Energy of the run": "2,500,000 J (NVML)",
        "- a sequence": "1.04 J",
        "- a sequence, training": "0.84 J",
    }


def test_what_is_not_known_has_no_row() -> None:
    alone = RankSeconds(0, 0.1)
    speed = dataclasses.replace(
        SPEED, matrix_share=None, peak_memory=None, seconds=None, fastest=alone, slowest=alone
    )
    throughputs = Throughputs(8040.2, 8248.0, None)
    result = dataclasses.replace(
        RESULT, speed=speed, throughputs=throughputs, energy=None, loss_scale=None
    )
    assert list(speed_rows(result, None)) == [
        "p_whole (all time)",
        "p_train (no evaluations)",
        "Tokens (no padding)",
        "Model TFLOP/s",
    ]
    nothing = dataclasses.replace(result, speed=None, throughputs=None)
    assert speed_rows(nothing, RATE) == {}
    of_nothing = dataclasses.replace(nothing, energy=Energy("RAPL", 10.0, 0.0, 0))
    assert speed_rows(of_nothing) == {"Energy of the run": "10 J (RAPL)"}


def test_the_tables_are_markdown_and_fit_60_columns() -> None:
    rows = upstream_rows(facts(**LARGE), RESULT)
    assert one_row_table({"E2E": "3.14s", "final_loss": "1.234"}) == (
        "| E2E   | final_loss |\n|-------|------------|\n| 3.14s | 1.234      |"
    )
    more = speed_rows(RESULT, RATE)
    assert not set(rows) & set(more), "one would replace the other"
    table = two_column_table(("Result", ""), {**rows, **more}, 60).splitlines()
    assert len(table) == 2 + len(rows) + len(more)
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table[0]) <= 60
    assert "| MLM Accuracy                  | 0.720" in "\n".join(table)


def test_a_table_that_would_wrap_is_lines() -> None:
    rows = {"E2E": "3.14s", "final_loss": "1.234"}
    assert two_column_table(("Result", ""), rows, 20) == "E2E: 3.14s\nfinal_loss: 1.234"
    assert two_column_table(("Result", ""), rows, 22).startswith("| Result     |       |\n")


def test_the_outline_is_six_lines() -> None:
    assert outline_lines(facts(**LARGE), OUTLINE).splitlines() == [
        "Model      BERT, 24 layers of 1024, 336.2 M parameters",
        "Data       156,725,653 sequences in 2,048 shards of /data/bert",
        "Ranks      1 on CPU, 1 machine",
        "Batch      448 sequences, 56 x 1 a rank",
        "Precision  bf16, kernels: triton; torch for bias_gelu",
        "Target     MLM accuracy 0.72, at most 6,700 steps",
    ]


@pytest.mark.parametrize("columns", [60, 40, 1])
def test_a_long_line_of_the_outline_is_wrapped_between_words(columns: int) -> None:
    whole = outline_lines(facts(**LARGE), OUTLINE)
    wrapped = outline_lines(facts(**LARGE), OUTLINE, columns)
    assert wrapped.split() == whole.split()
    assert all(line[11] != " " for line in wrapped.splitlines())
    if columns > 30:
        assert max(map(len, wrapped.splitlines())) <= columns
