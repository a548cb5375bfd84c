"""Calls of the CPU kernel of layer norms and RMS norms.

Definition in :mod:`qkernels._fused`, kernel in ``csrc/cpu/norm_impl.h``: every tier has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from .checks import DTYPE_CODES, row_stride

__all__ = ["normalize"]

_norm = _C.norm
_empty_like = torch.empty_like
_num_threads = torch.get_num_threads


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, layer: bool) -> Tensor:
    """:func:`qkernels.reference.layer_norm` or ``rms_norm``, rounded to the dtype of ``x``.  Nothing is
    checked here.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]`` on the CPU.
        weight, bias: ``[K]``, contiguous, of the dtype of ``x``; or None.
        eps: added to the mean of the squares.
        layer: layer norm; else RMS norm.

    Returns:
        Contiguous, in the dtype and shape of ``x``.
    """
    features = step = x.shape[-1]
    if x.is_contiguous() and not x.is_neg():
        y = _empty_like(x)
    else:
        strided = None if x.is_neg() else row_stride(x)
        if strided is None:
            x = x.resolve_neg().contiguous()
        else:
            step = strided
        y = x.new_empty(x.shape)
    count = x.numel()
    if count:
        at_weight = 0 if weight is None else weight.data_ptr()
        at_bias = 0 if bias is None else bias.data_ptr()
        code, rows = DTYPE_CODES[x.dtype], count // features
        _norm(x.data_ptr(), code, rows, features, step, layer, eps, at_weight, at_bias, y.data_ptr(), _num_threads())
    return y
