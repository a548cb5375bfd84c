"""Latency of several models side by side, on a machine that others may use at the same time.

The models take turns within every round, so that a slow second of the machine hits all of them, and each one's figure
is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 40,
    after_round: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Median seconds of each call.

    Args:
        calls: what to time, by name; each is run once beforehand, untimed.
        seconds: rounds go on until this much time has passed.
        min_rounds: rounds run in any case.
        max_rounds: the most rounds run.
        after_round: called after each round, for progress.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(max_rounds):
        # Every round starts with another one, so that no model always runs behind the same neighbour.
        start = number % len(names)
        for name in names[start:] + names[:start]:
            before = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - before)
        if after_round is not None:
            after_round()
        if number + 1 >= min_rounds and time.perf_counter() - started >= seconds:
            break
    return {name: statistics.median(values) for name, values in samples.items()}
