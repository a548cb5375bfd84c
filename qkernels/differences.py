"""How far outputs moved, and how far rounding may move them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["difference_of", "limit_of"]


def difference_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Norm of the change over the norm, the worst of all tensors; infinite where something stopped being finite."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        a64, b64 = a.double(), b.double()
        kept = torch.isfinite(a64)
        if not torch.equal(kept, torch.isfinite(b64)):
            return math.inf
        size = float(a64[kept].norm())
        change = float((a64[kept] - b64[kept]).norm())
        worst = max(worst, change / size if size else change)
    return worst


def limit_of(model: nn.Module) -> float:
    """What rounding may move the outputs by: folding in fp32 stays near 1e-6, folding by powers of two is exact."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 2e-2
