"""The process that :class:`qkernels.bench.rivals_zentorch.Zentorch` talks to. It runs under another interpreter, so it
imports nothing of qkernels; one JSON object a line goes in, one comes out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    import torch
    import zentorch  # noqa: F401  registers its operators

    ops = torch.ops.zentorch
    layers: list[tuple[Any, Any, Any]] = []
    calls: list[Callable[[], Any]] = []
    position = 0

    def build(path: str, copies: int) -> None:
        state = torch.load(path, weights_only=True)
        weight, bias = state["weight"], state["bias"]
        scale = weight.abs().amax(1) / 127
        levels = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
        layers.clear()
        calls.clear()
        for _ in range(copies):
            layers.append((ops.zentorch_weight_prepack_for_dynamic_qlinear(levels.clone()), scale, bias))

    def bind(path: str) -> None:
        x = torch.load(path, weights_only=True)

        def call(layer: tuple[Any, Any, Any]) -> Callable[[], Any]:
            weight, scale, bias = layer
            return lambda: ops.zentorch_dynamic_qlinear(x, weight, scale, bias, is_weight_prepacked=True)

        calls[:] = [call(layer) for layer in layers]

    def sample(count: int, cold: bool) -> float:
        nonlocal position
        used = calls if cold else calls[:1]
        start = time.perf_counter_ns()
        for _ in range(count):
            used[position % len(used)]()
            position += 1
        return (time.perf_counter_ns() - start) * 1e-9

    commands: dict[str, Callable[..., Any]] = {
        "start": lambda threads: torch.set_num_threads(threads),
        "build": build,
        "bind": bind,
        "output": lambda path: torch.save(calls[0](), path),
        "sample": sample,
    }
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"result": commands[request.pop("command")](**request)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
