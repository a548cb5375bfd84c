"""Medians of interleaved samples: contenders take turns, so that a slow second hits all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns, sleep
from typing import Protocol

REST_SECONDS = 35e-3
"""Before each sample: thread pools go on spinning for a while after their last call (OpenMP's 6 ms, ONNX Runtime's 30),
and would take the cores of those who come next."""
SAMPLE_SECONDS = 300e-6  # a sample repeats its call until it lasts about this long
UNTIMED_SECONDS = 5e-3
"""About so long a contender runs untimed before each sample: threads that slept, or that the system put on one core,
take milliseconds to spread."""


class Sampler(Protocol):
    """Something that can be timed."""

    def sample(self, count: int) -> float:
        """Seconds of ``count`` calls."""


class Rotation:
    """Calls taken in turn; a single one is "warm", enough of them to fill memory are "cold".

    Args:
        calls: each runs the same work on weights of its own.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = list(calls)
        self._next = 0

    def sample(self, count: int) -> float:
        """Seconds of ``count`` calls."""
        calls, size, index = self.calls, len(self.calls), self._next
        start = perf_counter_ns()
        for _ in range(count):
            calls[index]()
            index += 1
            if index == size:
                index = 0
        elapsed = perf_counter_ns() - start
        self._next = index
        return elapsed * 1e-9


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the fastest sample and the number of samples."""

    median: float
    best: float
    samples: int


def interleave(samplers: Sequence[Sampler], *, rounds: int, seconds: float) -> list[Timing]:
    """Time all samplers side by side.

    Args:
        samplers: take turns, in an order that is drawn anew for each round.
        rounds: samples of each.
        seconds: a sampler that would need longer for its rounds gets fewer samples, at least two.

    Before each sample there are untimed calls: it finds threads awake and the caches as its own calls leave them.
    """
    counts, before, wanted = [], [], []
    for sampler in samplers:
        sampler.sample(1)
        once = min(sampler.sample(1), sampler.sample(1))
        count = max(1, min(1000, round(SAMPLE_SECONDS / max(once, 1e-7))))
        counts.append(count)
        before.append(max(1, min(1000, round(UNTIMED_SECONDS / max(once, 1e-7)))))
        wanted.append(max(2, min(rounds, int(seconds / max(once * count, 1e-7)))))
    taken: list[list[float]] = [[] for _ in samplers]
    turns, chance = list(zip(samplers, counts, before, wanted, taken, strict=True)), random.Random(0)
    for turn in range(rounds):
        chance.shuffle(turns)  # nobody always comes after the same one
        for sampler, count, untimed, enough, values in turns:
            # Those with few samples take them evenly over all the rounds.
            if turn * enough // rounds == (turn - 1) * enough // rounds and turn > 0:
                continue
            sleep(REST_SECONDS)
            sampler.sample(untimed)
            values.append(sampler.sample(count) / count)
    return [Timing(statistics.median(values), min(values), len(values)) for values in taken]
