"""`qualify`: a flipped bit, a rank unlike the others and operators without order are named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fake_kernels
from bert_pretraining.config import Config
from bert_pretraining.errors import TrainingError
from bert_pretraining.kernels import PROVIDERS
from bert_pretraining.qualify import determinism, workload
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.determinism import Found, Record
from bert_pretraining.qualify.fingerprint import Mark
from bert_pretraining.qualify.record import FAIL, NOTE, PASS
from bert_pretraining.qualify.unsteady import difference_bound
from bert_pretraining.qualify.workers import TooLate
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime.process_group import Ranks
from helpers import ROOT
from qualify_doubles import SMALL, context_of, flipping_ranks, ignored

CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rank is this process, and the model is small."""
    monkeypatch.setattr(workload, "BERT_LARGE", SMALL)

    def run_ranks(
        context: Context, program: str, ranks: int, given: Mapping, limit: float
    ) -> list[dict]:
        assert (program, ranks) == ("determinism:measure", 1)
        assert limit > 0
        if context.config.deterministic:
            arithmetic.use_deterministic_operators(context.device)
        found = determinism.measure(context, Ranks(0, 1, CPU), given)
        return [json.loads(json.dumps(found))]

    monkeypatch.setattr(determinism, "run_ranks", run_ranks)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("here")
def test_equal_bits_pass(tmp_path: Path) -> None:
    context = context_of(tmp_path, ranks=1)
    finding = determinism.run(context, ignored)
    assert finding.verdict == PASS, finding
    assert finding.reason == "equal bits in 3 rounds of 1 step"
    figures = finding.figures
    assert (figures["rounds"], figures["steps"], figures["ranks"]) == (3, 1, 1)
    assert figures["loss"] > 0.0
    assert figures["gradient_norm"] > 0.0
    assert figures["differences"] == []
    assert list(figures["fingerprints"]) == ["step 1", "weights"]
    again = determinism.run(context, ignored)
    assert again.figures["fingerprints"] == figures["fingerprints"]
    # Not quick: more steps, each from the weights that the step before has left.
    longer = determinism.run(replace(context, quick=False, minutes=0.001), ignored)
    assert longer.reason == "equal bits in 5 rounds of 4 steps"
    prints = longer.figures["fingerprints"]
    assert len(set(prints.values())) == len(prints) == 5


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_equal_bits_in_less_precision(tmp_path: Path, precision: str) -> None:
    """Masters, moments and fp8's scales come back with each round."""
    config = Config(device="cpu", precision=precision, checkpoint_activations=True)
    finding = determinism.run(context_of(tmp_path, ranks=1, config=config), ignored)
    assert finding.verdict == PASS, finding


@pytest.mark.usefixtures("here")
def test_an_operator_with_other_bits_each_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note if deterministic operators have equal bits; a fail if they have not."""
    context = context_of(tmp_path, ranks=1)
    for fault, verdict in (("loose", NOTE), ("noise", FAIL)):
        provider = fake_kernels.provider("torch", {"bias_gelu": fault})
        monkeypatch.setitem(PROVIDERS, "torch", provider)
        finding = determinism.run(context, ignored)
        torch.use_deterministic_algorithms(False)
        assert finding.verdict == verdict, finding
        named = "because of bias_gelu of torch (output); gradients differ by at most "
        assert named in finding.reason
        assert list(finding.figures["unsteady"]) == ["bias_gelu of torch"]
        share, bound = (finding.figures[f"gradient_difference_{of}"] for of in ("share", "bound"))
        assert 1e-8 < share < bound
        assert f" of their norms (bound {bound:.1g})" in finding.reason
        assert ("with --deterministic the bits are equal" in finding.reason) == (verdict == NOTE)
        assert ("though --deterministic was on" in finding.reason) == (verdict == FAIL)
    config = replace(context.config, deterministic=True)
    finding = determinism.run(replace(context, config=config), ignored)
    assert finding.verdict == FAIL
    assert "bias_gelu of torch (output)" in finding.reason


@pytest.mark.usefixtures("here")
def test_an_operator_that_differs_by_more_than_rounding_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its bits are equal with --deterministic."""
    monkeypatch.setitem(PROVIDERS, "torch", fake_kernels.provider("torch", {"bias_gelu": "wild"}))
    finding = determinism.run(context_of(tmp_path, ranks=1), ignored)
    assert finding.verdict == FAIL
    assert "because of bias_gelu of torch (output); gradients differ by at most " in finding.reason
    assert "which rounding in any order does not explain; choose another pro" in finding.reason
    share, bound = (finding.figures[f"gradient_difference_{of}"] for of in ("share", "bound"))
    assert bound < share < 1.0


@pytest.mark.parametrize(
    ("precision", "layers", "expected"),
    [("fp32", 1, 2 * 32**0.5 * 2**-23 * (1 + 568**0.5)), ("bf16", 1, 2 * 32**0.5 * 2**-7),
     ("bf16", 7, 2 * 128**0.5 * 2**-7), ("fp8", 1, 2 * 32**0.5 * 2**-2)],
)  # fmt: skip
def test_the_bound_of_gradients_follows_from_dtype_depth_and_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, layers: int, expected: float
) -> None:
    monkeypatch.setattr(workload, "BERT_LARGE", replace(SMALL, num_hidden_layers=layers))
    config = Config(device="cpu", precision=precision)
    context = context_of(tmp_path, ranks=1, layers=layers, config=config)
    work = workload.Workload(context, Ranks(0, 1, CPU), 2, 1)
    (batch,) = workload.made_up(2, 1, work.model, 1)
    terms = max(batch.num_tokens, work.model.padded_vocab_size)
    assert terms == 568
    assert difference_bound(work, batch) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("here")
def test_where_deterministic_cannot_run_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "torch", fake_kernels.provider("torch", {"bias_gelu": "loose"}))
    run_ranks = determinism.run_ranks

    def refused(context: Context, *rest: object) -> list[dict]:
        if context.config.deterministic:
            raise TrainingError("rank 0: RuntimeError: no deterministic implementation")
        return run_ranks(context, *rest)

    monkeypatch.setattr(determinism, "run_ranks", refused)
    finding = determinism.run(context_of(tmp_path, ranks=1), ignored)
    assert finding.verdict == NOTE
    assert "--deterministic does not run here: rank 0: RuntimeError: no dete" in finding.reason


def test_ranks_that_cannot_make_a_step_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hung(*_: object) -> list[dict]:
        raise TooLate("rank 1 did not end within 110 s")

    monkeypatch.setattr(determinism, "run_ranks", hung)
    finding = determinism.run(context_of(tmp_path), ignored)
    assert finding.verdict == FAIL
    assert finding.reason == "the ranks cannot make a step: rank 1 did not end within 110 s"
    assert finding.is_late


@pytest.mark.usefixtures("here")
def test_rounds_that_hang_at_last_keep_their_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third round of three."""
    context = context_of(tmp_path, ranks=1)
    right = determinism.run(context, ignored).figures
    fingerprint, calls = determinism.fingerprint, []

    def hangs(*arguments: object) -> list[Mark]:
        calls.append(1)
        if len(calls) == 3:
            raise TooLate("rank 0 did not end within 110 s")
        return fingerprint(*arguments)

    monkeypatch.setattr(determinism, "fingerprint", hangs)
    finding = determinism.run(context, ignored)
    assert finding.verdict == FAIL
    assert finding.reason == (
        "the rounds fail: rank 0 did not end within 110 s; until then equal bits in 2 rounds of "
        "1 step"
    )
    assert finding.is_late
    assert finding.figures == {**right, "rounds": 2}


def test_a_bit_flipped_on_one_rank_in_one_round_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks that are processes. It is the second round of two."""
    fault = flipping_ranks(tmp_path / "site", rank=1, update=3)
    paths = [str(fault), str(ROOT / "base")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    finding = determinism.run(context_of(tmp_path), ignored)
    assert finding.verdict == FAIL, finding
    assert finding.reason.startswith(
        "rank 1 differs in round 2 of 2 in step 1: first weight "
        "bert.encoder.layer.0.intermediate.dense.weight; do not train on that device"
    )
    # The other rank gets its gradient, and differs later in the same round.
    assert finding.notes[0].startswith("rank 0 differs in round 2 of 2 ")
    assert "deterministic" not in finding.figures


# ---- what the ranks' checksums show


def ranks_with(
    rounds: list[list[str]], like: list[list[object]] | None = None, unsteady: str = ""
) -> list[dict[str, object]]:
    """Ranks of a single step each. rounds: of each rank, a letter for each round.

    Letters stand for fingerprints: "a" is usual; in "b" an output differs, in "u" the update.
    """
    digests = {"a": ("2.2", "3"), "b": ("2.3", "4"), "u": ("2.2", "5"), "v": ("2.2", "6")}
    marks = {
        letter: [
            ("weight w", "1.1", None),
            ("output of layer 0", output, 0.5 if output == "2.2" else 0.25),
            ("update: norm", norm, float(norm)),
        ]
        for letter, (output, norm) in digests.items()
    }
    return [
        {
            "rounds": [[letter, f"end {letter}"] for letter in letters],
            "marks": [
                {letter: marks[letter] for letter in letters},
                {f"end {letter}": [("weight w", letter, None)] for letter in letters},
            ],
            "unsteady": {unsteady: "output"} if unsteady else {},
            "gradient_difference": None,
            "like": like[rank] if like else ["CPU", 1],
            "said": [],
        }
        for rank, letters in enumerate(rounds)
    ]


def test_a_single_difference_is_corruption() -> None:
    found = Found(ranks_with(["aaa", "aba"]))
    assert found.is_corruption
    assert found.told == (
        "rank 1 differs in round 2 of 3 in step 1: first output of layer 0 (0.25 instead of 0.5)"
    )
    assert found.figures()["fingerprints"] == {"step 1": "a", "weights": "end a"}
    only = Found(ranks_with(["aab"]))
    assert (only.is_corruption, only.told[:29]) == (True, "rank 0 differs in round 3 of ")
    # The first round may be the wrong one.
    assert Found(ranks_with(["baa"])).told.startswith("rank 0 differs in round 1 of 3 ")
    assert Found(ranks_with(["ba", "aa"])).told.startswith("rank 0 differs in round 1 of 2 ")
    assert Found(ranks_with(["au", "aa"])).is_corruption


def test_the_rank_where_it_arose_comes_first() -> None:
    """What one rank computes changes the mean gradient of all."""
    found = Found(ranks_with(["aau", "aab", "aau"]))
    assert [(one.rank, one.name) for one in found.differences] == [
        (1, "output of layer 0"),
        (0, "update: norm"),
        (2, "update: norm"),
    ]


def test_ranks_that_differ_always_are_unlike_or_wrong() -> None:
    found = Found(ranks_with(["aa", "bb", "aa"]))
    assert found.is_corruption
    assert found.told.startswith("rank 1 and rank 0 compute different bits in every round: ")
    unlike = Found(ranks_with(["aa", "bb"], [["CPU", 1], ["CPU", 2]]))
    assert not unlike.is_corruption
    assert "are not alike" in unlike.advice


def test_sums_in_any_order_are_no_corruption() -> None:
    """Of the ranks or of the optimizer, which are not tried by themselves."""
    assert not Found(ranks_with(["auv"])).is_corruption
    assert not Found(ranks_with(["au", "au"])).is_corruption
    assert not Found(ranks_with(["aab"], unsteady="attention")).is_corruption
    assert not Found(ranks_with(["aaa", "aaa"])).is_corruption


def test_weights_that_differ_at_the_start_are_corruption_whatever_the_kernels_do() -> None:
    ranks = ranks_with(["aaa", "aba"], unsteady="attention")
    assert not Found(ranks).is_corruption
    ranks[1]["marks"][0]["b"][0] = ("weight w", "1.9", None)
    found = Found(ranks)
    assert found.is_corruption
    assert found.told == "rank 1 differs in round 2 of 3 in step 1: first weight w"
    assert found.advice.startswith("do not train on that device")


def test_a_record_keeps_a_few_fingerprints() -> None:
    record = Record(1)
    for number in range(20):
        record.add(0, [Mark("loss", str(number), 1.0)])
        record.add(1, [Mark("weight w", "1.1", None)])
    assert len(record.rounds) == 20
    assert len({row[0] for row in record.rounds}) == 20
    assert len({row[1] for row in record.rounds}) == 1
    assert [len(marks) for marks in record.marks] == [determinism.KEPT, 1]
    assert record.differs
