"""What Triton makes of the GEMM kernels for GPUs that need not be there: shared memory, and the instructions used."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkernels.triton import gemm_w4a8, gemm_w4a8_intscale, gemm_w4a16, gemm_w8a16
from qkernels.triton.tiles import PORTABLE_BYTES, Tile

SHARED = {80: 163 << 10, 86: PORTABLE_BYTES, 90: 227 << 10}
"""Bytes that a block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

KERNELS: dict[str, tuple[Any, dict[str, object]]] = {
    "w4a16": (
        gemm_w4a16,
        {
            "weight_ptr": "*u8",
            "scale_ptr": "*fp16",
            "GROUP": 128,
            "ZERO_POINT": False,
            "MINIMUM": False,
            "CODEBOOK": False,
        },
    ),
    "w8a16": (gemm_w8a16, {"weight_ptr": "*i16", "scale_ptr": "*fp32", "PAIRS": True}),
    "w4a8": (
        gemm_w4a8,
        {
            "weight_ptr": "*i16",
            "scale_ptr": "*fp16",
            "sums_ptr": "*i32",
            "GROUP": 128,
            "CODES": 4,
            "SHIFTED": False,
            "ZERO_POINT": False,
            "MINIMUM": False,
        },
    ),
    "w4a8_intscale": (
        gemm_w4a8_intscale,
        {"weight_ptr": "*i16", "GROUP": 128, "CODES": 4, "SHIFTED": False, "ZERO_POINT": False},
    ),
}
BYTES = {"w4a16": (2, 0.5), "w8a16": (2, 1), "w4a8": (1, 0.5), "w4a8_intscale": (1, 0.5)}
"""Of an activation, of a weight."""

INTEGER = ("w4a8", "w4a8_intscale")
"""Kernels of integer products."""

POINTERS = {
    "x_ptr": "*bf16",
    "q_ptr": "*i8",
    "bias_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "x_zero_point_ptr": "*i32",
    "sums_ptr": "*fp32",
    "colsum_ptr": "*i32",
    "weight_scale_ptr": "*fp32",
    "multiplier_ptr": "*u8",
    "zero_ptr": "*u8",
    "min_ptr": "*fp16",
    "book_ptr": "*i32",
}
"""Types of arguments; others are sizes, strides and masks: int32."""


def compiled(name: str, capability: int, tile: Tile) -> Any:
    """The kernel at K = 4096 with everything aligned, for as many stages as the device has room for."""
    module, options = KERNELS[name]
    kernel = module._gemm_kernel
    given = {
        **POINTERS,
        **options,
        "y_ptr": "*bf16" if tile.splits == 1 else "*fp32",
        "K": 4096,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": tile.group,
        "SPLITS": tile.splits,
        "BIAS": True,
        "FEW": False,
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, "i32")
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name], attributes[(index,)] = value, [["tt.divisibility", 16]]
    bytes_of_x, bytes_of_weight = BYTES[name]
    stage = int(tile.k * (bytes_of_x * tile.m + bytes_of_weight * tile.n))
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tile.warps,
            "num_stages": tile.depth(stage, SHARED[capability]),
            "enable_fp_fusion": name not in INTEGER,
            "maxnreg": 128 if name == "w4a8_intscale" and tile.warps == 8 else None,
        },
    )


def tile_of(name: str, rows: int, channels: int, features: int) -> Tile:
    """The tile of a product."""
    module = KERNELS[name][0]
    tile: Tile = module.tile_for(rows, channels) if name in INTEGER else module.tile_for(rows, channels, features)
    return tile


def tiles(name: str) -> list[Tile]:
    """Every tile of products small and large; two programs that share K stand for more."""
    shapes = itertools.product((1, 16, 32, 64, 128, 256, 1024, 4096), ((1024, 512), (4096, 14336), (14336, 4096)))
    found = (tile_of(name, rows, *sizes) for rows, sizes in shapes)
    return list(dict.fromkeys(replace(tile, splits=min(tile.splits, 2)) for tile in found))


def widest(name: str) -> Tile:
    """The tile of a product that is large in every direction."""
    return tile_of(name, 4096, 14336, 4096)


@pytest.mark.parametrize(("name", "tile"), [(name, tile) for name in KERNELS for tile in tiles(name)])
def test_tiles_fit_where_shared_memory_is_least(name: str, tile: Tile) -> None:
    assert compiled(name, 86, tile).metadata.shared <= SHARED[86]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_widest_tiles_fit(name: str, capability: int) -> None:
    assert compiled(name, capability, widest(name)).metadata.shared <= SHARED[capability]


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_unpacked_into_operands_of_wgmma(name: str) -> None:
    ptx = compiled(name, 90, widest(name)).asm["ptx"]
    products = [line for line in ptx.splitlines() if "wgmma.mma_async" in line]
    kind = "s32.s8.s8" if name in INTEGER else "f32.bf16.bf16"
    assert products
    assert all(kind in line for line in products)
    # Operands: sums, then the weight in four registers, then the descriptor of x in shared memory.
    assert all(line.count("{") == 2 for line in products), products[0]
    assert "cp.async" in ptx


def test_fewer_stages_where_there_is_less_shared_memory() -> None:
    tile = Tile(128, 128, 128, 8, 4)
    assert [tile.depth(40 << 10, room) for room in (200 << 10, 99 << 10, 10)] == [4, 2, 1]
