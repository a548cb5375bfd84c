"""Calls of the CUDA kernels that compute a row before they round it: norms, with a residual, and activations.

They round to 8 bits on a grid, or to the dtype of the input.  Definitions in :mod:`qkernels._fused`, kernels in
``csrc/cuda/quantize_norm.cu`` and ``quantize_activation.cu``.  As in :mod:`qkernels.cuda`: on torch's current stream of
the tensors' device, nothing is synchronised, calls can be captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda
from .checks import DTYPE_CODES, row_stride
from .epilogues import EPILOGUES

__all__ = ["Codes", "RowGrid", "activate", "normalize", "quantize_activation", "quantize_norm"]


class RowGrid(NamedTuple):
    """How rows are quantized: the arguments of :func:`qkernels.reference.quantize_activations`."""

    symmetric: bool = True
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    inv_smooth: Tensor | None = None


_new_empty = Tensor.new_empty

_Addresses = tuple[int, int, int, int, int, int, int, bool]
"""Of codes and of the grid they are on, as the module takes them."""


class Codes(NamedTuple):
    """Quantized rows, as :func:`qkernels.cuda.gemm_w8a8` takes them.

    Attributes:
        q: ``[M, K]``, int8; uint8 on an asymmetric grid, or ``q - 128`` as int8 where that was asked for.
        scale: float32 ``[M]``.
        zero_point: int32 ``[M]``, or None.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


def quantize_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grid: RowGrid,
    *,
    layer: bool,
    residual: Tensor | None = None,
    for_gemm: bool = False,
) -> tuple[Codes, Tensor | None]:
    """A norm of ``x + residual``, quantized.

    Args:
        x, residual: float32, bfloat16 or float16 ``[..., K]``, K > 0, of one dtype and shape, on one GPU.
        weight, bias: ``[K]``, contiguous.
        layer: layer norm; else RMS norm, without a bias.
        for_gemm: rows begin at multiples of 16 bytes, and codes of an asymmetric grid are less 128.  What follows may
            fetch weights at once: those of layers, which no kernel still writes.

    Returns:
        Codes of the rows, and ``x + residual`` in the dtype and shape of ``x`` (None without a residual).
    """
    codes, addresses = _outputs(x, grid, for_gemm)
    return codes, _norm(x, weight, bias, eps, layer, residual, for_gemm, addresses)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    layer: bool,
    residual: Tensor | None = None,
    for_gemm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A norm of ``x + residual``, rounded once.

    Args:
        x, residual, weight, bias, layer: as in :func:`quantize_norm`.
        for_gemm: what follows may fetch weights at once: those of layers, which no kernel still writes.

    Returns:
        The norm, and ``x + residual`` (None without a residual), both contiguous in the dtype and shape of ``x``.
    """
    y = _new_empty(x, *x.shape)
    return y, _norm(x, weight, bias, eps, layer, residual, for_gemm, y)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    residual: Tensor | None,
    for_gemm: bool,
    target: Tensor | _Addresses,
) -> Tensor | None:
    """The norm, to a tensor or to codes; the sum, if there is one."""
    x, step = _rows(x)
    total, residual_step, dtype, shape, device = None, 0, x.dtype, x.shape, x.device
    if residual is not None:
        residual, residual_step = _rows(residual)
        total = _new_empty(x, *shape)
    wide = any(factor is not None and factor.dtype != dtype for factor in (weight, bias))
    if wide:
        weight = None if weight is None else weight.to(torch.float32)
        bias = None if bias is None else bias.to(torch.float32)
    count, features = x.numel(), shape[-1]
    if count:
        cuda.launch(
            device,
            cuda._cuda.quantize_norm,
            x.data_ptr(),
            DTYPE_CODES[dtype],
            count // features,
            features,
            step,
            *_target(target),
            layer,
            eps,
            0 if residual is None else residual.data_ptr(),
            residual_step,
            0 if total is None else total.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            wide or dtype == torch.float32,
            for_gemm and cuda.overlaps(device),
            for_gemm,
        )
    return total


def quantize_activation(
    x: Tensor, activation: str | None, up: Tensor | None, grid: RowGrid, *, for_gemm: bool = False
) -> Codes:
    """``activation(x) * up``, quantized.

    Args:
        x, up: float32, bfloat16 or float16 ``[..., K]``, K > 0, of one dtype and shape, on one GPU.
        activation: name of an epilogue, or None.
        for_gemm: as in :func:`quantize_norm`.
    """
    codes, addresses = _outputs(x, grid, for_gemm)
    _activation(x, activation, up, for_gemm, addresses)
    return codes


def activate(x: Tensor, activation: str | None, up: Tensor | None, *, for_gemm: bool = False) -> Tensor:
    """``activation(x) * up``, rounded once: contiguous, in the dtype and shape of ``x``.

    Args:
        x, up, activation: as in :func:`quantize_activation`.
        for_gemm: as in :func:`normalize`.
    """
    y = _new_empty(x, *x.shape)
    _activation(x, activation, up, for_gemm, y)
    return y


def _activation(
    x: Tensor, activation: str | None, up: Tensor | None, for_gemm: bool, target: Tensor | _Addresses
) -> None:
    """The product, to a tensor or to codes."""
    x, step = _rows(x)
    up_step = 0
    if up is not None:
        up, up_step = _rows(up)
    count, features, device = x.numel(), x.shape[-1], x.device
    if count:
        cuda.launch(
            device,
            cuda._cuda.quantize_activation,
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            count // features,
            features,
            step,
            *_target(target),
            0 if activation is None else EPILOGUES[activation],
            0 if up is None else up.data_ptr(),
            up_step,
            for_gemm and cuda.overlaps(device),
            for_gemm,
        )


def _target(target: Tensor | _Addresses) -> tuple[_Addresses | tuple[()], int]:
    """Where rows go, as the module takes it: the addresses of codes, or that of a tensor."""
    return ((), target.data_ptr()) if isinstance(target, Tensor) else (target, 0)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x``, or a copy, whose rows lie in steps of the number of elements returned."""
    if x.is_contiguous() and not x.is_neg():
        return x, x.shape[-1]
    step = None if x.is_neg() else row_stride(x)
    if step is None:
        x = x.resolve_neg().contiguous()
        return x, x.shape[-1]
    return x, step


def _outputs(x: Tensor, grid: RowGrid, for_gemm: bool) -> tuple[Codes, _Addresses]:
    """Room for the codes of ``x [..., K]``, and the addresses that the module takes."""
    features = x.shape[-1]
    rows, stride = x.numel() // features, features
    if for_gemm:
        stride = -(-features // cuda._ACTIVATION_ALIGNMENT) * cuda._ACTIVATION_ALIGNMENT
    symmetric, static_scale, static_zero_point, inv_smooth = grid
    q = _new_empty(x, rows, stride, dtype=torch.int8 if symmetric or for_gemm else torch.uint8)
    scale = _new_empty(x, rows, dtype=torch.float32)
    zero_point = None if symmetric else _new_empty(x, rows, dtype=torch.int32)
    addresses = (
        q.data_ptr(),
        stride,
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if inv_smooth is None else inv_smooth.data_ptr(),
        0 if static_scale is None else static_scale.data_ptr(),
        0 if static_zero_point is None else static_zero_point.data_ptr(),
        for_gemm,
    )
    return Codes(q if stride == features else q[:, :features], scale, zero_point), addresses
