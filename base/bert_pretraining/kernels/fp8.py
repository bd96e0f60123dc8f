"""The state of delayed scaling: the scales of all layers that compute in fp8, and their weights.

Each rank has its own scales. See `fp8_casts.py` for the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8_casts import (
    FORMATS,
    LARGEST,
    WEIGHT,
    Cast,
    Quantised,
    largest_of,
    scale_for,
)
from bert_pretraining.kernels.fp8_engine import engine_for
from bert_pretraining.kernels.fp8_weights import WeightCast
from bert_pretraining.runtime.words import counted


class Scaling:
    """The scales of one linear layer, as views of the table that its `Fp8State` owns.

    Attributes:
        scales, inverses, maxima: three 0-d float32 tensors each, for INPUT, WEIGHT, GRADIENT. The
            maxima are those since the last update.
    """

    def __init__(self, state: Fp8State, number: int) -> None:
        self._state, self._number = state, number
        self.engine = state.engine
        scales, inverses, maxima = state.table[:, number]
        self.scales, self.inverses = scales.unbind(), inverses.unbind()
        self.maxima = maxima.unbind()

    def cast(self, x: Tensor, which: int, record: bool) -> Quantised:
        """x, (T, C), in the format of INPUT, WEIGHT or GRADIENT.

        record: whether its largest number counts for the next update's scale.
        """
        if not self._state.calibrated:
            self._measure(x, which)
        return self.engine.cast(x.detach(), *self._how(which, record))

    def fused_cast(self, which: int, record: bool) -> Cast | None:
        """How an operator may cast its result, which has this product as its only reader in fp8.

        None where `cast` must do it: while tensors are measured, and where the device's cast has
        another form than that of operators.
        """
        usable = self.engine.fuses and self._state.calibrated
        return self._how(which, record) if usable else None

    def _how(self, which: int, record: bool) -> Cast:
        return Cast(self.scales[which], FORMATS[which], self.maxima[which] if record else None)

    def cast_weight(self, weight: Tensor, record: bool) -> Quantised:
        """The layer's weight, (N, K): the copy that the state keeps, where it keeps one."""
        kept = self._state.kept_weight(self._number)
        return self.cast(weight, WEIGHT, record) if kept is None else kept

    @torch.no_grad()
    def _measure(self, x: Tensor, which: int) -> None:
        scale = scale_for(largest_of(x), LARGEST[which], self.scales[which])
        self.scales[which].copy_(scale)
        self.inverses[which].copy_(1.0 / scale)


class Fp8State:
    """The scales of all linear layers that compute in fp8, and their update.

    Until the first `update` each tensor is measured before it is cast ("just in time"), which
    costs a pass more. Later the scales are those of the update before.

    If it knows the layers' weights, it casts them in `update`, all at once and once for all
    micro-batches and evaluations until the next one. They must not change in between.

    Attributes:
        names: of the layers. engine: see `engine_for`.
        calibrated: whether the first update has been made. Work that is captured for later must be
            captured inside `as_calibrated`.
        table: (3, layers, 3) float32 on the device; see `update_scales`.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        weights: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        """UserError where the device has no fp8 and does not emulate it either.

        weights: of each layer, the matrices that make up its weight, one below the other.
        """
        self.names = tuple(names)
        self.engine = engine_for(device)
        self.calibrated = False
        self.table = torch.zeros((3, len(self.names), 3), device=device)
        self.table[:2] = 1.0
        self._scalings = {name: Scaling(self, number) for number, name in enumerate(self.names)}
        self._weights = [tuple(parts) for parts in weights or ()]
        self._cast_weights: WeightCast | None = None
        self._weights_are_cast = False

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> Fp8State:
        """The state for a model: every submodule that has an attribute `scaling` gets its own.

        The weight of such a layer is all matrices among its parameters, one below the other.
        """
        layers = {name: one for name, one in module.named_modules() if hasattr(one, "scaling")}
        weights = [
            [one for one in layer.parameters() if one.ndim == 2] for layer in layers.values()
        ]
        state = cls(list(layers), device, weights)
        for name, layer in layers.items():
            layer.scaling = state[name]
        return state

    def __getitem__(self, name: str) -> Scaling:
        return self._scalings[name]

    @torch.no_grad()
    def update(self) -> None:
        """Set the scales from the maxima seen since the last call, and cast the new weights.

        Call it after each optimizer step, on every rank, also after one that was skipped. A layer
        whose maximum is 0 or not finite keeps its scale.
        """
        self.engine.update(self.table)
        self.calibrated = True
        self.cast_weights()

    @torch.no_grad()
    def cast_weights(self) -> None:
        """Cast the weights as they are now, where the state knows them."""
        if self._weights:
            if self._cast_weights is None:
                self._cast_weights = self.engine.weights(self._weights)
            self._cast_weights(self.table)
            self._weights_are_cast = True

    def kept_weight(self, number: int) -> Quantised | None:
        """A layer's weight in fp8; None while weights are measured, and where none are known."""
        if not self._weights or not self.calibrated:
            return None
        if not self._weights_are_cast:
            self.cast_weights()
        return self._cast_weights.kept[number]

    def forget(self) -> None:
        """Forget what was seen since the last update: all maxima, and the copies of weights."""
        self.table[2].zero_()
        self._weights_are_cast = False

    def as_calibrated(self) -> Calibrated:
        """A context for warm-up and capture: scales are used as they are, maxima are forgotten."""
        return Calibrated(self)

    def state_dict(self) -> dict:
        """This rank's scales, copied to main memory; nothing between two updates."""
        return {
            "names": list(self.names),
            "calibrated": self.calibrated,
            "scales": self.table[0].to("cpu", copy=True),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore, bit for bit. UserError, and no change, if the layers are other ones."""
        if tuple(state["names"]) != self.names:
            raise UserError(
                "the checkpoint's fp8 scales are of another model: it has "
                f"{counted(len(state['names']), 'fp8 layer')}, and this model {len(self.names)}",
                "pass the checkpoint and the bert_config.json of one run",
            )
        self.table[0].copy_(state["scales"])
        self.table[1].copy_(1.0 / self.table[0])
        self.forget()
        self.calibrated = state["calibrated"]


class Calibrated:
    """See `Fp8State.as_calibrated`."""

    def __init__(self, state: Fp8State) -> None:
        self._state, self._before = state, state.calibrated

    def __enter__(self) -> None:
        self._before, self._state.calibrated = self._state.calibrated, True
        # What is captured must find the copies of the weights in memory, and not cast them.
        self._state.cast_weights()

    def __exit__(self, *_: object) -> None:
        self._state.calibrated = self._before
        self._state.forget()
        if self._before:
            self._state.cast_weights()
