"""Code books of 16 values for non-uniform 4-bit weights: NF4, and one fitted to a model.

    scheme = qk.Scheme(4, weight_granularity="per_group", group_size=64, activation_bits=None, codebook=qk.NF4)

Values are relative to the largest magnitude of a group: ``w ~ absmax * codebook[q]``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._rounding import split_groups
from .experts import with_experts_apart
from .patterns import compile_patterns
from .plan import DEFAULT_EXCLUDE
from .survey import survey

__all__ = ["NF4", "fit_codebook"]

SAMPLE = 1 << 20  # weights that a fit looks at
ITERATIONS = 60


def _normal_float() -> tuple[float, ...]:
    """The 4-bit NormalFloat of QLoRA (2305.14314): quantiles of a normal distribution, -1, 0 and 1 among them."""
    tail = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))  # the outermost quantile: halfway between those of 16 and 15 values
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((positive, negative, torch.zeros(1, dtype=torch.float64)))
    return tuple(float(v) for v in (values / values.abs().max()).sort().values.to(torch.float32))


NF4: tuple[float, ...] = _normal_float()
"""Most accurate for weights that are normally distributed within a group."""


@with_experts_apart
@torch.no_grad()
def fit_codebook(
    model: nn.Module,
    *,
    group_size: int = 64,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = DEFAULT_EXCLUDE,
) -> tuple[float, ...]:
    """The 16 values of least squared error (k-means) over the Linear weights of `model`; -1 and 1 stay in.

    Args:
        model: a float model; left as it is.
        group_size: consecutive input features that share a scale, as in the scheme the code book is for.
        include, exclude: patterns of layers, as in `quantize_`.

    Raises:
        ValueError: no layer, or a group size below 1.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: expected a positive integer, got {group_size!r}")
    wanted, unwanted = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
    weights = [
        layer.weight
        for layer in survey(model)
        if layer.kind in ("linear", "conv1d")
        and layer.reason is None
        and (not wanted or any(p.matches(layer.names) for p in wanted))
        and not any(p.matches(layer.names) for p in unwanted)
    ]
    if not weights:
        raise ValueError(f"model: expected Linear layers, {type(model).__name__} holds none that are chosen")
    total = sum(weight.numel() for weight in weights)
    values, importance = [], []
    for weight in weights:
        # Whole rows, evenly spread, so that every layer is there by its share.
        rows = max(1, round(len(weight) * min(1.0, SAMPLE / max(total, 1))))
        picked = weight[torch.linspace(0, len(weight) - 1, rows, device=weight.device).long()].to("cpu", torch.float32)
        groups = split_groups(picked, group_size)
        absmax = groups.abs().amax(-1, keepdim=True)
        live = (absmax > 0).expand_as(groups) & split_groups(torch.ones_like(picked), group_size).bool()
        values.append((groups / absmax.clamp_min(1e-30))[live])
        importance.append((absmax.square().expand_as(groups))[live])
    return _kmeans(torch.cat(values).double(), torch.cat(importance).double())


def _kmeans(values: Tensor, importance: Tensor) -> tuple[float, ...]:
    if not len(values):
        return NF4
    centers = torch.tensor(NF4, dtype=torch.float64)
    for _ in range(ITERATIONS):
        nearest = torch.bucketize(values, (centers[1:] + centers[:-1]) / 2)
        mass = torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, importance)
        sums = torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, importance * values)
        moved = torch.where(mass > 0, sums / mass.clamp_min(1e-300), centers)
        moved[0], moved[-1] = -1.0, 1.0  # the ends: a group's largest weight is met exactly
        if float((moved - centers).abs().max()) < 1e-7:
            break
        centers = moved.sort().values
    return tuple(float(v) for v in centers.to(torch.float32))
