"""What this machine can do at most: peaks of register-only loops and bandwidths of read-only loops.

Both are measured in the run whose results they divide, again and again between its rows, and the best sample counts:
a neighbour that takes the core away lowers a sample but not the machine's limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from qkernels import _C, _bench

_SAMPLE_SECONDS = 0.004  # short: of many samples some meet no neighbour
_DRAM_BYTES = 512 << 20  # far larger than the last-level cache; read in turns of a quarter
_DRAM_WINDOW = _DRAM_BYTES // 4
_STEP = 512  # bytes; the read loops take whole steps


class Ceilings:
    """Peaks and bandwidths for one number of threads.

    Args:
        threads: threads that compute or read at the same time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.tiers: list[str] = list(_C.info()["usable"])
        self._samples: dict[str, list[float]] = {}
        self._steps: dict[tuple[str, str], int] = {}
        self._memory: torch.Tensor | None = None
        self._window = 0

    # -- measuring ------------------------------------------------------------------------------------------------

    def refresh(self, *, samples: int = 2) -> None:
        """Sample every peak and the DRAM bandwidth again, interleaved."""
        for _ in range(samples):
            for tier in self.tiers:
                for kind in ("int8", "fp32"):
                    self._sample_peak(kind, tier)
            self._sample_read(_DRAM_BYTES)

    def _add(self, name: str, value: float) -> None:
        self._samples.setdefault(name, []).append(value)

    def _sample_peak(self, kind: str, tier: str) -> None:
        steps = self._steps.get((kind, tier))
        if steps is None:
            # On one thread: a team whose threads wait for a core would look slow however few its steps are.
            probes = [_bench.peak(tier, kind, 20_000, 1) for _ in range(3)]
            once = min((probe[1] for probe in probes if probe is not None), default=None)
            if once is None:
                return
            steps = self._steps[kind, tier] = max(20_000, int(20_000 * _SAMPLE_SECONDS / max(once, 1e-6)))
        result = _bench.peak(tier, kind, steps, self.threads)
        if result is not None:
            self._add(f"{kind}.{tier}", result[0] / result[1])

    def _sample_read(self, size: int) -> None:
        if self._memory is None:
            self._memory = torch.ones(_DRAM_BYTES + 64, dtype=torch.uint8)  # written, so that the pages exist
        address = (self._memory.data_ptr() + 63) // 64 * 64
        for tier in self.tiers:
            if size == _DRAM_BYTES:
                self._window = (self._window + _DRAM_WINDOW) % _DRAM_BYTES
                read, passes = _DRAM_WINDOW, 1
                seconds = _bench.read(tier, address + self._window, read, passes, self.threads)
            else:
                read, passes = size, max(1, min((128 << 20) // size, 20_000))
                _bench.read(tier, address, size, 1, self.threads)  # into the cache
                seconds = _bench.read(tier, address, size, passes, self.threads)
            if seconds is not None:
                self._add(f"read.{size}", read * passes / seconds)

    # -- results --------------------------------------------------------------------------------------------------

    def peak(self, kind: str, tier: str | None = None) -> float:
        """Operations a second of "int8" or "fp32"; of ``tier``, or of the best usable one."""
        names = [f"{kind}.{name}" for name in ([tier] if tier is not None else self.tiers)]
        found = [max(self._samples[name]) for name in names if name in self._samples]
        if not found:
            raise ValueError(f"tier: expected one of {', '.join(self.tiers)}, got {tier!r}")
        return max(found)

    def bandwidth(self, size: int | None = None) -> float:
        """Bytes a second that are read from memory, or from wherever a working set of ``size`` bytes stays."""
        size = _DRAM_BYTES if size is None else max(_STEP, min(_DRAM_BYTES, size // _STEP * _STEP))
        name = f"read.{size}"
        if name not in self._samples:
            for _ in range(3):
                self._sample_read(size)
        return max(self._samples[name])

    def to_dict(self) -> dict[str, Any]:
        """Best and median of everything sampled: operations and bytes a second."""
        return {
            "threads": self.threads,
            "tiers": self.tiers,
            **{
                name: {"best": max(values), "median": statistics.median(values), "samples": len(values)}
                for name, values in sorted(self._samples.items())
            },
        }


def limit_seconds(bytes_moved: float, operations: float, bandwidth: float, peak: float) -> float:
    """``max(bytes / bandwidth, operations / peak)``: no implementation can be faster."""
    return max(bytes_moved / bandwidth, operations / peak)


def describe(ceilings: Ceilings, kinds: Sequence[str] = ("int8", "fp32")) -> list[str]:
    """Lines for people."""
    lines = [f"read bandwidth {ceilings.bandwidth() / 1e9:.1f} GB/s, {ceilings.threads} threads"]
    for kind in kinds:
        peaks = []
        for tier in ceilings.tiers:
            try:
                peaks.append(f"{tier} {ceilings.peak(kind, tier) / 1e9:.0f}")
            except ValueError:  # this tier adds no wider loop of the kind
                continue
        lines.append(f"{kind} peak, GOPS: {', '.join(peaks)}")
    return lines
