"""The whole demo: three models one after the other, a table each, then JSON and a plot."""

from __future__ import annotations

import platform
import time
from typing import Any

import qkernels
from qkernels.demo.encoder import run_distilbert, run_minilm
from qkernels.demo.language import run_smollm
from qkernels.demo.plot import draw
from qkernels.demo.table import format_result

MODELS = {"minilm": run_minilm, "smollm2": run_smollm, "distilbert": run_distilbert}


def run_demo(*, models: list[str] | None = None, quick: bool = False, plot: str | None = None) -> dict[str, Any]:
    """Run the demo, print its tables and return its figures.

    Args:
        models: names out of `MODELS`, None for all of them.
        quick: less text and fewer timing rounds, for a look in two minutes; its figures are noisier.
        plot: where the PNG goes, None for no plot.

    Raises:
        ValueError: a package with a model is not installed, or an unknown model name.
        ImportError: transformers is not installed.
    """
    names = list(MODELS) if models is None else models
    for name in names:
        if name not in MODELS:
            raise ValueError(f"models: expected names out of {', '.join(MODELS)}, got {name!r}")
    started = time.perf_counter()
    facts = machine()
    version, count = facts["versions"]["qkernels"], facts["threads"]
    title = f"qkernels {version} on {facts['cpu']}, {count} thread{'s' * (count > 1)}, {facts['isa']} kernels"
    print(title + "\n")
    results = []
    for name in names:
        result = MODELS[name](quick=quick)
        results.append(result)
        print(format_result(result) + "\n")
    seconds = time.perf_counter() - started
    if plot is not None:
        draw(results, plot, title=title)
        print(f"plot: {plot}")
    print(f"{seconds:.0f} seconds")
    return {
        "machine": facts,
        "quick": quick,
        "seconds": seconds,
        "models": {name: result.to_dict() for name, result in zip(names, results, strict=True)},
    }


def machine() -> dict[str, Any]:
    """CPU, threads, kernels and versions that the figures belong to."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError('the demo needs transformers: pip install "qkernels[demo]"') from error
    facts = qkernels.info()
    return {
        "cpu": facts["processor"],
        "threads": facts["threads"],
        "isa": facts["isa"],
        "system": platform.platform(),
        "versions": {
            "qkernels": facts["version"],
            "torch": facts["torch"],
            "transformers": transformers.__version__,
            "python": facts["python"],
        },
    }
