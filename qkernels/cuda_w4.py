"""4-bit weights on a GPU: packing and products of the CUDA module.

    w4a16   floating-point activations    fused with dequantization up to fused_rows() rows, else dequantized in slices
                                          of the weight and multiplied by the vendor's library
    w4a8    8-bit activations             quantized on the way in; equal to :mod:`qkernels.reference` bit for bit

Weights are packed as ``csrc/cuda/w4.h`` says; layers over them are in :mod:`qkernels.cuda_w4_layer`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from .checks import DTYPE_CODES
from .cuda import _address, _cuda, _on, _stream, capability, overlaps, quantize_rows
from .cuda_rows import Codes, RowGrid
from .cuda_slices import aligned_rows, by_slices, by_terms
from .packed import codebook_tensor
from .scheme import Scheme

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_ROWS",
    "GROUP_STEP",
    "MAX_FEATURES",
    "MULTIPLIER_TILES",
    "ORDERS",
    "PHASED_TILES",
    "SLAB_K",
    "TILES",
    "TILES_OF_HALVES",
    "blocks_of",
    "dequantize_w4",
    "describe",
    "fused_rows",
    "gemm_w4a8",
    "gemm_w4a16",
    "linear_w4a8",
    "linear_w4a16",
    "pack_groups",
    "pack_multipliers",
    "pack_w4",
    "product_w4a8",
    "unpack_groups",
    "unpack_multipliers",
    "unpack_w4",
    "wgmma_objection",
]

FUSED_ROWS, FUSED_ROWS_MINIMA = 320, 512
"""Where :func:`fused_rows` ends, for the kernels of mma.sync, and for minima by wgmma (measured on an H100)."""

MMA_CAPABILITY = 89
"""The highest compute capability whose plans are all of mma.sync; those run on every later one too."""

GROUP_STEP = 32
"""Groups are a multiple of it, or the whole row."""

MAX_FEATURES = 1 << 18

BLOCK_ROWS = 16
SLAB_K = 128
BLOCK_BYTES = 1024
"""Of the packed weight of ``csrc/cuda/w4.h``: channels of a block, features of a slab, bytes of a block in a slab."""

ORDERS = {None: 0, 8: 1}
"""``W4Order`` of ``csrc/cuda/w4.h``, by the bits of activations."""

_MULTIPLIER = 3
"""``W4Kind`` of groups with multipliers."""

_BOOK_BYTES = 64
"""From the entries of a codebook to each of their terms (:func:`qkernels.packed.codebook_tensor`)."""

Weight = tuple[int, ...]
"""Addresses of packed, scale (or multipliers), zero point, minimum and codebook; scale dtype code; order; N, K, group;
blocks from slab to slab; addresses of the scales and, under asymmetric activations, the sums of channels beside
multipliers."""

Plan = tuple[int, ...]
"""``W4Plan`` of ``csrc/cuda/w4.h``: kernel, tokens of a tile, phases, CTAs, counters, partial sums; and, of a launch
before, channels and tokens of a tile."""

TILES = [(tokens, 1) for tokens in (8, 16, 32, 64, 128, 192, 256)]
TILES_OF_HALVES = [*TILES, (96, 1)]
PHASED_TILES = {
    16: [(8, 8), (16, 8), (8, 4), (16, 4), (32, 4), (8, 2), (16, 2), (32, 2), (64, 2), (128, 2)],
    8: [(8, 2), (16, 2), (8, 8), (16, 8), (8, 4), (16, 4), (32, 4)],
}
"""Tokens and phases that a plan of the wgmma kernels may name (``w4_has_tile``), for the sanitizer and the tests; the
second for 16-bit activations, the last by the bits of activations, for groups with scales and zero points alone."""

MULTIPLIER_TILES = [*PHASED_TILES[16], (64, 4)]
"""The latter where groups have multipliers."""


# -- packing ----------------------------------------------------------------------------------------------------------


def pack_w4(weight: Tensor, features: int, order: int, packed: Tensor | None = None) -> Tensor:
    """Canonical codes uint8 ``[N, ceil(K / 2)]`` to fragment slabs, on the GPU.

    Args:
        weight: contiguous, on a CUDA device.
        features: K.
        order: 0 for 16-bit activations, 1 for 8-bit ones.
        packed: written in place where given, contiguous.
    """
    rows = weight.shape[0]
    if packed is None:
        packed = torch.empty(_cuda.packed_w4_bytes(rows, features), dtype=torch.uint8, device=weight.device)
    with _on(weight.device):
        _cuda.pack_w4(weight.data_ptr(), rows, features, order, packed.data_ptr(), _stream(weight.device))
    return packed


def unpack_w4(packed: Tensor, rows: int, features: int, order: int) -> Tensor:
    """The canonical codes that :func:`pack_w4` packed, without loss."""
    packed = packed.contiguous()
    weight = torch.empty((rows, -(-features // 2)), dtype=torch.uint8, device=packed.device)
    with _on(packed.device):
        _cuda.unpack_w4(packed.data_ptr(), rows, features, order, weight.data_ptr(), _stream(packed.device))
    return weight


def pack_groups(tensor: Tensor) -> Tensor:
    """What belongs to groups, ``[N]`` or ``[N, G]`` to ``[G * round_up(N, 16)]``, transposed and padded with zeros."""
    values = tensor.reshape(tensor.shape[0], -1)
    out = values.new_zeros(values.shape[1], _cuda.w4_group_pitch(values.shape[0]))
    out[:, : values.shape[0]] = values.t()
    return out.flatten()


def unpack_groups(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The canonical tensor of that shape that :func:`pack_groups` packed."""
    wide = packed.reshape(-1, _cuda.w4_group_pitch(shape[0]))
    return wide[:, : shape[0]].t().reshape(shape).contiguous()


def pack_multipliers(multiplier: Tensor, zero_point: Tensor | None, zero: int) -> Tensor:
    """Multipliers ``[N, G]`` and what they make of zero points, uint8 ``[N, G]`` or ``zero`` for all, as the kernels
    read them (``W4Weight::scale`` of ``csrc/cuda/w4.h``): int16 in the order of :func:`pack_groups`."""
    wide = multiplier.to(torch.int32)
    offset = 128 - wide * (zero if zero_point is None else zero_point.to(torch.int32))
    return pack_groups((wide | offset << 8).to(torch.int16))


def unpack_multipliers(packed: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The multipliers and the zero points, uint8 of that shape."""
    wide = unpack_groups(packed, shape).to(torch.int32) & 0xFFFF
    multiplier = wide & 255
    zero = (128 - (wide >> 8)) // multiplier.clamp(min=1)
    return multiplier.to(torch.uint8), zero.to(torch.uint8)


def describe(tensors: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int) -> Weight:
    """What the binding is told of a weight."""
    packed, scale = cast(Tensor, tensors["packed"]), cast(Tensor, tensors["packed_scale"])
    multiplier = tensors.get("packed_multiplier")
    of_groups = scale if multiplier is None else multiplier
    book = 0 if scheme.codebook is None else codebook_tensor(scheme.codebook, packed.device).data_ptr()
    return (
        packed.data_ptr(),
        of_groups.data_ptr(),
        _address(tensors.get("packed_zero_point")),
        _address(tensors.get("packed_min")),
        book,
        DTYPE_CODES[scale.dtype if multiplier is None else torch.float16],  # its width
        ORDERS[scheme.activation_bits],
        rows,
        features,
        scheme.resolve_group_size(features),
        blocks_of(packed, of_groups, rows),
        0 if multiplier is None else scale.data_ptr(),
        _address(tensors.get("packed_sum")),
    )


def _kind(weight: Weight) -> int:
    """``W4Kind`` of ``csrc/cuda/w4.h``."""
    return _MULTIPLIER if weight[11] else 2 if weight[4] else 1 if weight[3] else 0


def blocks_of(packed: Tensor, scale: Tensor, rows: int) -> int:
    """Blocks of 16 channels from one slab of a packed weight ``[rows, K]`` to the next, and from group to group: more
    than its own where it lies among others, as ``[slabs, blocks, 1024]`` and ``[groups, channels]`` (see
    :mod:`qkernels.joint`)."""
    if packed.dim() > 1 and packed.shape[0] > 1:
        return packed.stride(0) // BLOCK_BYTES
    if scale.dim() > 1 and scale.shape[0] > 1:
        return scale.stride(0) // BLOCK_ROWS
    return -(-rows // BLOCK_ROWS)


def dequantize_w4(
    weight: Weight, first: int, rows: int, dtype: torch.dtype, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Rows ``first ... first + rows - 1`` (``first`` a multiple of 16) of the float weight, as ``[rows, K]``."""
    if out is None:
        out = torch.empty((rows, weight[8]), dtype=dtype, device=device)
    with _on(device):
        _cuda.dequantize_w4(weight, first, rows, out.data_ptr(), DTYPE_CODES[dtype], _stream(device))
    return out


# -- W4A16 ------------------------------------------------------------------------------------------------------------

_WORKSPACES: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
"""(device, stream, capture) -> counters int32, all zero between launches, and float32 partial sums.

Launches of one stream follow one another, so they can share; a CUDA graph may run beside anything, so each capture has
its own, from the graph's memory.
"""


def workspace(device: torch.device, stream: int, counters: int, floats: int) -> tuple[int, int]:
    """Addresses of at least so many counters and partial sums."""
    index = device.index or 0
    key = (index, stream, _cuda.capture_id(stream) if stream else 0)  # the legacy stream cannot be captured
    held = _WORKSPACES.get(key)
    if held is None or held[0].numel() < counters or held[1].numel() < floats:
        if key[2]:
            for old in [k for k in _WORKSPACES if k[:2] == key[:2] and k[2] not in (0, key[2])]:
                del _WORKSPACES[old]
        if held is not None:
            counters, floats = max(counters, held[0].numel()), max(floats, held[1].numel())
        held = (
            torch.zeros(max(counters, 1024), dtype=torch.int32, device=device),
            torch.empty(max(floats, 1 << 18), dtype=torch.float32, device=device),
        )
        _WORKSPACES[key] = held
    return held[0].data_ptr(), held[1].data_ptr()


@functools.lru_cache(maxsize=4096)
def _plan(
    activation_bits: int | None,
    rows: int,
    weight: tuple[int, ...],
    kind: int,
    index: int,
    *,
    shifted: bool = False,
) -> Plan:
    """What the module would do.

    Args:
        weight: N, K, group.
        kind: ``W4Kind``.
        shifted: activations have zero points, which the kernels of mma.sync alone take, but for those of multipliers.
    """
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    most = min(capability(index), MMA_CAPABILITY) if shifted and kind != _MULTIPLIER else capability(index)
    return _cuda.plan_w4(activation_bits == 8, rows, *weight, kind, most, sms)


def wgmma_objection(scheme: Scheme, found: int) -> str:
    """Why a device of compute capability ``found`` serves a layer by mma.sync although it has wgmma; "" otherwise."""
    shifted = not scheme.weight_only and not scheme.activation_symmetric
    if found == 90 and _cuda.has_sm90a() and shifted and scheme.group_scales == "float":
        return "no wgmma kernel for float scales of 4-bit groups under asymmetric activations: mma.sync serves them"
    return ""


def gemm_w4a16(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    plan: Plan | None = None,
    dependent: bool = False,
) -> Tensor:
    """The fused kernel over 16-bit ``x [M, K]``, M >= 1; arguments as in :func:`gemm_w4a8`."""
    rows, channels, device = x.shape[0], weight[7], x.device
    x = aligned_rows(x)
    out = x.new_empty((rows, channels), dtype=out_dtype)
    if plan is None:
        plan = _plan(None, rows, weight[7:10], _kind(weight), device.index or 0)
    with _on(device):
        stream = _stream(device)
        _cuda.gemm_w4a16(
            weight,
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            rows,
            x.stride(0),
            _address(bias),
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
            channels,
            plan,
            *workspace(device, stream, *plan[4:6]),
            dependent,
            stream,
        )
    return out


def fused_rows(index: int, *, minima: bool = False) -> float:
    """Up to so many rows the fused W4A16 kernel runs on a device: it is faster than dequantizing first.

    Args:
        minima: groups have minima, whose tiles have no room for more than 64 tokens.
    """
    if capability(index) == 90 and _cuda.has_sm90a():
        return FUSED_ROWS_MINIMA if minima else math.inf
    return FUSED_ROWS


def _by_slices(x: Tensor, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The product by slices of the weight in the dtype of ``x [M, K]``."""
    return by_slices(
        x,
        weight[7],
        lambda first, rows, out: dequantize_w4(weight, first, rows, x.dtype, x.device, out),
        bias,
        out_dtype,
    )


def linear_w4a16(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype,
    *,
    dependent: bool = False,
) -> Tensor:
    """``x [..., K]`` times a packed weight, plus bias, in fp32 sums.

    Args:
        x: float32, bfloat16 or float16.  The kernel multiplies 16-bit values: float32, or what smoothing makes, goes
            in as three bfloat16 terms, without loss.
        bias: float32 ``[N]``; inv_smooth: float32 ``[K]``.
        dependent: the launch may fetch weights while the kernel before it ends; that one must not write them.
    """
    channels, features = weight[7], weight[8]
    flat = x.reshape(-1, features)
    shape = (*x.shape[:-1], channels)
    rows = flat.shape[0]
    if not rows:
        return torch.empty(shape, dtype=out_dtype, device=x.device)
    if inv_smooth is not None:
        flat = flat.to(torch.float32) * inv_smooth
    terms_of_x = 3 if flat.dtype == torch.float32 else 1
    if rows * terms_of_x > fused_rows(x.device.index or 0, minima=weight[3] != 0):
        return _by_slices(flat.contiguous(), weight, bias, out_dtype).view(shape)
    if flat.dtype != torch.float32:
        return gemm_w4a16(flat, weight, bias, out_dtype, dependent=dependent).view(shape)

    def product(terms: Tensor) -> Tensor:
        # A codebook's entries go in as terms too: the kernel would round them to the dtype of its inputs.
        books = [weight[4] + i * _BOOK_BYTES for i in (1, 2, 3)] if weight[4] else [0]
        y = [
            gemm_w4a16(terms, (*weight[:4], book, *weight[5:]), None, torch.float32, dependent=dependent)
            for book in books
        ]
        return y[0] if len(y) == 1 else (y[2] + y[1]) + y[0]

    return by_terms(flat, product, bias, out_dtype).view(shape)


# -- W4A8 -------------------------------------------------------------------------------------------------------------


def gemm_w4a8(
    q: Tensor,
    x_scale: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    x_zero_point: Tensor | None = None,
    plan: Plan | None = None,
    dependent: bool = False,
) -> Tensor:
    """The product and its epilogue for int8 ``q [M, K]`` of aligned rows, as :func:`cuda.quantize_rows` makes them.

    Args:
        x_scale: float32 ``[M]``; bias: float32 ``[N]``.
        x_zero_point: int32 ``[M]``, for codes of an asymmetric grid less 128; of the kernels of wgmma, only that of
            multipliers takes them.
        plan: None: the module's own choice.
        dependent: the launch may fetch weights while the kernel before it ends; that one must not write them.
    """
    rows, channels, device = q.shape[0], weight[7], q.device
    out = q.new_empty((rows, channels), dtype=out_dtype)
    if rows:
        if plan is None:
            plan = _plan(8, rows, weight[7:10], _kind(weight), device.index or 0, shifted=x_zero_point is not None)
        with _on(device):
            _cuda.gemm_w4a8(
                weight,
                q.data_ptr(),
                rows,
                q.stride(0),
                x_scale.data_ptr(),
                _address(x_zero_point),
                _address(bias),
                out.data_ptr(),
                DTYPE_CODES[out_dtype],
                channels,
                plan,
                dependent,
                _stream(device),
            )
    return out


def linear_w4a8(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    grid: RowGrid,
    out_dtype: torch.dtype,
    *,
    settled: bool = False,
) -> Tensor:
    """:func:`qkernels.reference.linear_w4a8` over a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        bias: float32 ``[N]``.
        grid: how the rows of ``x`` are quantized.
        settled: no kernel still writes the weight.
    """
    codes = Codes(*quantize_rows(x.reshape(-1, weight[8]), **grid._asdict(), for_gemm=True, settled=settled))
    return product_w4a8(codes, weight, bias, out_dtype).view(*x.shape[:-1], weight[7])


def product_w4a8(codes: Codes, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """``[M, N]`` of the rows that a quantizer has just made."""
    q, scale, zero_point = codes
    return gemm_w4a8(q, scale, weight, bias, out_dtype, x_zero_point=zero_point, dependent=overlaps(q.device))
