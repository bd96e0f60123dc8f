"""How `plan` tells people its figures: notes, advice that is true, and a narrow terminal."""

from __future__ import annotations

import json
import re

import pytest

from bert_pretraining.runtime import screen
from bert_pretraining.scaling.tables import milliseconds
from helpers import ROOT, in_process

FLAGS = ("--name", "nvidia", "--config", "H200x1x8", "--device", "H100", "--ranks")


def plan(*flags: object) -> str:
    """What is printed of so many ranks."""
    return in_process("plan", *FLAGS, *flags, cwd=ROOT).stdout


def test_shares_above_100_percent_are_explained() -> None:
    sharded = " ".join(plan(64).split())
    assert "Above 100%: each rank updates only its share of the weights." in sharded
    assert "Every row still pays; try --ranks above 64 to see where that ends." in sharded
    whole = " ".join(plan(8, "--distributed_lamb", "false", "--inside_bandwidth", 5).split())
    assert "Above 100% vs machine: fewer ranks than those of a machine exchange less." in whole
    assert "its share of the weights" not in whole
    one = " ".join(plan(1, "--spread", 5).split())  # it waits for none, and holds all weights
    assert "fewer ranks than those of a machine exchange and wait less." in one
    assert "Above 100%" not in plan(1, "--nproc_per_node", 1)


def test_one_rank_is_told_as_one() -> None:
    text = plan(1)
    assert "toml on 1 rank;" in text and "Batch sizes at 1 rank:" in text
    assert "More ranks pay" not in text
    assert "without start-up and checkpoints" in " ".join(text.split())


def test_all_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "is_watched", lambda _: True)
    for columns, lacking in ((60, "Global, Compute, Exchange, Optim., GiB"), (100, None)):
        monkeypatch.setattr(screen, "columns", lambda _, columns=columns: columns)
        lines = plan(4096).splitlines()
        widest = max(len(line) for line in lines)
        assert widest <= (64 if columns == 60 else 100)  # beside a source, a word has its length
        head = next(line.split() for line in lines if line.startswith("Ranks"))
        row = next(line.split() for line in lines if line.startswith("4,096"))
        assert len(head) == len(row) - 3  # "9 min 11 s"
        left_out = f"(for a wider terminal: {lacking})"
        assert (left_out in " ".join(" ".join(lines).split())) == (lacking is not None)
        assert ("Compute" in head) == (lacking is None)


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ((), "--distributed_lamb false"),
        ((), "--exchange hierarchical"),
        (("--use_cuda_graph", "true", "--spread", "4"), "--distributed_lamb false"),
        (("--distributed_lamb", "false", "--exchange", "ring"), "--exchange in_network"),
    ],
)
def test_a_flag_that_is_advised_gives_the_step_that_was_told(
    flags: tuple[str, ...], change: str
) -> None:
    asked = (1000, *flags, "--json")
    before = json.loads(plan(*asked))["by_ranks"][-1]
    (advice,) = [one for one in before["advice"] if change in one]
    (after,) = re.findall(r"would shorten a step from \S+ to (\S+) ms", advice)
    changed = json.loads(plan(*asked, *change.split()))["by_ranks"][-1]
    assert after == milliseconds(changed["step_seconds"])
