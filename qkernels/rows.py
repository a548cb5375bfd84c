"""Weights of any size to their canonical tensors, with temporaries of a few MiB."""

from __future__ import annotations

import torch

from . import _native_tensors
from ._granules import Layout
from ._rounding import FLOATS
from .reference import quantize_weight
from .scheme import Scheme

__all__ = ["quantize_rows"]

CHUNK_ELEMENTS = 1 << 18
"""Elements of one slice of rows (1 MiB of fp32).

Where malloc puts the packed tensors of a layer above temporaries that are freed later, holes are left in its heap:
larger slices leave larger ones, smaller slices take longer.
"""


def quantize_rows(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """`reference.quantize_weight` in slices of rows, by the CPU kernels where they know the grid: the same bits.

    Args:
        weight: float `[N, K]`, any strides, finite.
        scheme: the weight part of it counts.

    Raises:
        TypeError, ValueError: as `reference.quantize_weight`.
    """
    rows, columns = weight.shape
    if weight.is_contiguous():  # the kernel needs no temporaries, so there is no need of slices
        whole = _by_kernel(weight, scheme)
        if whole is not None:
            return whole
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    if rows <= step:
        return _quantize_slice(weight, scheme)
    whole = {}
    for start in range(0, rows, step):
        for name, tensor in _quantize_slice(weight[start : start + step], scheme).items():
            if name not in whole:
                whole[name] = tensor.new_empty((rows, *tensor.shape[1:]))
            if tensor.dtype != whole[name].dtype:  # one slice needs fp32 scales, so the layer does
                return quantize_rows(weight, scheme.replace(scale_dtype=torch.float32))
            whole[name][start : start + step] = tensor
    return whole


def _quantize_slice(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    found = _by_kernel(weight, scheme)
    return quantize_weight(weight, scheme) if found is None else found


def _by_kernel(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor] | None:
    """The tensors by the CPU kernel of `quantize`; None for a grid, device, dtype or value it does not serve."""
    if scheme.weight_bits != 8 or scheme.weight_granularity != "per_channel" or not weight.numel():
        return None
    layout = Layout(tuple(weight.shape))
    if weight.dtype not in FLOATS or _native_tensors.objection(layout, weight.device):
        return None
    codes, scale, _ = _native_tensors.quantize(weight.detach(), layout, None, None)
    if not bool(torch.isfinite(scale).all()):  # NaN marks a row that is not finite: the reference says so
        return None
    return {"weight": codes, "weight_scale": scale.reshape(-1)}
