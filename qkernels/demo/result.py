"""What the demo measured of one model, and the questions that the table and the plot ask of it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from qkernels.demo.variants import FLOAT, TORCH_ENGINES, Variant

TORCH_KEYS = tuple(f"torch {engine}" for engine in TORCH_ENGINES)


@dataclass
class ModelResult:
    """Figures of one model; the inner keys are contenders.

    `directory_bytes` and `state_dict_bytes`: bytes on disk. `latency_ms`: case -> contender -> median
    milliseconds. `quality`: measure -> contender -> value.
    """

    name: str
    parameters: int
    note: str = ""
    variants: list[str] = field(default_factory=list)
    directory_bytes: dict[str, int | None] = field(default_factory=dict)
    state_dict_bytes: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_sizes(self, variants: list[Variant]) -> None:
        """Take over names, sizes and reports of the contenders."""
        self.variants = [variant.key for variant in variants]
        self.directory_bytes = {variant.key: variant.directory_bytes for variant in variants}
        self.state_dict_bytes = {variant.key: variant.state_dict_bytes for variant in variants}
        self.reports = {variant.key: variant.report for variant in variants if variant.ours}

    def best_torch(self, case: str) -> float | None:
        """Milliseconds of torch's better engine in one latency case, None where it was not run."""
        found = [self.latency_ms[case][key] for key in TORCH_KEYS if key in self.latency_ms[case]]
        return min(found) if found else None

    def speedup(self, case: str, key: str) -> float:
        """How many times as fast as fp32 a contender is."""
        return self.latency_ms[case][FLOAT] / self.latency_ms[case][key]

    def speedup_over_torch(self, case: str, key: str) -> float | None:
        """How many times as fast as torch's better engine a contender is."""
        best = self.best_torch(case)
        return None if best is None else best / self.latency_ms[case][key]

    def mean_speedup(self, key: str) -> float:
        """Geometric mean of `speedup` over all cases."""
        return statistics.geometric_mean(self.speedup(case, key) for case in self.latency_ms)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures, with the ratios that the table prints."""
        data = asdict(self)
        ours = [key for key in self.variants if key != FLOAT and key not in TORCH_KEYS]
        data["speedup_over_fp32"] = {
            case: {key: self.speedup(case, key) for key in self.variants} for case in self.latency_ms
        }
        data["speedup_over_best_torch"] = {
            case: {key: self.speedup_over_torch(case, key) for key in ours} for case in self.latency_ms
        }
        return data
