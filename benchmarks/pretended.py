"""The pretended GPU (stub libraries): its counters, and a way to run a program of ours on it.

    python benchmarks/pretended.py -m bert_pretraining bench step --graph
    python benchmarks/pretended.py benchmarks/gpu_extra.py --num_layers 1

It stands in for a GPU where there is none. The environment variable PRETENDED_GPU names the folder
of the stub libraries. PyTorch, Triton and CUDA graphs run on the host as they would on a GPU;
kernels are counted and compute nothing. So every check that compares numbers would find a fault.
A program that is run by this file is told that these checks were passed.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from bert_pretraining.bench.record import is_pretended


def counters() -> ModuleType:
    """The module that reads the stub libraries' counters."""
    import pretended_gpu

    return pretended_gpu


class NoNumbers(Exception):
    """Raised in place of looking for the cause of a number that is not finite."""


def run_attention(
    attention: Callable, device: torch.device, dtype: torch.dtype, head_size: int
) -> None:
    """Run attention forward and backward; its errors pass through, its results are not compared."""
    qkv = torch.zeros(16, 3, 2, head_size, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor([0, 5, 16], dtype=torch.int32).to(device)
    attention(qkv, ends, 11, 0.1).sum().backward()


def pass_checks_of_numbers() -> None:
    """Let the package believe that the device's numbers are right, in this process."""
    from bert_pretraining.kernels import fp8_linear, torch_provider
    from bert_pretraining.runtime import device as devices
    from bert_pretraining.runtime.transfer import Copying
    from bert_pretraining.training import outcomes

    def no_numbers(*_: object) -> None:
        raise NoNumbers("kernels of the pretended GPU compute nothing")

    wait = Copying.wait

    def wait_for_zeros(copying: Copying) -> list[float]:
        # What no kernel has written is whatever was in memory before.
        return [0.0] * len(wait(copying))

    Copying.wait = wait_for_zeros
    fp8_linear.check = lambda *_: None
    devices.supports = lambda _device, _dtype: True
    torch_provider.try_attention = run_attention
    outcomes.first_non_finite = no_numbers


def main(words: list[str]) -> None:
    """Run a module (-m NAME) or a script with the rest of the words, as Python would."""
    if not is_pretended():
        sys.exit("Error: PRETENDED_GPU is not set; run the program without benchmarks/pretended.py")
    if not words or words == ["-m"]:
        sys.exit(__doc__)
    torch.cuda.init()
    pass_checks_of_numbers()
    torch.backends.cuda.enable_cudnn_sdp(False)  # there is no stub of cuDNN
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
