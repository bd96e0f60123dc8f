"""Published speeds: which are found, and what is said of a measured one beside them."""

from __future__ import annotations

import pytest

from bert_pretraining.qualify import normal
from bert_pretraining.qualify.published import find, rows
from bert_pretraining.qualify.record import PASS, Qualification, StageResult

H100 = "NVIDIA H100 80GB HBM3"


def qualification(device: str, rate: float, ranks: int = 8, layers: int = 24) -> Qualification:
    figures = {"sequences/s": rate * ranks, "precision": "bf16", "best_batch_size": 96}
    return Qualification(
        "2026-11-26T12:00:00Z",
        {"device": device, "device_type": "cuda", "cpu": "a CPU"},
        {"ranks": ranks, "layers": layers, "precision": None},
        [StageResult("step", PASS, "", 1.0, figures)],
    )


@pytest.mark.parametrize(
    ("name", "devices", "rate"),
    [
        (H100, 8, 974),
        (H100, 4, 1069),
        (H100, 100, 1009),
        ("NVIDIA H100 PCIe", 8, 654),
        ("NVIDIA H200", 8, 1031),
        ("NVIDIA B200", 8, 1465),
        ("NVIDIA GB200", 8, 1488),
        ("NVIDIA GB200", 4, 1608),
        ("NVIDIA A100-SXM4-80GB", 8, 319),
        ("NVIDIA A100-SXM4-40GB", 8, 75),
        ("NVIDIA L40S", 1, 142),
        ("NVIDIA L40", 1, 129),
        ("NVIDIA L4", 1, 54),
        ("AMD Instinct MI300X", 8, 61.5),
        ("Intel(R) Xeon(R) Platinum 8480+", 2, 34.3),
    ],
)
def test_the_most_similar_published_speed(name: str, devices: int, rate: float) -> None:
    assert find(name, devices)[0].sequences_per_second == rate


@pytest.mark.parametrize(
    "name", ["NVIDIA V100", "Tesla P4", "Iluvatar BI-V150", "CPU", "L400", f"{H100} MIG 1g.10gb"]
)
def test_other_devices_are_not_found(name: str) -> None:
    assert find(name, 8) == []


def test_every_row_has_a_source_and_a_sane_band() -> None:
    assert len(rows()) >= 25
    for row in rows():
        assert row.source
        assert 0.8 * row.sequences_per_second < row.lower_bound < row.sequences_per_second


@pytest.mark.parametrize(
    ("rate", "share", "is_below", "words"),
    [
        (930.0, 930 / 974, False, "measured 930, 95% of it, in the band of like machines"),
        (831.6, 831.6 / 974, True, "measured 831.6, 85% of it, 10% below the band"),
        (1000.0, 1000 / 974, False, "measured 1000, 103% of it, above it"),
    ],
)
def test_a_speed_beside_the_published_one(
    rate: float, share: float, is_below: bool, words: str
) -> None:
    lines, figures = normal.compare(qualification(H100, rate))
    assert figures[0]["share"] == pytest.approx(share)
    assert figures[0]["is_below_band"] is is_below
    assert figures[0]["measured_sequences/s"] == pytest.approx(rate)
    assert (figures[0]["lowest_sequences/s"], figures[0]["highest_sequences/s"]) == (924, 974)
    assert words in lines[0]
    assert figures[0]["differs"] == [
        "precision: fp8, here bf16",
        "a whole training with evaluations, here updates on made-up sequences",
    ]
    assert "devices: 4, here 8" in lines[1]
    assert not any("3472" in line for line in lines), "as many devices tell nothing of eight"


def test_another_number_of_layers_is_not_compared() -> None:
    lines, figures = normal.compare(qualification(H100, 5000.0, layers=2))
    assert "not compared: measured with 2 of 24 layers" in lines[0]
    assert "share" not in figures[0]


def test_an_unknown_device_is_compared_with_nothing() -> None:
    lines, figures = normal.compare(qualification("Iluvatar BI-V150", 100.0))
    assert lines == ["no speed of Iluvatar BI-V150 was published: compared with nothing"]
    assert figures == []
