"""Which range of activations a static 8-bit grid should cover, from a histogram of what was seen.

The widest range clips nothing and rounds coarsely; a narrower one clips a few values and rounds all others finer.
Everything here works on :class:`Histogram`, whose memory does not grow with the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["METHODS", "Histogram", "check_method", "choose_range"]

METHODS = ("minmax", "absmax", "percentile", "mse", "entropy")
"""minmax: all that was seen. absmax: the same, made symmetric. percentile: all but the given share of the values.
mse: least expected squared error of rounding and clipping. entropy: least Kullback-Leibler divergence between the
distribution before and after (can collapse where a few channels hold all the outliers, as in BERT)."""

BINS = 4096
"""Bins of a histogram over [-radius, radius]; a multiple of 4, so that doubling the radius merges pairs of bins."""

_STEPS = 100
_LEVELS = 128


class Histogram:
    """How often which values occurred, over [-radius, radius] with a radius that doubles when it has to.

    Attributes:
        counts: float64 ``[BINS]``, on the CPU.
        radius: a power of two, or 0.0 while nothing but zeros was seen.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.radius = 0.0

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``, finite and of any shape."""
        if not x.numel():
            return
        values = x.detach().reshape(-1).to(torch.float32)
        largest = float(values.abs().max())
        if not math.isfinite(largest):
            raise ValueError("x: expected finite values, got NaN or Inf")
        self._reach(max(largest, 2.0**-100))
        self.counts += torch.histc(values, BINS, -self.radius, self.radius).to("cpu", torch.float64)

    def _reach(self, largest: float) -> None:
        if not self.radius:
            self.radius = 2.0 ** math.ceil(math.log2(largest))
        while self.radius < largest:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.radius *= 2.0

    @property
    def total(self) -> float:
        """Number of values counted."""
        return float(self.counts.sum())

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64."""
        width = 2.0 * self.radius / BINS
        return -self.radius + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def magnitudes(self) -> Tensor:
        """Counts of ``|x|``, float64 ``[BINS / 2]``, from 0 to the radius."""
        return self.counts[BINS // 2 :] + self.counts[: BINS // 2].flip(0)


def check_method(method: str, percentile: float) -> None:
    """Raise ValueError for an unknown method, or a percentile outside (50, 100]."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 50.0 < percentile <= 100.0:
        raise ValueError(f"percentile: expected a number above 50 and up to 100, got {percentile!r}")


def choose_range(
    low: float,
    high: float,
    histogram: Histogram | None,
    method: str = "minmax",
    *,
    percentile: float = 99.99,
    symmetric: bool = True,
) -> tuple[float, float]:
    """The range ``(low, high)`` that an 8-bit grid should cover.

    Args:
        low: smallest value seen; high: largest.
        histogram: of the same values; only "minmax" and "absmax" do without.
        method: one of :data:`METHODS`.
        percentile: for "percentile": share of the values, in percent, that is not clipped.
        symmetric: the grid is symmetric around zero (-127..127), else it has 0..255 and a zero point.

    Raises:
        ValueError: an unknown method, or no histogram where one is needed.
    """
    check_method(method, percentile)
    absmax = max(abs(low), abs(high))
    if method == "absmax":
        return -absmax, absmax
    if method == "minmax":
        return low, high
    if histogram is None or not histogram.total:
        raise ValueError(f"method: {method!r} needs a histogram of the activations, and none was kept")
    if not absmax:
        return low, high
    if method == "percentile":
        return _percentile(histogram, low, high, percentile, symmetric)
    share = _least_error(histogram, low, high, symmetric) if method == "mse" else _least_divergence(histogram, absmax)
    return (-absmax * share, absmax * share) if symmetric else (low * share, high * share)


def _percentile(
    histogram: Histogram, low: float, high: float, percentile: float, symmetric: bool
) -> tuple[float, float]:
    width = 2.0 * histogram.radius / BINS
    if symmetric:
        wanted = histogram.total * percentile / 100.0
        index = int(torch.searchsorted(histogram.magnitudes().cumsum(0), wanted))
        edge = min(width * (index + 1), max(abs(low), abs(high)))
        return -edge, edge
    tail = histogram.total * (1.0 - percentile / 100.0) / 2.0
    sums = histogram.counts.cumsum(0)
    first = int(torch.searchsorted(sums, tail, right=True))
    last = int(torch.searchsorted(sums, histogram.total - tail))
    return max(low, -histogram.radius + width * first), min(high, -histogram.radius + width * (last + 1))


def _least_error(histogram: Histogram, low: float, high: float, symmetric: bool) -> float:
    """The share of the range whose grid has the least squared error over the histogram."""
    x, counts = histogram.centers, histogram.counts
    kept = counts > 0
    x, counts = x[kept], counts[kept]
    absmax = max(abs(low), abs(high))
    best, best_error = 1.0, math.inf
    for step in range(_STEPS, 0, -1):
        share = step / _STEPS
        if symmetric:
            scale = absmax * share / 127.0
            rounded = (x / scale).round().clamp(-127, 127) * scale
        else:
            bottom, top = min(low, 0.0) * share, max(high, 0.0) * share
            scale = (top - bottom) / 255.0
            zero = round(-bottom / scale)
            rounded = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        error = float((counts * (x - rounded) ** 2).sum())
        if error < best_error:
            best, best_error = share, error
    return best


def _least_divergence(histogram: Histogram, absmax: float) -> float:
    """The share of the range whose 128 levels lose the least information about ``|x|``."""
    magnitudes = histogram.magnitudes()
    used = min(len(magnitudes), max(_LEVELS, math.ceil(absmax / (2.0 * histogram.radius / BINS))))
    magnitudes = magnitudes[:used]
    best, best_divergence = used, math.inf
    for stop in range(_LEVELS, used + 1, max(1, (used - _LEVELS) // _STEPS or 1)):
        clipped = magnitudes[:stop].clone()
        merged = _merge_levels(clipped)
        clipped[-1] += magnitudes[stop:].sum()
        p, q = clipped / clipped.sum(), merged / merged.sum()
        kept = p > 0
        divergence = float((p[kept] * (p[kept] / q[kept].clamp_min(1e-12)).log()).sum())
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    return min(1.0, best / used)


def _merge_levels(counts: Tensor) -> Tensor:
    """Counts spread evenly over the occupied bins of each of 128 levels: what rounding to the levels leaves."""
    level = (torch.arange(len(counts)) * _LEVELS) // len(counts)
    occupied = (counts > 0).to(counts.dtype)
    sums = torch.zeros(_LEVELS, dtype=counts.dtype).index_add_(0, level, counts)
    places = torch.zeros(_LEVELS, dtype=counts.dtype).index_add_(0, level, occupied)
    return (sums / places.clamp_min(1.0))[level] * occupied
