"""Compiles every Triton kernel for given GPUs, without a GPU; prints one line of JSON per kernel.

It is a program because it needs triton without its interpreter: `python triton_compile.py 80 90`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bert_pretraining.kernels import (
    triton_attention_kernels,
    triton_attention_tilings,
    triton_bias_gelu,
    triton_cross_entropy,
    triton_embedding,
    triton_embedding_kernels,
    triton_fp8,
    triton_fp8_gelu,
    triton_fp8_layer_norm,
    triton_fp8_layer_norm_kernels,
    triton_fp8_weights,
    triton_layer_norm,
    triton_layer_norm_kernels,
    triton_layer_sums,
    triton_sums,
)

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
# Types of arguments that are neither 16-bit arrays nor sizes.
TYPES = {
    **dict.fromkeys(
        (
            "seed_ptr",
            "cu_seqlens_ptr",
            "correct_ptr",
            "word_ids_ptr",
            "position_ids_ptr",
            "segment_ids_ptr",
            "keys_ptr",
            "maximum_ptr",
            "part_of_block_ptr",
        ),
        "*i32",
    ),
    **dict.fromkeys(("labels_ptr", "correct_sum_ptr", "order_ptr", "parts_ptr"), "*i64"),
    **dict.fromkeys(
        (
            "statistics_ptr",
            "partial_ptr",
            *(f"partial_{number}_ptr" for number in range(4)),
            "loss_ptr",
            "loss_sum_ptr",
            "loss_gradient_ptr",
            "log_sum_exp_ptr",
            "delta_ptr",
            "scale_ptr",
            "table_ptr",
        ),
        "*fp32",
    ),
    **dict.fromkeys(("rows_ptr", "columns_ptr", "copies_ptr"), "*u8"),
    **dict.fromkeys(("epsilon", "softmax_scale"), "fp32"),
}


def kernels(dropout: bool, capability: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Each kernel with its constants and options, for BERT-large's sizes."""
    mask = {"THRESHOLD": 429496730 if dropout else 0, "KEEP_SCALE": 1.0 / 0.9 if dropout else 1.0}
    if not dropout:
        mask["seed_ptr"] = None
    rows, columns, warps = triton_layer_norm.row_blocks(1024)
    norm = {"COLUMNS": 1024, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, **mask}
    norm_backward = norm | {"PROGRAM_ROWS": 32}
    embedding_backward = norm_backward | {"WORDS": 30528, "POSITIONS": 512}
    listed = []
    for module, backward in (
        (triton_layer_norm_kernels, norm_backward),
        (triton_embedding_kernels, embedding_backward),
    ):
        listed.append((module.forward_kernel, norm, {"num_warps": warps}))
        listed.append((module.backward_kernel, backward, {"num_warps": warps}))
    # For head size 128, the compiler of Triton 3.0 aborts where the target is capability 9.0.
    sizes = (64, 128) if dropout and (capability, TRITON) != (90, (3, 0)) else (64,)
    for head_size in sizes:
        problem = triton_attention_tilings.Problem(head_size, torch.bfloat16, False, 3)
        tiling = triton_attention_tilings.fixed(problem).forward  # the same for all three
        constants = {
            "NUM_HEADS": 16,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": head_size,
            "BLOCK_QUERIES": tiling.block_queries,
            "BLOCK_KEYS": tiling.block_keys,
            "PRECISION": "ieee",
            **mask,
        }
        options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
        for name in ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"):
            listed.append((getattr(triton_attention_kernels, name), constants, options))
    return listed if dropout else listed + _without_masks()


def _without_masks() -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Those that drop nothing."""
    listed = []
    rows, columns = triton_bias_gelu.block_shape(triton_bias_gelu.FORWARD_BLOCK, 4096)
    gelu = {"COLUMNS": 4096, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    listed.append((triton_bias_gelu.forward_kernel, gelu, {}))
    rows, columns = triton_bias_gelu.block_shape(triton_bias_gelu.BACKWARD_BLOCK, 4096)
    gelu = gelu | {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "PROGRAM_ROWS": 128}
    listed.append((triton_bias_gelu.backward_kernel, gelu, {}))
    sums = {"COLUMNS_0": 1024, "COLUMNS_1": 4096, "COLUMNS_2": 1024, "COLUMNS_3": 3072}
    sums |= {"COUNT_0": 3, "COUNT_1": 1, "COUNT_2": 3, "COUNT_3": 1}
    sums |= {"END_0": 96, "END_1": 224, "END_2": 320}
    sums |= dict.fromkeys(("second_1_ptr", "third_1_ptr", "second_3_ptr", "third_3_ptr"))
    sums |= dict(zip(("BLOCK_PARTS", "BLOCK_COLUMNS"), triton_sums.PARTS_BLOCK, strict=True))
    listed.append((triton_layer_sums.add_layer_sums_kernel, sums, {}))
    block, warps = triton_cross_entropy.block_and_warps(30528)
    for name in ("forward_kernel", "backward_kernel"):
        constants = {"COLUMNS": 30528, "BLOCK": block}
        listed.append((getattr(triton_cross_entropy, name), constants, {"num_warps": warps}))
    listed.append(
        (triton_cross_entropy.total_kernel, {"BLOCK": triton_cross_entropy.TOTAL_BLOCK}, {})
    )
    rows, columns = triton_sums.block_shape(triton_sums.COLUMN_BLOCK, 3072)
    sums = {"COLUMNS": 3072, "PROGRAM_ROWS": 128, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    listed.append((triton_sums.partial_sums_kernel, sums, {}))
    listed.append((triton_sums.stack_kernel, sums | {"COLUMNS": 1024}, {}))
    parts = dict(zip(("BLOCK_PARTS", "BLOCK_COLUMNS"), triton_sums.PARTS_BLOCK, strict=True))
    sums = {"COLUMNS": 1024, "COUNT": 3, "ADD": True, **parts}
    listed.append((triton_sums.add_partial_sums_kernel, sums, {}))
    tables = {"WORDS": 30528, "POSITIONS": 512, "COLUMNS": 1024, "CHUNK": triton_embedding.CHUNK}
    columns = {"BLOCK_COLUMNS": triton_embedding.chunk_columns(1024)}
    listed.append((triton_embedding_kernels.entry_sums_kernel, tables | columns, {}))
    listed.append((triton_embedding_kernels.crossing_sums_kernel, tables | parts, {}))
    return listed


def fp8_kernels() -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Those with fp8, for compute capability 9.0; see `kernels`."""
    block = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), triton_fp8.BLOCK, strict=True))
    square = dict(zip(block, triton_fp8_gelu.BLOCK, strict=True))
    wide = {"num_warps": triton_fp8.NUM_WARPS}
    forward, backward = ({"E5M2": e5m2, "RECORD": True} for e5m2 in (False, True))
    program = {"PROGRAM_ROWS": triton_fp8_gelu.PROGRAM_ROWS}
    aligned = {"ALIGNMENT": 16, "WRITTEN_AT_ONCE": 8}
    listed = [
        (triton_fp8.cast_kernel, forward | block | {"COLUMNS": 1024}, wide),
        (triton_fp8.cast_kernel, backward | block | {"COLUMNS": 1024}, wide),
        (triton_fp8.update_kernel, {"COUNT": 288, "BLOCK_COUNT": 512}, {}),
        (triton_fp8_weights.cast_weights_kernel, aligned | block, wide),
        (triton_fp8_gelu.forward_kernel, forward | square | {"COLUMNS": 4096}, wide),
        (triton_fp8_gelu.backward_kernel, backward | square | program | {"COLUMNS": 4096}, wide),
    ]
    kernels = triton_fp8_layer_norm_kernels
    rows, columns, warps = triton_layer_norm.row_blocks(1024)
    norm = {"COLUMNS": 1024, "TILE_COLUMNS": triton_fp8_layer_norm.tile_columns(1024)}
    norm |= dict(zip(block, (rows, columns), strict=True))
    for dropped in (429496730, 0):
        norm |= {"THRESHOLD": dropped, "KEEP_SCALE": 1.0 / 0.9 if dropped else 1.0}
        norm |= {} if dropped else {"seed_ptr": None}
        for kernel, form, rows in (
            (kernels.forward_kernel, forward, triton_fp8_layer_norm.FORWARD_ROWS),
            (kernels.backward_kernel, backward, triton_fp8_layer_norm.BACKWARD_ROWS),
        ):
            sizes = {"PROGRAM_ROWS": rows, "TILE_ROWS": rows}
            listed.append((kernel, form | norm | sizes, {"num_warps": warps}))
    return listed


def ast_source(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: Sequence[str] = ()
) -> ASTSource:
    """A kernel with the types and the constants of its arguments, by name.

    aligned: arguments that are multiples of 16. They are left out before Triton 3.3, which takes
    them in another form in each version.
    """
    kernel = getattr(kernel, "kernel", None) or kernel  # without the launcher around it
    if TRITON < (3, 3):
        return ASTSource(kernel, types, constants)
    position = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {position[name]: value for name, value in constants.items()}
    attributes = {position[name]: [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constants, attributes)


def compiled(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int
) -> CompiledKernel:
    """Compile for NVIDIA GPUs of a compute capability (90 for 9.0), with 16-byte alignment."""
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name in constants:
            continue
        signature[name] = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        free = kernel.params[kernel.arg_names.index(name)].do_not_specialize
        if name.endswith(("_ptr", "_stride")) and not free:
            aligned.append(name)
    source = ast_source(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def name_of(kernel: Any) -> str:
    """The kernel's module and name."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def compile_kernel(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int
) -> dict[str, Any]:
    """Compile a kernel, and what the tests ask of it."""
    program = compiled(kernel, constants, options, capability)
    assembly = program.asm["ptx"]
    return {
        "kernel": name_of(kernel),
        "capability": capability,
        "shared_bytes": program.metadata.shared,
        "wgmma": "wgmma.mma_async" in assembly,
        "tensor_cores": "wgmma.mma_async" in assembly or "mma.sync" in assembly,
        "atomics": re.search(r"\b(atom|red)\.", assembly) is not None,
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for dropout in (False, True):
            for listed in kernels(dropout, capability):
                print(json.dumps(compile_kernel(*listed, capability)), flush=True)
