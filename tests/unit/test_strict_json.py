"""JSON of figures that are not finite, as a program in another language reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bert_pretraining.qualify.record import Qualification, StageResult, read
from bert_pretraining.runtime import strict_json


def refuse(name: str) -> float:
    """What a strict reader does with a bare NaN or Infinity."""
    raise AssertionError(f"{name} is no standard JSON")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": [1, 2.5, math.nan]}, '{"a": [1, 2.5, "NaN"]}'),
        ((math.inf, {"b": -math.inf}), '["Infinity", {"b": "-Infinity"}]'),
        ([None, True, "text", 0.1], '[null, true, "text", 0.1]'),
        ({}, "{}"),
    ],
)
def test_a_number_that_is_not_finite_is_a_text(content: object, text: str) -> None:
    assert strict_json.dumps(content) == text
    again = strict_json.numbers_again(json.loads(text, parse_constant=refuse))
    assert repr(again) == repr(json.loads(json.dumps(content)))


def test_a_qualification_with_figures_that_are_not_finite(tmp_path: Path) -> None:
    figures = {"share_of_norm": math.inf, "curve": [[1.0, math.nan]]}
    stage = StageResult("determinism", "fail", "a gradient is NaN", 1.0, figures)
    file = tmp_path / "qualification.json"
    Qualification("2026-11-26T12:00:00Z", {}, {}, [stage]).write(file)
    json.loads(file.read_text(), parse_constant=refuse)
    found = read(file).stages[0].figures
    assert found["share_of_norm"] == math.inf
    assert math.isnan(found["curve"][0][1])
