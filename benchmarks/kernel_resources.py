"""Registers, shared memory, occupancy and loads of every Triton kernel, found without a GPU.

    PYTHONPATH=base python benchmarks/kernel_resources.py --output results/DATE_NAME/kernels

It compiles the kernels of tests/triton_compile.py for BERT-large with bf16, and reads the machine
code with the tools that Triton brings. It writes NAME.json, and NAME.txt as a table.

occupancy: the share of a multiprocessor's warps that can run at a time, by registers and shared
memory. spills: instructions that read or write a thread's local memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_compile  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90)
# Of a multiprocessor of compute capability 8.0 and 9.0 (CUDA programming guide).
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, WARPS, BLOCKS, RESERVED_SHARED = 65536, 64, 32, 1024


def blocks_at_a_time(registers: int, shared: int, warps: int, capability: int) -> int:
    """Blocks that run on one multiprocessor at a time; registers are given out 256 a warp."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // registers_of_warp // warps
    by_shared = SHARED_BYTES[capability] // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def read_machine_code(cubin: bytes) -> tuple[int, Counter]:
    """Registers of a thread, and how often each instruction occurs, with its modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(flag: str) -> str:
            command = [str(TOOLS / "cuobjdump"), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = read("-res-usage"), read("-sass")
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gives no registers: {usage}")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.M)
    return int(found[1]), Counter(names)


def resources(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int
) -> dict[str, Any]:
    """Compile one kernel and describe it."""
    compiled = triton_compile.compiled(kernel, constants, options, capability)
    registers, code = read_machine_code(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = blocks_at_a_time(registers, shared, warps, capability)

    def count(pattern: str) -> int:
        return sum(number for name, number in code.items() if re.match(pattern, name))

    return {
        "kernel": triton_compile.name_of(kernel),
        "capability": capability,
        "dropout": bool(constants.get("THRESHOLD")),
        "head_size": constants.get("HEAD_SIZE"),
        "constants": {name: value for name, value in constants.items() if "BLOCK" in name},
        "warps": warps,
        "registers": registers,
        "shared_bytes": shared,
        "blocks": blocks,
        "occupancy": blocks * warps / WARPS,
        "spills": count("LDL|STL"),
        "instructions": sum(code.values()),
        "wgmma": count("HGMMA"),
        "mma": count("HMMA"),
        "global_loads": {name: code[name] for name in sorted(code) if re.match("LDG", name)},
        "global_stores": {name: code[name] for name in sorted(code) if re.match("STG", name)},
        "barriers": count("BAR"),
        "atomics": count(r"ATOM\b|ATOMG|RED\b"),
    }


def table(found: list[dict[str, Any]]) -> str:
    """One line per kernel and GPU. loads: how many of them fetch 128, 64, 32, 16 bits a thread."""
    lines = [
        f"{'kernel':52} {'sm':>3} {'warps':>5} {'regs':>4} {'shared':>7} {'blocks':>6} "
        f"{'occupancy':>9} {'spills':>6} {'products':>9}  loads 128/64/32/16"
    ]
    for one in found:
        size = f" D={one['head_size']}" if one["head_size"] else ""
        name = f"{one['kernel']}{size}{' dropout' if one['dropout'] else ''}"
        widths = Counter()
        for load, number in one["global_loads"].items():
            bits = re.search(r"\.(128|64|U16|S16|U8)\b", load)
            widths[{"128": 128, "64": 64}.get(bits[1], 16) if bits else 32] += number
        loads = "/".join(str(widths[bits]) for bits in (128, 64, 32, 16))
        products = f"{one['wgmma']} wgmma" if one["wgmma"] else f"{one['mma']} mma"
        lines.append(
            f"{name:52} {one['capability']:>3} {one['warps']:>5} {one['registers']:>4} "
            f"{one['shared_bytes']:>7} {one['blocks']:>6} {one['occupancy']:>9.0%} "
            f"{one['spills']:>6} {products:>9}  {loads}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the files' name without .json")
    output = parser.parse_args().output
    found = [
        resources(*kernel, capability)
        for capability in CAPABILITIES
        for dropout in (False, True)
        for kernel in triton_compile.kernels(dropout, capability)
    ]
    found += [resources(*kernel, 90) for kernel in triton_compile.fp8_kernels()]
    output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    output.with_suffix(".json").write_text(
        json.dumps({"versions": versions, "kernels": found}, indent=1) + "\n"
    )
    text = f"triton {triton.__version__}, BERT-large, bf16\n" + table(found)
    output.with_suffix(".txt").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
