"""What a failed capture of a CUDA graph leaves behind: bytes, and whether work goes on.

    PYTHONPATH=base python benchmarks/failed_capture.py [--output FILE]

A capture can fail in three ways: the work raises an error; the work waits for the device, and the
driver ends the capture with an error; memory runs out. Each is tried here, and then a matrix
product, random numbers and another capture must work. On the pretended GPU (see
benchmarks/pretended.py), whose stub libraries never end a capture with an error, the second way is
played: the stub ends the capture, and PyTorch is told of an error.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bert_pretraining.bench import record
from bert_pretraining.config import FlagParser
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import capture
from bert_pretraining.runtime import device as devices

MIB = 2**20
SIZE = 4096  # rows and columns of a matrix; in float32 it has 64 MiB


def raises(given: torch.Tensor) -> None:
    raise ValueError("the work failed")


def waits(given: torch.Tensor) -> None:
    """Waits for the device, as no captured work may."""
    if not record.is_pretended():
        given.sum().item()
    stub = ctypes.CDLL(None)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    stub.cudaStreamEndCapture(stream, ctypes.byref(ctypes.c_void_p()))


def needs_too_much(given: torch.Tensor) -> None:
    given.new_empty(2**50)


WAYS = {"raises": raises, "waits": waits, "needs too much memory": needs_too_much}


def failed_end(graph: torch.cuda.CUDAGraph) -> None:
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def try_one(fail: Callable[[torch.Tensor], None], device: torch.device) -> dict[str, object]:
    """MiB that PyTorch holds before and after a capture that fails, and the error."""

    def work() -> torch.Tensor:
        result = given @ given
        fail(result)
        return result

    given = torch.zeros(SIZE, SIZE, device=device)
    devices.free_unused_memory(device)
    before = torch.cuda.memory_reserved(device)
    end = torch.cuda.CUDAGraph.capture_end
    if fail is waits and record.is_pretended():
        torch.cuda.CUDAGraph.capture_end = failed_end
    error = "none"
    try:
        capture.captured(device, work)
    except (RuntimeError, ValueError) as caught:
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0][:100]}"
    finally:
        torch.cuda.CUDAGraph.capture_end = end
    devices.free_unused_memory(device)
    after = torch.cuda.memory_reserved(device)
    # What was free before is free again, and everything works.
    (given @ given).sum()
    torch.rand(3, device=device)
    graph, _ = capture.captured(device, lambda: given + 1.0)
    graph.replay()
    devices.synchronize(device)
    return {"reserved_mib_before": before / MIB, "reserved_mib_after": after / MIB, "error": error}


def main() -> int:
    parser = FlagParser(
        prog="benchmarks/failed_capture.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the figures")
    flags = parser.parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise UserError("there is no GPU", "run it where PyTorch sees one")
    device = torch.device("cuda", torch.cuda.current_device())
    results = {}
    for name, fail in WAYS.items():
        found = results[name] = try_one(fail, device)
        print(
            f"{name:<24} {found['reserved_mib_before']:>7.0f} MiB before, "
            f"{found['reserved_mib_after']:.0f} after ({found['error']})"
        )
    if flags.output:
        described = {"pretended": record.is_pretended(), "device": devices.name(device)}
        record.write(flags.output, {**described, "results": results})
    wrong = [
        found
        for found in results.values()
        if found["error"] == "none" or found["reserved_mib_after"] > found["reserved_mib_before"]
    ]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
