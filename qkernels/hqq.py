"""HQQ: grids from the weights alone, by half-quadratic splitting of a norm that forgives outliers.

    min over the grid of ||w - w_hat||_p, p = 0.7:  e = shrink(w - w_hat, beta), the grid that fits w - e, beta *= kappa

(Badri and Shaji, Half-Quadratic Quantization, 2023.)  What is fitted is what the scheme has: the minimum of a group,
its zero point (rounded to an integer) and scale, or the scale where the grid is symmetric.  The best one met is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._rounding import split_groups
from .grids import codes_and_tensors, joined
from .hooks import Quantizer, Target, register_algorithm
from .scheme import Scheme

__all__ = ["HQQ", "hqq_weight"]

CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class HQQ:
    """The algorithm ``"hqq"``, with its knobs; needs no data.

    Args:
        p: the norm, 0 < p < 1. beta, kappa: weight of the fit, and its growth per iteration. iterations: at most.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.p < 1.0:
            raise ValueError(f"p: expected a number between 0 and 1, got {self.p!r}")
        if self.beta <= 0.0 or self.kappa < 1.0 or self.iterations < 0:
            raise ValueError(
                "beta, kappa, iterations: expected beta > 0, kappa >= 1 and iterations >= 0, got "
                f"{self.beta}, {self.kappa}, {self.iterations}"
            )

    def __call__(self, model: nn.Module, targets: Sequence[Target], calibration: Any) -> Quantizer:
        """See :class:`qkernels.hooks.Algorithm`."""

        def quantizer(name: str, weight: Tensor, scheme: Scheme) -> Mapping[str, Tensor]:
            return hqq_weight(weight, scheme, p=self.p, beta=self.beta, kappa=self.kappa, iterations=self.iterations)

        return quantizer


@torch.no_grad()
def hqq_weight(
    weight: Tensor, scheme: Scheme, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> dict[str, Tensor]:
    """Quantize ``weight [N, K]``; arguments and errors as :class:`HQQ` and :func:`qkernels.reference.quantize_weight`.

    8-bit weights and code books are rounded to nearest: there is nothing to win.  With ``group_scales="int"`` float
    scales are fitted, and multiples made of them.
    """
    if scheme.weight_bits == 8 or scheme.codebook is not None:
        return reference.quantize_weight(weight, scheme)
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    pieces = weight.detach().split(rows)
    parts = [_hqq_rows(piece.to(torch.float32), scheme.searched, p, beta, kappa, iterations) for piece in pieces]
    if not parts:
        return reference.quantize_weight(weight, scheme)
    tensors = joined(parts, 0)
    if scheme.group_scales == "int":
        tensors = reference.integer_grid(weight, tensors, scheme)
    return codes_and_tensors(reference.round_to_grid(weight, tensors, scheme), tensors, scheme)


def _hqq_rows(w: Tensor, scheme: Scheme, p: float, beta: float, kappa: float, iterations: int) -> dict[str, Tensor]:
    columns = w.shape[1]
    tensors = reference.weight_grid(w, scheme)
    size = scheme.resolve_group_size(columns)

    def split(x: Tensor) -> Tensor:
        return split_groups(x, size) if tensors["weight_scale"].dim() == 2 else x.unsqueeze(1)

    real = split(torch.ones_like(w))  # a short last group: what was filled in does not count
    count = real.sum(-1)
    best, least = tensors, torch.full_like(count, torch.inf)
    for _ in range(iterations + 1):
        codes = reference.round_to_grid(w, tensors, scheme)
        rounded = reference.dequantize_weight(codes_and_tensors(codes, tensors, scheme), scheme, columns)
        residual = w - rounded
        error = (split(residual.abs()) ** p * real).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = {
            name: torch.where(better.reshape(tensor.shape), tensor, best[name].to(tensor.dtype))
            for name, tensor in tensors.items()
        }
        shrunk = residual.sign() * (residual.abs() - residual.abs().clamp_min(1e-12) ** (p - 1.0) / beta).clamp_min(0.0)
        tensors = _fit(split(w - shrunk), split(codes.to(torch.float32)), real, count, tensors, scheme)
        beta *= kappa
    return best


def _fit(
    wanted: Tensor, codes: Tensor, real: Tensor, count: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    """The grid that brings ``codes`` nearest to ``wanted``, both ``[N, G, group]``, by its one free parameter."""
    stored = tensors["weight_scale"]
    scale = stored.to(torch.float32).reshape(count.shape)
    if "weight_min" in tensors:
        low = ((wanted - codes * scale.unsqueeze(-1)) * real).sum(-1) / count
        return {"weight_scale": stored, "weight_min": low.reshape(stored.shape).to(tensors["weight_min"].dtype)}
    if "weight_zero_point" in tensors:
        zero = ((codes - wanted / scale.unsqueeze(-1)) * real).sum(-1) / count
        zero = zero.round().clamp(*scheme.code_range)
        fitted = _fit_scale(wanted, (codes - zero.unsqueeze(-1)) * real, scale)
        return {
            "weight_scale": fitted.reshape(stored.shape).to(stored.dtype),
            "weight_zero_point": zero.reshape(stored.shape).to(torch.uint8),
        }
    fitted = _fit_scale(wanted, (codes - scheme.zero_code) * real, scale)
    return {"weight_scale": fitted.reshape(stored.shape).to(stored.dtype)}


def _fit_scale(wanted: Tensor, centred: Tensor, scale: Tensor) -> Tensor:
    """The scale of least squares for each group; the one there was where that makes no sense."""
    power = centred.square().sum(-1)
    fitted = (wanted * centred).sum(-1) / power.clamp_min(1e-30)
    return torch.where((fitted > 0.5 * scale) & (fitted < 2.0 * scale) & (power > 0), fitted, scale)


register_algorithm("hqq", HQQ())
