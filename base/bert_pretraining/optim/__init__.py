"""LAMB, the learning-rate schedule and loss scaling."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from bert_pretraining.optim.chunked_lamb import ChunkedLamb
from bert_pretraining.optim.lamb import ForeachLamb, Lamb, LambSettings, ReferenceLamb
from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.schedule import Schedule

OPTIMIZERS = {"reference": ReferenceLamb, "foreach": ForeachLamb, "chunked": ChunkedLamb}


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    settings: LambSettings,
    masters: dict[str, Tensor] | None = None,
) -> Lamb:
    """The optimizer called `name`; "auto" is the fastest that equals the reference.

    masters: the float32 weights that 16-bit parameters were rounded from, by name.
    """
    named = list(named_parameters)
    if name == "auto":
        name = "chunked" if named[0][1].device.type == "cpu" else "foreach"
    return OPTIMIZERS[name](named, settings, masters)


__all__ = [
    "OPTIMIZERS",
    "ForeachLamb",
    "Lamb",
    "LambSettings",
    "LossScale",
    "ReferenceLamb",
    "Schedule",
    "create_optimizer",
]
