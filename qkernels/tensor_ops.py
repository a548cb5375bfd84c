"""``torch.ops.qkernels.quantize`` and ``dequantize``: whole tensors, traceable by ``torch.compile`` and ``make_fx``.

Nothing is computed here: a layout the CPU kernels can view goes to the binding, any other to the reference.  Operators
cannot return None: the zero points of a symmetric layout come back as an empty tensor.  Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native_tensors as native
from . import reference
from ._granules import Layout
from ._rounding import check_dtype

__all__ = ["dequantize", "quantize"]

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")

_LAYOUT = "int bits, bool signed, str granularity, int? axis, int? group_size, bool symmetric"


def _arguments(layout: Layout) -> dict[str, Any]:
    names = ("bits", "signed", "granularity", "axis", "group_size", "symmetric")
    return {name: getattr(layout, name) for name in names}


def _quantize(
    x: Tensor,
    bits: int,
    signed: bool,
    granularity: str,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype(x.dtype, "x")
    layout = Layout(tuple(x.shape), bits, signed, granularity, axis, group_size, symmetric)
    if native.objection(layout, x.device):
        data, steps, zeros = reference.quantize(x, **_arguments(layout), scale=scale, zero_point=zero_point)
    else:
        data, steps, zeros = native.quantize(x, layout, *reference.check_static(layout, scale, zero_point, x.device))
    return data, steps, steps.new_empty(0, dtype=torch.int32) if zeros is None else zeros


def _quantize_fake(
    x: Tensor,
    bits: int,
    signed: bool,
    granularity: str,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype(x.dtype, "x")
    layout = Layout(tuple(x.shape), bits, signed, granularity, axis, group_size, symmetric)
    zeros: tuple[int, ...] = (0,) if symmetric else layout.scale_shape
    return (
        x.new_empty(layout.data_shape, dtype=layout.dtype),
        x.new_empty(layout.scale_shape, dtype=torch.float32),
        x.new_empty(zeros, dtype=torch.int32),
    )


def _dequantize(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    bits: int,
    signed: bool,
    granularity: str,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    layout = Layout(tuple(shape), bits, signed, granularity, axis, group_size, symmetric)
    check_parts(layout, data, scale, zero_point)
    check_dtype(dtype, "dtype")
    if native.objection(layout, data.device):
        return reference.dequantize(data, scale, zero_point, shape=layout.shape, **_arguments(layout), dtype=dtype)
    return native.dequantize(data, scale, zero_point, layout, dtype)


def _dequantize_fake(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    bits: int,
    signed: bool,
    granularity: str,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    return data.new_empty(tuple(shape), dtype=check_dtype(dtype, "dtype"))


def check_parts(layout: Layout, data: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """TypeError or ValueError unless codes, scales and zero points are what ``layout`` says."""
    _check_tensor("data", data, layout.dtype, layout.data_shape)
    _check_tensor("scale", scale, torch.float32, layout.scale_shape)
    if layout.symmetric != (zero_point is None):
        expected = "None" if layout.symmetric else "an int32 tensor"
        raise ValueError(f"zero_point: expected {expected} with symmetric={layout.symmetric}, got the opposite")
    if zero_point is not None:
        _check_tensor("zero_point", zero_point, torch.int32, layout.scale_shape)


def _check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} of shape {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _operator(name: str, schema: str, kernel: Any, fake: Any) -> None:
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{name}", fake, lib=_LIBRARY)


_operator(
    "quantize",
    f"(Tensor x, {_LAYOUT}, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
_operator(
    "dequantize",
    f"(Tensor data, Tensor scale, Tensor? zero_point, SymInt[] shape, {_LAYOUT}, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)

quantize = torch.ops.qkernels.quantize
dequantize = torch.ops.qkernels.dequantize
