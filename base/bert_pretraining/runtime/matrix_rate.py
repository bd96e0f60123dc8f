"""What a device can do at most: the rate of a large product of matrices, measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bert_pretraining.runtime import device as devices

Shape = tuple[int, int, int]  # (m, k, n) of the product (m, k) x (k, n)

# The last two have tokens, hidden and intermediate size of about BERT-large. A device does the next
# larger product only if it is done with the one before in SOON.
SHAPES: tuple[Shape, ...] = ((256, 256, 256), (512, 1024, 4096), (12288, 4096, 4096))
SOON = 0.005  # seconds
LONG = 0.01  # seconds of one measurement, beside which a launch takes no time
LEAST_SECONDS, LEAST_REPEATS = 0.2, 3


def matrix_rate(
    device: torch.device, dtype: torch.dtype, shape: Shape | None = None
) -> tuple[float, Shape]:
    """Floating-point operations per second of a large product, and its shape.

    The best of several repeats, 0.2 s in all; a warm-up comes before. The elements are random,
    because a device needs less power, and may run faster, for zeros. Random generators keep their
    states. The device's memory is given back, and does not count in its peak.

    shape: of the product; by default the largest of SHAPES that does not take too long.
    """
    found = _measured(device, dtype, (shape,) if shape else SHAPES)
    devices.free_unused_memory(device)
    devices.reset_peak_memory(device)
    return found


def _measured(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]
) -> tuple[float, Shape]:
    for tried in shapes:
        product = _Product(device, dtype, tried)
        product.seconds(1)  # a warm-up
        once = product.seconds(1)
        if once > SOON:
            break
    calls = max(1, round(LONG / max(once, 1e-6)))
    times, started = [], time.perf_counter()
    while len(times) < LEAST_REPEATS or time.perf_counter() - started < LEAST_SECONDS:
        times.append(product.seconds(calls))
    rows, inner, columns = tried
    return 2.0 * rows * inner * columns / min(times), tried


class _Product:
    """A product of matrices, to be done again and again."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        rows, inner, columns = shape
        self._device = device
        with devices.generators_kept(device):
            self._left = torch.randn(rows, inner, device=device).to(dtype)
            self._right = torch.randn(inner, columns, device=device).to(dtype)
        self._product = torch.empty(rows, columns, device=device, dtype=dtype)

    def seconds(self, calls: int) -> float:
        """Of one product, as the mean of so many calls."""
        devices.synchronize(self._device)
        started = time.perf_counter()
        for _ in range(calls):
            torch.matmul(self._left, self._right, out=self._product)
        devices.synchronize(self._device)
        return (time.perf_counter() - started) / calls
