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

__all__ = ["Codes", "GemmCodes", "RowGrid", "activate", "normalize", "quantize_activation", "quantize_norm"]


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
        q: ``[M, K]``, int8; uint8 on an asymmetric grid.
        scale: float32 ``[M]``.
        zero_point: int32 ``[M]``, or None.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


class GemmCodes(NamedTuple):
    """The same as products of layers take them, in one piece of memory: codes, less 128 on an asymmetric grid, in rows
    at multiples of 16 bytes, then scales, then zero points (``csrc/cuda/bindings_layers.h``)."""

    memory: Tensor
    rows: int


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
) -> tuple[Codes | GemmCodes, Tensor | None]:
    """A norm of ``x + residual``, quantized.

    Args:
        x, residual: float32, bfloat16 or float16 ``[..., K]``, K > 0, of one dtype and shape, on one GPU.
        weight, bias: ``[K]``, contiguous.
        layer: layer norm; else RMS norm, without a bias.
        for_gemm: the codes are for the product of a layer.  What follows may fetch weights at once: those of layers,
            which no kernel still writes.

    Returns:
        Codes of the rows, and ``x + residual`` in the dtype and shape of ``x`` (None without a residual).
    """
    codes, addresses = _outputs(x, grid, for_gemm)
    return codes, _norm(x, weight, bias, eps, layer, residual, for_gemm, addresses, 0)


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
    return y, _norm(x, weight, bias, eps, layer, residual, for_gemm, (), y.data_ptr())


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    residual: Tensor | None,
    for_gemm: bool,
    codes: _Addresses | tuple[()],
    y: int,
) -> Tensor | None:
    """The norm, to codes or to the tensor at ``y``; the sum, if there is one."""
    x, step = _rows(x)
    total, residual_step, dtype, shape, device = None, 0, x.dtype, x.shape, x.device
    if residual is not None:
        residual, residual_step = _rows(residual)
        total = _new_empty(x, *shape)
    wide = (weight is not None and weight.dtype != dtype) or (bias is not None and bias.dtype != dtype)
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
            codes,
            y,
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
) -> Codes | GemmCodes:
    """``activation(x) * up``, quantized.

    Args:
        x, up: float32, bfloat16 or float16 ``[..., K]``, K > 0, of one dtype and shape, on one GPU.
        activation: name of an epilogue, or None.
        for_gemm: as in :func:`quantize_norm`.
    """
    codes, addresses = _outputs(x, grid, for_gemm)
    _activation(x, activation, up, for_gemm, addresses, 0)
    return codes


def activate(x: Tensor, activation: str | None, up: Tensor | None, *, for_gemm: bool = False) -> Tensor:
    """``activation(x) * up``, rounded once: contiguous, in the dtype and shape of ``x``.

    Args:
        x, up, activation: as in :func:`quantize_activation`.
        for_gemm: as in :func:`normalize`.
    """
    y = _new_empty(x, *x.shape)
    _activation(x, activation, up, for_gemm, (), y.data_ptr())
    return y


def _activation(
    x: Tensor, activation: str | None, up: Tensor | None, for_gemm: bool, codes: _Addresses | tuple[()], y: int
) -> None:
    """The product, to codes or to the tensor at ``y``."""
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
            codes,
            y,
            0 if activation is None else EPILOGUES[activation],
            0 if up is None else up.data_ptr(),
            up_step,
            for_gemm and cuda.overlaps(device),
            for_gemm,
        )


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x``, or a copy, whose rows lie in steps of the number of elements returned."""
    if x.is_contiguous() and not x.is_neg():
        return x, x.shape[-1]
    step = None if x.is_neg() else row_stride(x)
    if step is None:
        x = x.resolve_neg().contiguous()
        return x, x.shape[-1]
    return x, step


def _outputs(x: Tensor, grid: RowGrid, for_gemm: bool) -> tuple[Codes | GemmCodes, _Addresses]:
    """Room for the codes of ``x [..., K]``, and the addresses that the module takes."""
    features = x.shape[-1]
    rows = x.numel() // features
    symmetric, *given = grid
    scale, zero_point, smooth = (0 if tensor is None else tensor.data_ptr() for tensor in given)
    if for_gemm:
        memory = _new_empty(x, cuda._cuda.workspace_bytes(rows, features), dtype=torch.int8)
        stride = -(-features // cuda._ACTIVATION_ALIGNMENT) * cuda._ACTIVATION_ALIGNMENT
        at = memory.data_ptr()
        scales = at + rows * stride
        zeros = 0 if symmetric else scales + rows * 4
        return GemmCodes(memory, rows), (at, stride, scales, zeros, smooth, scale, zero_point, True)
    codes = Codes(
        _new_empty(x, rows, features, dtype=torch.int8 if symmetric else torch.uint8),
        _new_empty(x, rows, dtype=torch.float32),
        None if symmetric else _new_empty(x, rows, dtype=torch.int32),
    )
    places = [0 if tensor is None else tensor.data_ptr() for tensor in codes]
    return codes, (places[0], features, places[1], places[2], smooth, scale, zero_point, False)
