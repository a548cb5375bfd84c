"""Bias correction: the mean error that rounding a weight makes, taken out of the outputs.

bias -= (w_hat - w) @ E[x]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hooks import Target

__all__ = ["corrected_bias"]


@torch.no_grad()
def corrected_bias(target: Target, stands_for: Tensor, mean: Tensor, float_mean: Tensor | None = None) -> Tensor:
    """The bias, float32 ``[N]``, of a layer whose weight became ``stands_for [N, K]``; zero counts as the bias of none.

    Args:
        mean: of the layer's inputs, ``[K]``. float_mean: of its inputs in the float model; None: the same.
    """
    bias = target.module._parameters.get("bias")
    weight = target.weight().to(torch.float32)
    error = (stands_for.to(weight) - weight) @ mean.to(weight)
    if float_mean is not None:
        error = error + weight @ (mean - float_mean).to(weight)
    return -error if bias is None else bias.detach().to(torch.float32) - error
