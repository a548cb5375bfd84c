"""What Triton makes of the GEMM kernels, compiled for GPUs that need not be there: shared memory and instructions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkernels.triton import gemm_w4a8, gemm_w4a16, gemm_w8a8, gemm_w8a16
from qkernels.triton.tiles import PORTABLE_BYTES, Tile

K = 4096
SHARED = {80: 163 << 10, 86: PORTABLE_BYTES, 89: PORTABLE_BYTES, 90: 227 << 10}
"""Bytes that a block may have, by compute capability: CUDA C++ Programming Guide, table of technical specifications."""

POINTERS = {
    "x_ptr": "*bf16",
    "q_ptr": "*i8",
    "y_ptr": "*bf16",
    "bias_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "x_zero_point_ptr": "*i32",
    "zero_ptr": "*u8",
    "min_ptr": "*fp16",
    "book_ptr": "*i32",
}


def compile_for(capability: int, kernel: Any, tile: Tile, stages: int, fusion: bool, **options: object) -> Any:
    """The kernel at K = 4096; every pointer, size and stride a multiple of 16. Options: constants, pointers' types."""
    blocks = {"K": K, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group, "BIAS": True}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = {**POINTERS, **blocks, **options}.get(name, "i32")
        if name.isupper() and name not in ("M", "N"):
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name], attributes[(index,)] = value, [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": fusion},
    )


def w4a16(capability: int, tile: Tile, **options: object) -> Any:
    stages = tile.depth(tile.k * (2 * tile.m + tile.n // 2), SHARED[capability])
    flags = {"ZERO_POINT": False, "MINIMUM": False, "CODEBOOK": False, "FEW": False, "GROUP": 128, **options}
    types = {"weight_ptr": "*u8", "scale_ptr": "*fp16", "sums_ptr": "*fp32"}
    return compile_for(capability, gemm_w4a16._gemm_kernel, tile, stages, True, **types, **flags)


def w8a16(capability: int, tile: Tile, **options: object) -> Any:
    stages = tile.depth(tile.k * (2 * tile.m + tile.n), SHARED[capability])
    types = {"weight_ptr": "*i16", "scale_ptr": "*fp32"}
    flags = {"PAIRS": True, "FEW": False, **options}
    return compile_for(capability, gemm_w8a16._gemm_kernel, tile, stages, True, **types, **flags)


def w4a8(capability: int, tile: Tile, **options: object) -> Any:
    stages = tile.depth(tile.k * (tile.m + tile.n // 2), SHARED[capability])
    flags = {"ZERO_POINT": False, "MINIMUM": False, "SHIFTED": False, "FEW": False, "GROUP": 128, "CODES": 4, **options}
    types = {"weight_ptr": "*i16", "scale_ptr": "*fp16", "sums_ptr": "*i32"}
    return compile_for(capability, gemm_w4a8._gemm_kernel, tile, stages, False, **types, **flags)


GEMMS: dict[str, tuple[Callable[..., Any], Callable[[int, int], Tile], str]] = {
    "w4a16": (w4a16, lambda rows, channels: gemm_w4a16.tile_for(rows, channels, torch.bfloat16), "HGMMA"),
    "w8a16": (w8a16, lambda rows, channels: gemm_w8a16.tile_for(rows, channels, torch.bfloat16), "HGMMA"),
    "w4a8": (w4a8, gemm_w4a8.tile_for, "IGMMA"),
}


def tiles_of(name: str) -> list[Tile]:
    """Every tile that :func:`tile_for` gives, widest last."""
    chosen = {
        GEMMS[name][1](rows, channels)
        for rows in (1, 16, 32, 64, 128, 256, 1024, 4096)
        for channels in (1024, 4096, 14336)
    }
    return sorted(chosen, key=lambda tile: (tile.m * tile.n, tile.m, tile.k, tile.stages))
