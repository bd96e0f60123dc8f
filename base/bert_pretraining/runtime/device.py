"""The devices that PyTorch knows: which there are, and what the package needs of each."""

from __future__ import annotations

import torch


def seen() -> str | None:
    """The type of the accelerator that this PyTorch can use, such as "cuda"; None without one."""
    return "cuda" if torch.cuda.is_available() else None


def count(kind: str) -> int:
    """How many devices of a type this PyTorch can use; 0 where it cannot use the type."""
    return torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0


def name(device: torch.device) -> str:
    """The product's name; "CPU" for a CPU."""
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
