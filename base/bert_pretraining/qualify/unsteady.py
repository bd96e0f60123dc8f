"""Which parts of an update give other bits when they are repeated, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.kernels import OPERATORS, Kernels
from bert_pretraining.kernels.fp8_casts import FORMATS
from bert_pretraining.kernels.proof import PROBLEMS
from bert_pretraining.kernels.proof_problem import Sizes
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.qualify.fingerprint import plain_pass
from bert_pretraining.qualify.workload import Workload
from bert_pretraining.runtime import arithmetic, process_group
from bert_pretraining.runtime.replicas import digest

REPEATS = 10
# Operators that a gradient passes in sequence, forward and backward: of a layer four products,
# attention, GELU and two LayerNorms; of embeddings, heads and losses as many at most.
OPERATORS_OF_A_LAYER = 2 * 8
SEED = 11
MESSAGE = 2**20  # numbers of the all-reduce
Attempt = Callable[[], Sequence[Tensor]]


def unsteady_operators(work: Workload, batch: PackedBatch, ranks: int) -> dict[str, str]:
    """Operator -> the first result that has other bits when the same call is repeated.

    The operators of the model, each by itself, forward and backward, at the batch's sizes. Every
    rank must call it.
    """
    found: dict[str, str] = {}
    for name, attempt in _attempts(work, batch, ranks):
        first = [digest(tensor) for tensor in attempt()]
        for _ in range(REPEATS):
            again = [digest(tensor) for tensor in attempt()]
            differing = [
                number
                for number, pair in enumerate(zip(first, again, strict=True))
                if not torch.equal(*pair)
            ]
            if differing and name not in found:
                found[name] = "output" if differing[0] == 0 else f"gradient {differing[0]}"
    choice = work.training.module.kernels.choice
    named = {name: f"{name} of {choice[name]}" if name in choice else name for name in found}
    return {named[name]: what for name, what in found.items()}


def gradient_difference(work: Workload, batch: PackedBatch) -> dict[str, object]:
    """How far a parameter's gradients of equal passes are apart, at most, over the repeats.

    "share_of_norm": of its own norm, or of the norm of as many average elements of the whole
    gradient if that is larger: some gradients, as those of the keys' biases, are all rounding.
    "parameter": its name. "bound": of the share, see `difference_bound`.
    """
    first = plain_pass(work, batch, SEED)
    norms = {name: gradient.float().norm().item() for name, gradient in first.items()}
    count = sum(gradient.numel() for gradient in first.values())
    average = math.sqrt(sum(norm**2 for norm in norms.values()) / count)
    worst, where, bound = 0.0, "", difference_bound(work, batch)
    for _ in range(REPEATS):
        again = plain_pass(work, batch, SEED)
        for name, gradient in first.items():
            size = max(norms[name], average * math.sqrt(gradient.numel()), 1e-30)
            share = (again[name].float() - gradient.float()).norm().item() / size
            if share > worst:
                worst, where = share, name
            elif not math.isfinite(share):
                return {"share_of_norm": math.inf, "parameter": name, "bound": bound}
    return {"share_of_norm": worst, "parameter": where, "bound": bound}


def difference_bound(work: Workload, batch: PackedBatch) -> float:
    """How far the gradients of two equal passes may be apart, as a share of their norms.

    Each of the m operators on a gradient's way rounds what it computes, by eps of its dtype. A sum
    of n terms in float32, added in any order, is off by its eps * sqrt(n). Independent roundings
    add up as the root of their number (as in `kernels/proof.py`; Higham and Mary, "A new approach
    to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019), and each of the two
    passes is off by as much:

        2 * sqrt(m) * (eps + eps_float32 * sqrt(n))

    In fp8 this is above 1, and tells nothing.
    """
    weight = work.training.module.bert.embeddings.word_embeddings.weight
    eps = arithmetic.rounding(weight.device, weight.dtype)
    if work.training.fp8 is not None:
        eps = max(torch.finfo(dtype).eps for dtype in FORMATS)
    operators = OPERATORS_OF_A_LAYER * (work.model.num_hidden_layers + 1)
    terms = max(batch.num_tokens, work.model.padded_vocab_size)
    of_sums = torch.finfo(torch.float32).eps * math.sqrt(terms)
    return 2.0 * math.sqrt(operators) * (eps + of_sums)


def _attempts(work: Workload, batch: PackedBatch, ranks: int) -> Iterator[tuple[str, Attempt]]:
    """Each operator, and how to call it; one after the other, so that its inputs are freed."""
    module = work.training.module
    weight = module.bert.embeddings.word_embeddings.weight
    device, dtype = weight.device, weight.dtype
    sizes, model = _sizes(work, batch), work.model
    kernels: Kernels = module.kernels
    for name in OPERATORS:
        yield name, _of_operator(getattr(kernels, name), name, sizes, device, dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    torch.manual_seed(SEED)
    x = random(sizes.tokens, model.hidden_size)
    inner = random(model.intermediate_size, model.hidden_size)
    bias, norm = random(model.hidden_size), random(model.hidden_size)
    places = batch.masked_positions
    yield "matrix product", _differentiated(lambda: F.linear(x, inner), [x, inner])
    yield (
        "selection of the masked tokens",
        _differentiated(lambda: x.index_select(0, places), [x]),
    )
    yield (
        "LayerNorm of the MLM head",
        _differentiated(lambda: F.layer_norm(x, norm.shape, norm, bias), [x, norm, bias]),
    )
    if ranks > 1:
        message = torch.randn(MESSAGE, device=device)
        yield "all-reduce", lambda: [process_group.sum_over_ranks(message.clone())]


def _of_operator(
    function: Callable, name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Attempt:
    """One of OPERATORS, with the inputs of its proof."""

    problem = PROBLEMS[name](sizes, device, dtype)
    inputs = list(problem.inputs.values())

    def attempt() -> list[Tensor]:
        torch.manual_seed(SEED)
        output = problem.call_whole(function, sizes.dropout if problem.drops else 0.0)
        direction = torch.randn(output.shape, device=device).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, inputs, direction)]

    return attempt


def _differentiated(call: Callable[[], Tensor], inputs: list[Tensor]) -> Attempt:
    """A call's output and its gradients."""

    def attempt() -> list[Tensor]:
        torch.manual_seed(SEED)
        output = call()
        direction = torch.randn(output.shape, device=output.device).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, inputs, direction)]

    return attempt


def _sizes(work: Workload, batch: PackedBatch) -> Sizes:
    """Of the batch itself."""
    model = work.model
    return Sizes(
        lengths=tuple(batch.cu_seqlens.diff().tolist()),
        masked=batch.num_masked,
        heads=model.num_attention_heads,
        head_size=model.head_size,
        inner=model.intermediate_size,
        vocabulary=model.padded_vocab_size,
        positions=model.max_position_embeddings,
        segments=model.type_vocab_size,
        epsilon=model.layer_norm_epsilon,
        dropout=model.hidden_dropout_prob,
    )
