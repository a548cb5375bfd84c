"""W8A8 GEMM in Gluon, Triton's lower level, for Hopper and many tokens; the operation is that of gemm_w8a8.py.

Triton itself waits for every int8 product of tensor cores before it issues the next, since it keeps products in flight
for float32 sums alone.  Here one stays in flight:

    producer warp      waits for a free stage, copies a tile of tokens and one of channels into it (TMA)
    8 consumer warps   wait for a full stage, issue its products, wait for those of the stage before, give that one back

Programs are persistent: the producer fills the stages of the next tile while the consumers finish this one.  K-major
operands are read as they lie; elements outside come as zeros, and the copy of the result drops them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["TILES", "HopperTile", "gemm_w8a8", "tile_for"]

BLOCK_M = 128
BLOCK_K = 128
GROUP_M = 8
CONSUMERS = 8
PRODUCER_REGISTERS = 24

# Names of Triton 3.9, and of 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _tile(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Tile (m, n) of an output, ordered as raster.grouped_tile orders them."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    rows_in_group = gl.minimum(tiles_m - first, GROUP_M)
    return first + (tile % per_group) % rows_in_group, (tile % per_group) // rows_in_group


@gluon.jit
def _produce(
    q_desc,
    weight_desc,
    q_stages,
    weight_stages,
    full,
    empty,
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 1  # of a barrier that nobody has arrived at, the phase before is over
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (BLOCK_M + BLOCK_N) * BLOCK_K)
            _load(q_desc, [tile_m * BLOCK_M, k], arrived, q_stages.index(stage))
            _load(weight_desc, [tile_n * BLOCK_N, k], arrived, weight_stages.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consume(
    q_stages,
    weight_stages,
    full,
    empty,
    y_desc,
    y_tile,
    x_scale_ptr,
    x_zero_point_ptr,
    colsum_ptr,
    weight_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    WARPS: gl.constexpr,
    ZERO_POINT: gl.constexpr,
    BIAS: gl.constexpr,
):
    # Triton knows the s8 products of up to 224 columns.
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 128 if BLOCK_N > 128 else BLOCK_N, 32]
    )
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, layout)
        before = stage
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            pending = warpgroup_mma(
                q_stages.index(stage), weight_stages.index(stage).permute((1, 0)), acc, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=[pending])
            _barrier()  # one thread arrives for all, so all have to be through
            mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        _barrier()
        mbarrier.arrive(empty.index(before), count=1)

        tokens = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        channels = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        token_mask = tokens < M
        channel_mask = channels < N
        if ZERO_POINT:
            zero = gl.load(x_zero_point_ptr + tokens, mask=token_mask, other=0) - 128
            colsum = gl.load(colsum_ptr + channels, mask=channel_mask, other=0)
            acc = acc - zero[:, None] * colsum[None, :]
        x_scale = gl.load(x_scale_ptr + tokens, mask=token_mask, other=0.0)
        weight_scale = gl.load(weight_scale_ptr + channels, mask=channel_mask, other=0.0)
        y = acc.to(gl.float32) * x_scale[:, None]
        y = y * weight_scale[None, :]
        if BIAS:
            y = y + gl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[None, :]
        tma.store_wait(0)  # the tile before has left shared memory
        _barrier()
        y_tile.store(y.to(y_desc.dtype))
        fence_async_shared()
        _barrier()
        _store(y_desc, [tile_m * BLOCK_M, tile_n * BLOCK_N], y_tile)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    q_desc,
    weight_desc,
    y_desc,
    x_scale_ptr,
    x_zero_point_ptr,
    colsum_ptr,
    weight_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    WARPS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    ZERO_POINT: gl.constexpr,
    BIAS: gl.constexpr,
):
    q_stages = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], q_desc.layout)
    weight_stages = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    y_tile = gl.allocate_shared_memory(y_desc.dtype, [BLOCK_M, BLOCK_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_stages,
                    weight_stages,
                    full,
                    empty,
                    y_desc,
                    y_tile,
                    x_scale_ptr,
                    x_zero_point_ptr,
                    colsum_ptr,
                    weight_scale_ptr,
                    bias_ptr,
                    M,
                    N,
                    K,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                    PROGRAMS,
                    WARPS,
                    ZERO_POINT,
                    BIAS,
                ),
            ),
            (
                _produce,
                (
                    q_desc,
                    weight_desc,
                    q_stages,
                    weight_stages,
                    full,
                    empty,
                    M,
                    N,
                    K,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                    PROGRAMS,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


@dataclass(frozen=True)
class HopperTile:
    """Channels of a tile of 128 tokens, its stages of 128 k, and its time for one of those, relative to the others."""

    n: int
    stages: int
    step: float


TILES = (HopperTile(256, 3, 1.0), HopperTile(128, 5, 0.58), HopperTile(64, 7, 0.42))


def tile_for(rows: int, channels: int, programs: int) -> HopperTile:
    """The tile with the least time for the program that has most of them."""

    def cost(tile: HopperTile) -> float:
        tiles = triton.cdiv(rows, BLOCK_M) * triton.cdiv(channels, tile.n)
        return triton.cdiv(tiles, programs) * tile.step

    return min(TILES, key=cost)


def gemm_w8a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    colsum: Tensor | None,
    out: Tensor,
    *,
    tile: HopperTile | None = None,
) -> Tensor:
    """``out``, 16-bit ``[M, N]`` contiguous, M >= 1; the other arguments as those of the kernel for every architecture.

    Rows of ``q``, ``weight`` and ``out`` begin at multiples of 16 bytes.
    """
    (rows, features), channels = q.shape, weight.shape[0]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tile = tile_for(rows, channels, processors) if tile is None else tile
    bytes_layout, y_layout = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 16, 2)
    programs = min(processors, triton.cdiv(rows, BLOCK_M) * triton.cdiv(channels, tile.n))
    _gemm_kernel[(programs,)](
        TensorDescriptor(q, [rows, features], [q.stride(0), 1], [BLOCK_M, BLOCK_K], bytes_layout),
        TensorDescriptor(weight, [channels, features], [features, 1], [tile.n, BLOCK_K], bytes_layout),
        TensorDescriptor(out, [rows, channels], [channels, 1], [BLOCK_M, tile.n], y_layout),
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        x_scale if colsum is None else colsum,
        weight_scale,
        weight_scale if bias is None else bias,
        rows,
        channels,
        features,
        BLOCK_M=BLOCK_M,
        BLOCK_N=tile.n,
        BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        PROGRAMS=processors,
        WARPS=CONSUMERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        ZERO_POINT=x_zero_point is not None,
        BIAS=bias is not None,
        num_warps=CONSUMERS,
        enable_fp_fusion=False,
    )
    return out
