"""8-bit floating point with delayed scaling: formats, casts, and the state of the scales.

A tensor x is stored as cast(scale * x), with scale = the format's largest number / the largest |x|
of the update before ("delayed", a history of one). So one pass over x casts it and finds the
maximum for the next update. Activations and weights are e4m3 (4 bits of exponent, 3 of mantissa),
gradients e5m2. Each rank has its own scales. See docs/fp8.md for the bounds of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices

INPUT, WEIGHT, GRADIENT = range(3)  # the tensors of a linear layer that have a scale each
FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = tuple(torch.finfo(dtype).max for dtype in FORMATS)  # 448, 448, 57344
# Scales stay below it, so that their inverses are normal float32 numbers.
MAX_SCALE = 2.0**100
MULTIPLE = 16  # cuBLASLt takes fp8 matrices whose rows are multiples of 16 bytes
OLDEST_CAPABILITY = (8, 9)  # the first CUDA devices with fp8 products: Ada; then Hopper


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cast(scale * x), and the largest |x| as a 0-d float32 tensor (0 for an empty x).

    x: of any shape and float dtype. scale: 0-d float32. dtype: one of FORMATS.
    A finite number too large for the format becomes its largest number. Infinity and NaN become
    NaN: an overflow that happened before must not vanish here, or the optimizer would not see it.
    """
    wide = x.float()
    largest = torch.finfo(dtype).max
    # The limits are applied here, because the versions of PyTorch cast larger numbers differently.
    scaled = torch.where(torch.isfinite(wide), (wide * scale).clamp(-largest, largest), torch.nan)
    return scaled.to(dtype), largest_of(wide)


def cast_bound(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """How far cast(scale * x) / scale may be from x, elementwise, where no element was too large.

    Half the distance of two neighbours: |x| / 17 in e4m3 and |x| / 9 in e5m2 at most, or half the
    least number of the format, 2^-10 or 2^-17, / scale, if that is more.
    """
    info = torch.finfo(dtype)
    half = info.eps / 2.0  # of the distance between 1 and the next number
    relative, least = half / (1.0 + half), info.tiny * half
    # The scale, its inverse and both products are rounded to float32: up to 2^-22 of the number,
    # and so 17 times as much of the bound.
    return (x.abs() * relative).clamp(min=least / float(scale)) * (1.0 + 2.0**-17)


def largest_of(x: Tensor) -> Tensor:
    """The largest |x|, 0-d float32; NaN if an element is NaN, 0 for an empty x."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


class Quantised(NamedTuple):
    """A matrix in fp8, in both orders, since a product reads both of its factors row by row.

    rows: (T, C). columns: its transpose, (C, T'), where T' may be T padded with zeros.
    """

    rows: Tensor
    columns: Tensor


def emulated_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """Cast a matrix; the largest |x| goes into `amax` if that is larger. columns is a view."""
    rows, largest = quantise(x, scale, dtype)
    if amax is not None:
        torch.maximum(amax, largest, out=amax)  # NaN stays
    return Quantised(rows, rows.t())


def padded_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Quantised:
    """As `emulated_cast`, but columns is contiguous and its rows are multiples of 16."""
    rows, columns = emulated_cast(x, scale, dtype, amax)
    count = x.shape[0]
    padded = -(-count // MULTIPLE) * MULTIPLE
    # Bytes, because PyTorch fills no fp8 tensors. A byte of 0 is the number 0.
    whole = torch.zeros((x.shape[1], padded), dtype=torch.uint8, device=x.device)
    whole[:, :count] = columns.view(torch.uint8)
    return Quantised(rows, whole.view(dtype))


def emulated_product(
    left: Tensor,
    right: Tensor,
    left_inverse: Tensor,
    right_inverse: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """left @ right.T, scaled back, added up in float32 and rounded once to `dtype`.

    left: (M, K), right: (N, K), in fp8; their inverse scales are 0-d; bias: (N,).
    """
    total = (left.float() @ right.float().t()) * (left_inverse * right_inverse)
    return (total if bias is None else total + bias.float()).to(dtype)


def device_product(
    left: Tensor,
    right: Tensor,
    left_inverse: Tensor,
    right_inverse: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """As `emulated_product`, on the tensor cores. K and N must be multiples of 16.

    Fast accumulation keeps fewer digits of the sums than float32; NVIDIA's submissions use it in
    all three products of a linear layer.
    """
    return compat.scaled_mm(
        left,
        right.t(),
        scale_a=left_inverse,
        scale_b=right_inverse,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


class Engine(NamedTuple):
    """How a device casts and multiplies; the functions have the signatures of the emulated ones.

    weights: makes what casts all weights at once; see `fp8_weights.EachWeight`.
    """

    name: str
    cast: Callable[[Tensor, Tensor, torch.dtype, Tensor | None], Quantised]
    product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, Tensor | None], Tensor]
    update: Callable[[Tensor], None]
    weights: Callable[[Sequence[Sequence[Tensor]]], WeightCast]


class WeightCast(Protocol):
    """Casts the weights of all layers into memory that stays where it is.

    Attributes:
        kept: for each layer its weight, as rows (N, K) and columns (K, N), both contiguous.
    """

    kept: Sequence[Quantised]

    def __call__(self, table: Tensor) -> None:
        """Cast by the scales of this table, and add the largest numbers to its maxima.

        table: see `update_scales`.
        """


def engine_for(device: torch.device) -> Engine:
    """The device's own fp8 on CUDA devices of capability 8.9 and later, emulation on a CPU.

    UserError for all others.
    """
    from bert_pretraining.kernels.fp8_weights import EachWeight

    if device.type == "cpu":
        return Engine("emulated", emulated_cast, emulated_product, update_scales, EachWeight)
    capability = devices.capability(device) if devices.is_cuda(device) else None
    if capability is None or capability < OLDEST_CAPABILITY or torch.version.hip:
        what = f"{devices.name(device)} has"
        if capability is not None:
            what += f" compute capability {capability[0]}.{capability[1]} and"
        raise UserError(
            f"--precision fp8: {what} no fp8 products of the kind that this program uses "
            "(NVIDIA GPUs of capability 8.9 and later have them)",
            "pass --precision bf16, or fp16 where the GPU has no bf16",
        )
    from bert_pretraining.kernels import triton_provider
    from bert_pretraining.kernels.provider import Target

    if triton_provider.unavailable(Target(device, torch.bfloat16, 64)) is not None:
        name = "device, cast by PyTorch"
        return Engine(name, padded_cast, device_product, update_scales, EachWeight)
    from bert_pretraining.kernels import triton_fp8, triton_fp8_weights

    name, all_weights = "device, cast by Triton", triton_fp8_weights.AllWeights
    return Engine(name, triton_fp8.cast, device_product, triton_fp8.update, all_weights)


def scale_for(amax: Tensor, largest: Tensor | float, before: Tensor) -> Tensor:
    """largest / amax; the scale before where amax is 0 or not finite."""
    known = torch.isfinite(amax) & (amax > 0.0)
    return torch.where(known, (largest / amax).clamp(max=MAX_SCALE), before)


def update_scales(table: Tensor) -> None:
    """Set scales and inverses from the maxima, and the maxima to 0, in place.

    table: (3, layers, 3) float32: scales, inverses, maxima, each by layer and INPUT, WEIGHT,
    GRADIENT.
    """
    scales, inverses, maxima = table
    largest = torch.tensor(LARGEST, device=table.device)
    scales.copy_(scale_for(maxima, largest, scales))
    inverses.copy_(1.0 / scales)
    maxima.zero_()


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
        amax = self.maxima[which] if record else None
        return self.engine.cast(x.detach(), self.scales[which], FORMATS[which], amax)

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
                f"{len(state['names'])} fp8 layers, and this model {len(self.names)}",
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
