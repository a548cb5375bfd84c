"""Per-token quantization in Triton:  q [M, K] int8, scale [M], zero_point [M] from x [M, K] * inv_smooth [K].

One program per row, the row in registers, one read.  Formulas as in :mod:`qkernels._rounding`; quotients are
``div_rn``, and ``enable_fp_fusion=False`` keeps every step to one rounding.  Adding 1.5 * 2**23 rounds to nearest, ties
to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_FEATURES", "quantize_rows"]

MAX_FEATURES = 65536


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    inv_smooth_ptr,
    static_scale_ptr,
    static_zero_point_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    K,
    x_stride,
    q_stride,
    BLOCK_K: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STATIC: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        x = x * tl.load(inv_smooth_ptr + columns, mask=inside, other=1.0)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The order of the bits is that of the magnitudes, with Inf and NaN on top.
    top = tl.max(magnitude, axis=0)
    finite = top < 0x7F800000
    infinity = float("inf")
    if SYMMETRIC:
        low = -127.0
        high = 127.0
        if STATIC:
            scale = tl.load(static_scale_ptr)
            inv = tl.div_rn(1.0, scale)
            live = finite
        else:
            absmax = top.to(tl.float32, bitcast=True)
            live = finite & (absmax >= 7.888609052210118e-31)  # 2**-100
            absmax = tl.where(live, absmax, 1.0)
            scale = tl.div_rn(absmax, 127.0)
            inv = tl.div_rn(127.0, absmax)
    else:
        if STATIC:
            scale = tl.load(static_scale_ptr)
            inv = tl.div_rn(1.0, scale)
            zero = tl.load(static_zero_point_ptr).to(tl.float32)
            live = finite
        else:
            hi = tl.max(tl.where(bits >= 0, magnitude, 0), axis=0).to(tl.float32, bitcast=True)
            lo = -(tl.max(tl.where(bits < 0, magnitude, 0), axis=0).to(tl.float32, bitcast=True))
            scale = tl.div_rn(hi, 255.0) - tl.div_rn(lo, 255.0)
            inv = tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0))
            live = finite & (scale > 0.0) & (inv < infinity)
            steps = tl.where(live, -lo * inv, 0.0)
            zero = tl.minimum(tl.maximum((steps + 12582912.0) - 12582912.0, 0.0), 255.0)
        low = -zero
        high = 255.0 - zero
        zero = tl.where(live, zero, 0.0)
    inv = tl.where(live, inv, 0.0)
    scale = tl.where(live, scale, tl.where(finite, 1.0, float("nan")))
    clean = tl.where(live, x, 0.0)
    steps = tl.minimum(tl.maximum(clean * inv, low), high)
    code = (steps + 12582912.0) - 12582912.0
    if SYMMETRIC:
        q = code.to(tl.int8)
    else:  # signed bytes, so that every product is int8 by int8
        q = (code + zero - 128.0).to(tl.int8)
        tl.store(zero_point_ptr + row, zero.to(tl.int32))
    tl.store(q_ptr + row * q_stride + columns, q, mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(
    x: Tensor,
    *,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`qkernels.reference.quantize_activations` of ``x [M, K]``, K <= 65536; asymmetric codes less 128.

    Args:
        x: float32, bfloat16 or float16; rows of contiguous values.
        symmetric, scale, zero_point, inv_smooth: as there; tensors on the device of ``x``.

    Returns:
        q int8 ``[M, K]``, scale float32 ``[M]``, zero points int32 ``[M]`` (of the codes 0..255) or None.
    """
    rows, features = x.shape
    if features > MAX_FEATURES:
        raise ValueError(f"x: expected at most {MAX_FEATURES} features, got {features}")
    if x.stride(-1) != 1 and features > 1:
        x = x.contiguous()
    stride = -(-features // 16) * 16
    q = torch.empty((rows, stride), dtype=torch.int8, device=x.device)[:, :features]
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    zeros = None if symmetric else torch.empty(rows, dtype=torch.int32, device=x.device)
    block = triton.next_power_of_2(max(features, 16))
    if rows:
        _quantize_rows_kernel[(rows,)](
            x,
            scales if inv_smooth is None else inv_smooth,
            scales if scale is None else scale,
            scales if zero_point is None else zero_point,
            q,
            scales,
            scales if zeros is None else zeros,
            features,
            x.stride(0),
            stride,
            BLOCK_K=block,
            SYMMETRIC=symmetric,
            STATIC=scale is not None,
            SMOOTH=inv_smooth is not None,
            num_warps=min(16, max(1, block // 1024)),
            enable_fp_fusion=False,
        )
    return q, scales, zeros
