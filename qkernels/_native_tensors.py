"""Whole tensors through the native kernels: how a layout is seen by the binding, and what the kernels do not know.

The kernels see a contiguous tensor as ``[outer, channels, inner]`` with one granule per channel (over outer and inner),
or as rows of ``inner`` cut into groups.  Those of the CPU know every kind.  Those of a GPU know int8 around zero, uint8
with a zero point and both kinds of 4 bits: the other two kinds of 8 bits are these with every code moved by 128, which
is a flip of the top bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _C, cuda
from ._granules import Layout

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _UINT8, _INT4 = 0, 1, 2


def objection(layout: Layout, device: torch.device) -> str:
    """Why the kernels of the device cannot serve a layout; empty where they can."""
    if device.type != "cpu" and cuda.unavailable(device):
        return f"no native quantize for device {device.type}"
    if _view(layout) is None:
        bits, where = layout.bits, f"granularity={layout.granularity!r}, axis={layout.axis}, shape {list(layout.shape)}"
        return f"no native quantize for bits={bits}, {where}"
    return ""


def _view(layout: Layout) -> tuple[int, int, int, int] | None:
    """(outer, channels, inner, group), or None where the kernels have no such view."""
    shape, axis = layout.shape, layout.axis
    size = math.prod(shape)
    if not size:
        return None
    if axis is None:
        view = (1, 1, size, 0)
    elif layout.granularity == "channel":
        view = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), 0)
    elif axis == len(shape) - 1:
        view = (1, size // shape[-1], shape[-1], layout.group_size or 0)
    elif axis == 0 and layout.granularity == "token":
        view = (shape[0], size // shape[0], 1, 0)
    else:
        return None
    outer, _, inner, group = view
    if layout.bits == 4:
        # Nibbles are paired along the last dimension, the kernels pair them along inner; groups must not share a byte.
        last = shape[-1] if shape else 1
        paired_alike = inner == last or (inner % last == 0 and last % 2 == 0)
        if outer != 1 or not paired_alike or group % 2:
            return None
    return view


def quantize(
    x: Tensor, layout: Layout, scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`qkernels.reference.quantize`, for a layout without :func:`objection`.

    Args:
        x: float32, bfloat16 or float16 on a device without objection.
        scale, zero_point: None, or float32 and int32 of shape ``layout.scale_shape``, checked.
    """
    view = _view(layout)
    if view is None:
        raise ValueError(f"layout: expected one that the kernels can view, got {layout}")
    x = x.contiguous()
    moved = x.is_cuda and layout.bits == 8 and layout.signed != layout.symmetric
    shift = 128 if moved and layout.signed else 0
    kind = _INT4 if layout.bits == 4 else _INT8 if layout.signed != moved else _UINT8
    data = x.new_empty(layout.data_shape, dtype=torch.int8 if kind == _INT8 else torch.uint8)
    static = scale is not None
    # A copy of what is given: the kernel marks granules that hold NaN or Inf in it.
    steps = (
        x.new_empty(layout.scale_shape, dtype=torch.float32) if scale is None else scale.detach().contiguous().clone()
    )
    zeros = None
    if not layout.symmetric:
        zeros = x.new_empty(layout.scale_shape, dtype=torch.int32) if zero_point is None else zero_point + shift
        zeros = zeros.contiguous()  # a copy as well, by the sum
    if x.is_cuda:
        cuda.quantize(x, view, data, kind, steps, zeros, symmetric=layout.symmetric, static=static)
    else:
        _C.quantize(
            x.data_ptr(),
            _DTYPES[x.dtype],
            *view,
            data.data_ptr(),
            kind,
            steps.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            layout.symmetric,
            static,
            torch.get_num_threads(),
        )
    if moved:
        data = (data.view(torch.uint8) ^ 128).view(layout.dtype)
    return data, steps, zeros if zeros is None or not shift else zeros - shift


def dequantize(data: Tensor, scale: Tensor, zero_point: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """As :func:`qkernels.reference.dequantize`, for a layout without :func:`objection`."""
    view = _view(layout)
    if view is None:
        raise ValueError(f"layout: expected one that the kernels can view, got {layout}")
    data, scale = data.contiguous(), scale.contiguous()
    if zero_point is None and layout.zero == 128:
        zero_point = torch.full_like(scale, 128, dtype=torch.int32)
    zeros = None if zero_point is None else zero_point.contiguous()
    out = scale.new_empty(layout.shape, dtype=dtype)
    kind = _INT4 if layout.bits == 4 else _INT8 if layout.signed else _UINT8
    if data.is_cuda:
        cuda.dequantize(data, kind, view, scale, zeros, out)
    else:
        _C.dequantize(
            data.data_ptr(),
            kind,
            *view,
            scale.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            out.data_ptr(),
            _DTYPES[dtype],
            torch.get_num_threads(),
        )
    return out
