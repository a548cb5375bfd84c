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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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
    total, residual_step = None, 0
    if residual is not None:
        residual, residual_step = _rows(residual)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    factors = [t for t in (weight, bias) if t is not None]
    wide = any(factor.dtype != x.dtype for factor in factors) or x.dtype == torch.float32
    if wide:
        weight = None if weight is None else weight.to(torch.float32)
        bias = None if bias is None else bias.to(torch.float32)
    if x.numel():
        features = x.shape[-1]
        with cuda._on(x.device):
            cuda._cuda.quantize_norm(
                x.data_ptr(),
                DTYPE_CODES[x.dtype],
                x.numel() // features,
                features,
                step,
                *_target(target),
                layer,
                eps,
                cuda._address(residual),
                residual_step,
                cuda._address(total),
                cuda._address(weight),
                cuda._address(bias),
                wide,
                for_gemm and cuda.overlaps(x.device),
                for_gemm,
                cuda._stream(x.device),
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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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
    if x.numel():
        with cuda._on(x.device):
            cuda._cuda.quantize_activation(
                x.data_ptr(),
                DTYPE_CODES[x.dtype],
                x.numel() // x.shape[-1],
                x.shape[-1],
                step,
                *_target(target),
                0 if activation is None else EPILOGUES[activation],
                cuda._address(up),
                up_step,
                for_gemm and cuda.overlaps(x.device),
                for_gemm,
                cuda._stream(x.device),
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
    dtype = torch.int8 if grid.symmetric or for_gemm else torch.uint8
    q = torch.empty((rows, stride), dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    zero_point = None if grid.symmetric else torch.empty(rows, dtype=torch.int32, device=x.device)
    addresses = (
        q.data_ptr(),
        stride,
        scale.data_ptr(),
        cuda._address(zero_point),
        cuda._address(grid.inv_smooth),
        cuda._address(grid.scale),
        cuda._address(grid.zero_point),
        for_gemm,
    )
    return Codes(q[:, :features], scale, zero_point), addresses
