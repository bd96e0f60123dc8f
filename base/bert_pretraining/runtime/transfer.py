"""Copies from a device to main memory, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.runtime import device as devices


class Copying:
    """A tensor on its way from its device to main memory.

    The copy has its place among the device's work, and page-locked memory takes it, so that neither
    the host nor the device waits for it now. On other devices the host does wait.
    """

    def __init__(self, tensor: Tensor) -> None:
        device = tensor.device
        self._event = None
        if self.is_asynchronous(device):
            self._here = devices.pinned(torch.empty(tensor.shape, dtype=tensor.dtype), device)
            self._here.copy_(tensor, non_blocking=True)
            self._event = devices.current_stream(device).record_event()
        else:
            self._here = tensor.to("cpu", copy=True)

    @staticmethod
    def is_asynchronous(device: torch.device) -> bool:
        """Whether the host goes on while the device copies."""
        return devices.can_pin(device) and devices.streams(device) is not None

    def wait(self) -> list:
        """The numbers; waits for what the device was given before the copy, and no more."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return self._here.tolist()
