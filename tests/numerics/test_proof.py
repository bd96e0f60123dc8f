"""The proof of kernels: right providers pass, and each kind of wrong one is caught."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from bert_pretraining.kernels import OPERATORS, PROVIDERS, Target
from bert_pretraining.kernels.proof import Case, cases, find_fault, judge, measure
from bert_pretraining.kernels.proof_problem import Sizes, lengths_of, small
from bert_pretraining.runtime import arithmetic
from fake_kernels import spoiled

CPU = torch.device("cpu")
SIZES = Sizes(
    lengths=lengths_of(9, 64, 9 * 35),
    masked=47,
    heads=4,
    head_size=16,
    inner=256,
    vocabulary=512,
    positions=64,
    segments=2,
    epsilon=1e-12,
    dropout=0.1,
)
DROPPING = [operator for operator in OPERATORS if len(cases(operator, SIZES)) == 4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def faults(
    function: object, operator: str, dtype: torch.dtype, sizes: Sizes = SIZES
) -> list[str | None]:
    """Of every case in its order: small without and with dropout, then the run's size."""
    target = Target(CPU, dtype, sizes.head_size)
    return [
        find_fault(function, case.problem(target), case.dropout) for case in cases(operator, sizes)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_right_kernels_pass(provider: str, operator: str, dtype: torch.dtype) -> None:
    function = PROVIDERS[provider].find(operator, Target(CPU, dtype, 16)).function
    assert set(faults(function, operator, dtype)) == {None}


@pytest.mark.parametrize("operator", OPERATORS)
def test_right_kernels_pass_at_the_sizes_of_bert_large(operator: str) -> None:
    """Of which only a part is compared."""
    sizes = Sizes(lengths_of(4, 512, 1023), 150, 16, 64, 4096, 30528, 512, 2, 1e-12, 0.1)
    function = PROVIDERS["torch"].find(operator, Target(CPU, torch.float32, 64)).function
    assert set(faults(function, operator, torch.float32, sizes)) == {None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_one_wrong_gradient_element_is_caught(operator: str, dtype: torch.dtype) -> None:
    for fault in faults(spoiled(operator, "element"), operator, dtype):
        assert fault is not None
        assert fault.startswith("gradient of ")
        assert " differs by " in fault
        assert "(bound " in fault


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_worst_error_is_a_share_of_its_bound(operator: str) -> None:
    """Above 1 where something is wrong; None where there is no error to measure."""
    target = Target(CPU, torch.bfloat16, SIZES.head_size)
    case = cases(operator, SIZES)[0]

    def judged(function: object) -> tuple[str | None, float | None]:
        found = judge(function, case.problem(target), case.dropout)
        return found.fault, found.worst

    fault, worst = judged(PROVIDERS["torch"].find(operator, target).function)
    assert fault is None
    assert 0.0 < worst <= 1.0
    fault, worst = judged(spoiled(operator, "element"))
    difference, bound = re.search(r"differs by (\S+) .*\(bound (\S+)\)", fault).groups()
    assert worst == pytest.approx(float(difference) / float(bound), rel=0.1)
    assert worst > 1.0
    assert judged(spoiled(operator, "nan"))[1] is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_finite_is_caught(operator: str) -> None:
    for fault in faults(spoiled(operator, "nan"), operator, torch.float32):
        assert fault.startswith("gradient of ")
        assert " is nan at [" in fault


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_that_is_wrong_for_many_rows_only_is_caught(operator: str) -> None:
    sizes = dataclasses.replace(SIZES, masked=140)
    found = faults(spoiled(operator, "large"), operator, torch.bfloat16, sizes)
    half = len(found) // 2
    assert set(found[:half]) == {None}
    assert None not in found[half:]


@pytest.mark.parametrize("operator", DROPPING)
def test_another_mask_in_the_backward_pass_is_caught(operator: str) -> None:
    without, dropped, *_ = faults(spoiled(operator, "mask"), operator, torch.float32)
    assert without is None
    assert dropped.startswith("gradient of ")


@pytest.mark.parametrize("operator", DROPPING)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("data", "does not follow from the random state alone"),
        ("constant", "is the same for every random state"),
        ("rate", "it drops "),
    ],
)
def test_masks_of_a_wrong_kind_are_caught(operator: str, kind: str, message: str) -> None:
    without, dropped, *_ = faults(spoiled(operator, kind), operator, torch.float32)
    assert without is None
    assert message in dropped


def test_a_gradient_beside_the_compared_part_is_caught() -> None:
    """At the real size only some rows have a gradient; the others must get none."""
    sizes = dataclasses.replace(SIZES, lengths=lengths_of(40, 64, 2500), inner=1024)
    found = faults(spoiled("bias_gelu", "leak"), "bias_gelu", torch.float32, sizes)
    assert found[1].startswith("gradient of x is 0.001 at [")
    assert found[1].endswith(" instead of 0")


def test_a_wrong_count_of_right_predictions_is_caught() -> None:
    def wrong(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, correct = (
            PROVIDERS["torch"].find("masked_cross_entropy", None).function(logits, labels)
        )
        return loss, correct + 1

    found = faults(wrong, "masked_cross_entropy", torch.float32)
    assert all(" predictions count as correct, not " in fault for fault in found)


def test_a_missing_gradient_is_caught() -> None:
    def wrong(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x + bias.detach(), approximate="tanh")

    assert faults(wrong, "bias_gelu", torch.float32)[0] == "there is no gradient of bias"


@pytest.mark.parametrize(
    ("sequences", "longest", "tokens"), [(1, 64, 40), (2, 64, 80), (3, 64, 70), (56, 512, 14325)]
)
def test_lengths_have_both_extremes_and_the_sum(sequences: int, longest: int, tokens: int) -> None:
    lengths = lengths_of(sequences, longest, tokens)
    assert len(lengths) == sequences
    assert max(lengths) == longest
    if sequences > 1:
        assert min(lengths) == 1
    if sequences > 2:
        assert sum(lengths) == tokens


def test_the_small_problem_is_odd_and_fits_short_positions() -> None:
    assert small(SIZES).tokens % 2 == 1
    assert 1 in small(SIZES).lengths
    short = small(dataclasses.replace(SIZES, positions=16))
    assert max(short.lengths) <= short.positions == 16


def test_a_case_says_its_shape() -> None:
    sizes = dataclasses.replace(SIZES, lengths=(17,), inner=1024)
    texts = [
        Case(operator, sizes, False, 0.1).describe(torch.bfloat16)
        for operator in ("attention", "bias_gelu", "bias_dropout_residual_layer_norm")
    ]
    assert texts == [
        "17 x 4 x 16 bf16, dropout 0.1",
        "17 x 1024 bf16",
        "17 x 64 bf16, dropout 0.1",
    ]


def test_times_are_positive() -> None:
    for operator in OPERATORS:
        target = Target(CPU, torch.float32, 16)
        problem = Case(operator, SIZES, True, 0.1).problem(target)
        function = PROVIDERS["torch"].find(operator, target).function
        assert measure(function, problem, 0.1) > 0.0


def test_products_in_tf32_are_right_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they are emulated: each number that enters is cut to 10 bits after the point."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(_, x: torch.Tensor) -> torch.Tensor:
            return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

        @staticmethod
        def backward(_, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    right = PROVIDERS["torch"].find("attention", Target(CPU, torch.float32, 16)).function

    def in_tf32(qkv: torch.Tensor, *others: object) -> torch.Tensor:
        return right(Cut.apply(qkv), *others)

    assert all(faults(in_tf32, "attention", torch.float32))
    monkeypatch.setattr(arithmetic, "multiplies_in_tf32", lambda _: True)
    assert set(faults(in_tf32, "attention", torch.float32)) == {None}
    # Operators without products are held to float32 all the same.
    wrong = spoiled("bias_gelu", "element")
    assert all(faults(wrong, "bias_gelu", torch.float32))
