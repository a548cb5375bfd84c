"""Tensors of integers with their scales: :class:`QTensor`, :func:`quantize`, :func:`dequantize`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import tensor_ops
from ._granules import Layout
from ._rounding import check_dtype

__all__ = ["QTensor", "dequantize", "quantize"]


@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized tensor: ``x ~ scale * (q - zero_point)``.

    Attributes:
        data: the codes: int8 or uint8 of ``shape``; for 4 bits uint8 with two codes per byte along the last
            dimension, low nibble first.
        scale: float32, one per granule (shapes below).
        zero_point: int32 like ``scale``; None for a symmetric tensor, whose zero is the code 0 (int8), 128 (uint8) or
            8 (4 bits).
        shape: of the tensor it stands for.
        bits: 8 or 4.
        signed: 8 bits: int8 or uint8.  False for 4 bits, whose codes are always 0..15.
        granularity: "tensor" (scale []), "channel" (one per index of ``axis``), "token" (one per line along ``axis``:
            ``shape`` without it) or "group" (one per ``group_size`` neighbours along ``axis``).
        axis: counted from the front; None for "tensor".
        group_size: for "group".
        symmetric: whether the grid is centred on zero.

    Raises:
        TypeError, ValueError: tensors that do not fit the description; the message names the field.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    bits: int = 8
    signed: bool = True
    granularity: str = "token"
    axis: int | None = -1
    group_size: int | None = None
    symmetric: bool = True
    _layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        layout = Layout(
            self.shape, self.bits, self.signed, self.granularity, self.axis, self.group_size, self.symmetric
        )
        for name in ("shape", "signed", "axis"):
            object.__setattr__(self, name, getattr(layout, name))
        object.__setattr__(self, "_layout", layout)
        tensor_ops.check_parts(layout, self.data, self.scale, self.zero_point)

    def codes(self) -> Tensor:
        """The integers one per element, int32 of ``shape`` (4 bits: 0..15, unpacked)."""
        return self._layout.load(self.data)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * (q - zero_point)``; see :func:`dequantize`."""
        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device; dtypes never change."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero_point=zero_point)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.nbytes for t in (self.data, self.scale, self.zero_point) if t is not None)

    def __repr__(self) -> str:
        kind = f"int{self.bits}" if self.signed else f"uint{self.bits}"
        where = "" if self.axis is None else f", axis={self.axis}"
        where += "" if self.group_size is None else f", group_size={self.group_size}"
        grid = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"QTensor({kind}, shape={list(self.shape)}, {grid}, granularity={self.granularity!r}{where}, "
            f"device={str(self.device)!r}, {self.nbytes} bytes)"
        )


def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    signed: bool = True,
    granularity: str = "token",
    axis: int = -1,
    group_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
) -> QTensor:
    """Quantize a tensor: ``q = clamp(round(x / scale) + zero_point)``, ties to even.

    The division is a product with a reciprocal that is rounded once: ``127 / absmax`` for measured symmetric 8-bit
    scales, ``1 / scale`` otherwise.  Every combination runs in the CPU kernels except: 4 bits where two codes of a byte
    would come from different lines, lines or groups along an inner ``axis``, empty tensors and other devices; those
    take the pure torch definition, with the same bits.

    Args:
        x: float32, bfloat16 or float16; any shape and strides.
        bits: 8 or 4.
        signed: 8 bits: int8 or uint8.  No effect on 4 bits, whose codes are 0..15.
        granularity: values that share a scale: "tensor", "channel" (one index of ``axis``), "token" (a line along
            ``axis``) or "group" (``group_size`` neighbours along ``axis``, the last group may be short).
        axis: see ``granularity``; ignored for "tensor".
        group_size: >= 1, for "group" only.
        symmetric: range [-absmax, absmax]; False: [min(x, 0), max(x, 0)] with an integer zero point.
        scale: given instead of measured: a number for all granules, or one per granule.
        zero_point: given beside ``scale`` for asymmetric grids, within the range of the codes.

    Returns:
        A QTensor.  Granules of zeros (or below 2**-100) get scale 1; granules with a NaN or Inf get scale NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    check_dtype(x.dtype, "x")
    given = _given("scale", scale, (float, int), x.device)
    given_zero_point = _given("zero_point", zero_point, (int,), x.device)
    # Values and types are checked here, before the operator's schema would complain in its own words.
    layout = Layout(tuple(x.shape), bits, signed, granularity, axis, group_size, symmetric)
    arguments = (layout.bits, layout.signed, granularity, layout.axis, group_size, symmetric)
    data, steps, zeros = tensor_ops.quantize(x.detach(), *arguments, given, given_zero_point)
    return QTensor(data, steps, None if symmetric else zeros, layout.shape, *arguments)


def _given(name: str, value: object, numbers: tuple[type, ...], device: torch.device) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name}: expected a tensor or a number, got {value!r}")
    return torch.tensor(value, dtype=torch.float32 if float in numbers else torch.int64, device=device)


def dequantize(qtensor: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * (q - zero_point)``: an exact integer difference, one float32 product, one cast to ``dtype``.

    Args:
        qtensor: what :func:`quantize` returned.
        dtype: float32, bfloat16 or float16.

    Raises:
        TypeError: not a QTensor, or another dtype.
    """
    if not isinstance(qtensor, QTensor):
        raise TypeError(f"qtensor: expected a QTensor, got {type(qtensor).__name__}")
    check_dtype(dtype, "dtype")
    layout = qtensor._layout
    arguments = (layout.bits, layout.signed, layout.granularity, layout.axis, layout.group_size, layout.symmetric)
    return tensor_ops.dequantize(qtensor.data, qtensor.scale, qtensor.zero_point, layout.shape, *arguments, dtype)
