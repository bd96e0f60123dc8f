"""The proof of a compiled or captured micro-step: it must train as the eager one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.losses import LossSum
from bert_pretraining.runtime import agreement, arithmetic

# Rounding of compiled and eager gradients differs by so many units of the dtype, relative to the
# root mean square of a parameter's gradient or of the largest one: a key's bias has a gradient of
# rounding errors alone.
ROUNDINGS = 32.0
# Dropout masks of compiled code are other ones. Gradients may differ by so many times as much as
# those of two eager passes with different masks.
MASKS = 4.0
IDS = 5  # every vocabulary has so many words

Sums = dict[str, LossSum]


def sample_batch(sequences: int, tokens: int, masked: int, device: torch.device) -> PackedBatch:
    """A batch of random tokens in sequences of about equal length, with labels."""
    ends = torch.linspace(0, tokens, sequences + 1).to(torch.int32)
    lengths = ends.diff().tolist()
    batch = PackedBatch(
        input_ids=torch.randint(IDS, (tokens,), dtype=torch.int32),
        segment_ids=torch.zeros(tokens, dtype=torch.int32),
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=ends,
        masked_positions=torch.randint(tokens, (masked,), dtype=torch.int32),
        masked_labels=torch.randint(IDS, (masked,)),
        next_sentence_labels=torch.randint(2, (sequences,)),
        max_seqlen=max(lengths),
    )
    return batch.to(device)


def difference(
    module: nn.Module,
    eager: Callable[[], Sums],
    other: Callable[[], Sums],
    zero_grad: Callable[[], None],
    gradient_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.grad,
) -> str | None:
    """How loss or gradients of `other` differ from the eager ones beyond their bounds, or None.

    Both add the gradients of the same batch to the module's parameters; zero_grad zeroes them, and
    gradient_of tells where they are.
    Two eager passes with different random states show how much dropout changes; without dropout
    only rounding may differ. With dropout, an error that is smaller than its effect is not found.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def run(step: Callable[[], Sums], seed: int) -> tuple[float, list[Tensor]]:
        zero_grad()
        torch.manual_seed(seed)
        sums = step()
        loss = float(sum(part.loss.double() for part in sums.values()))
        return loss, [gradient_of(parameter) for _, parameter in named]

    loss, gradients = run(eager, 1)
    first = [gradient.clone() for gradient in gradients]
    other_loss, gradients = run(eager, 2)
    by_masks = _norms([a - b for a, b in zip(gradients, first, strict=True)])
    mask_loss = abs(other_loss - loss)
    our_loss, gradients = run(other, 1)
    found = _norms([a - b for a, b in zip(gradients, first, strict=True)])
    sizes = _norms(first)
    zero_grad()
    unit = ROUNDINGS * arithmetic.rounding(first[0].device, named[0][1].dtype)
    bound = MASKS * mask_loss + (0.05 * abs(loss) if mask_loss else 0.0) + unit * abs(loss)
    if not abs(our_loss - loss) <= bound:
        return f"the loss differs by {abs(our_loss - loss):.2g} of {loss:.4g} (bound {bound:.2g})"
    counts = torch.tensor([float(gradient.numel()) for gradient in first]).sqrt()
    relative = by_masks.norm() / sizes.norm().clamp(min=1e-30)
    bounds = MASKS * torch.maximum(by_masks, relative * sizes)
    bounds += unit * (sizes + (sizes / counts).max() * counts)
    excess = found / bounds.clamp(min=1e-30)
    worst = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
    if not excess[worst] <= 1.0:
        return (
            f"the gradient of {named[worst][0]} differs by {found[worst]:.2g} of "
            f"{sizes[worst]:.2g} (norms; bound {bounds[worst]:.2g})"
        )
    return None


def first_fault(action: Callable[[], None], device: torch.device) -> str | None:
    """The error of the first rank on which the action fails, in one line, or None.

    Every rank must call it; device: of the calling rank.
    """
    reason = None
    try:
        action()
    except Exception as error:  # compilers raise errors of many kinds
        reason = reason_of(error)
    return agreement.first_said(reason, device)


def reason_of(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, UserError):
        return error.problem
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().norm() for tensor in tensors]).cpu()
