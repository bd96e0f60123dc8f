"""The states of the random generators, kept over work that must not change them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bert_pretraining.runtime import device as devices


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the generators of the CPU and of the device are as before."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    devices.synchronize(device)
    with torch.random.fork_rng(devices=[device.index or 0], device_type=device.type):
        yield
