"""Whether a run that chooses its device itself would train on the CPU, and whether it may."""

from __future__ import annotations

import os
from pathlib import Path

from bert_pretraining import topology
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError

CPU_PREFIX = "CPU"  # of the names of configurations for the CPU, such as CPUx1x2


def notice(settings: Config) -> str | None:
    """What the user should know before a run on this machine; None for a run as it is named.

    Imports PyTorch, and looks for accelerators where PyTorch sees none.

    Raises:
        UserError: the configuration is named after an accelerator, and this machine has one that
            this PyTorch does not see. Training on the CPU would be silent and very slow.
    """
    if settings.device != "auto":
        return None
    from bert_pretraining.runtime import device

    if device.seen() is not None:
        return None
    return judge(settings, topology.find_accelerators(), topology.hidden_by(os.environ), build())


def judge(
    settings: Config,
    found: tuple[topology.Accelerator, ...],
    hidden_by: str | None,
    torch_build: str,
) -> str | None:
    """As `notice`, for a PyTorch that sees no accelerator.

    Args:
        found: the accelerators of the machine.
        hidden_by: the variable by which the user hides them all, if one does.
        torch_build: what `build` returns.
    """
    for_cpu = Path(settings.config).stem.upper().startswith(CPU_PREFIX)
    if found and hidden_by is None:
        problem = unseen(found, torch_build)
        if for_cpu:
            return f"{problem}: training on the CPU"
        fix = f"{remedy(found, torch_build)}; or pass --device cpu to train on the CPU"
        raise UserError(f"--config {settings.config}: {problem}", fix)
    if for_cpu:
        return None
    reason = f"{hidden_by} hides all devices" if hidden_by else "this machine has no accelerator"
    return f"{reason}: --config {settings.config} trains on the CPU"


def build() -> str:
    """The installed PyTorch: "PyTorch 2.4.1+cpu (without CUDA) of /path"."""
    import torch

    from bert_pretraining.runtime import device

    folder = Path(torch.__file__).parents[1]
    return f"PyTorch {torch.__version__} ({device.built_with() or 'without CUDA'}) of {folder}"


def unseen(found: tuple[topology.Accelerator, ...], torch_build: str) -> str:
    """That this machine has accelerators which PyTorch does not see."""
    return f"{torch_build} does not see this machine's {topology.describe(found)}"


def remedy(found: tuple[topology.Accelerator, ...], torch_build: str) -> str:
    """What to do about it, as an order."""
    vendors = {each.vendor for each in found}
    if (vendors == {"NVIDIA"} and "(CUDA" in torch_build) or (
        vendors == {"AMD"} and "(ROCm" in torch_build
    ):
        tool = "nvidia-smi" if vendors == {"NVIDIA"} else "rocm-smi"
        return (
            f"look at {tool}: the driver may be too old for this PyTorch, or the container was "
            "started without the devices (docker run --gpus all)"
        )
    return (
        "install the vendor's PyTorch again: another one has probably replaced it; or set PYTHON "
        "to the Python that has it"
    )
