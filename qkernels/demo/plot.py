"""The demo's figures as one PNG: sizes, speed and quality."""

from __future__ import annotations

import os
from typing import Any

from qkernels.demo.result import ModelResult
from qkernels.demo.variants import FLOAT

COLORS = {
    "fp32": "#8c8c8c",
    "torch x86": "#f2b37a",
    "torch onednn": "#d98032",
    "w8a8": "#8fc1ea",
    "w8a8 asym": "#4c8fd1",
    "w8a8 asym+emb": "#1f4e85",
}


def draw(results: list[ModelResult], path: str | os.PathLike[str], *, title: str) -> None:
    """Write the plot.

    Args:
        path: where; the format follows the suffix.
        title: the machine, printed over the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "qkernels[demo]"') from error
    figure = Figure(figsize=(14, 4.2 * (1 + len(results)) / 2 + 3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(1 + len(results), 2, width_ratios=(2, 1))
    _sizes(figure.add_subplot(grid[0, :]), results)
    for row, result in enumerate(results, start=1):
        _latency(figure.add_subplot(grid[row, 0]), result)
        _quality(figure.add_subplot(grid[row, 1]), result)
    figure.savefig(path, dpi=110)


def _sizes(axes: Any, results: list[ModelResult]) -> None:
    keys = results[0].variants
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        places = [index + (number - (len(keys) - 1) / 2) * width for index in range(len(results))]
        heights = [result.state_dict_bytes[key] / 1e6 for result in results]
        bars = axes.bar(places, heights, width, label=key, color=COLORS.get(key))
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(results)), [result.name for result in results])
    axes.margins(y=0.12)  # room for the labels
    axes.set_ylabel("MB")
    axes.set_title("torch.save(model.state_dict())", fontsize=10)
    axes.legend(fontsize=8)


def _latency(axes: Any, result: ModelResult) -> None:
    cases = list(result.latency_ms)
    keys = [key for key in result.variants if key != FLOAT]
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        places = [index + (number - (len(keys) - 1) / 2) * width for index in range(len(cases))]
        bars = axes.bar(places, [result.speedup(case, key) for case in cases], width, color=COLORS.get(key))
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.margins(y=0.12)
    axes.axhline(1.0, color=COLORS[FLOAT], linewidth=1)
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n").replace(" x ", "\nx ") for case in cases], fontsize=8)
    axes.set_title(f"{result.name}: times as fast as fp32", fontsize=10)


def _quality(axes: Any, result: ModelResult) -> None:
    axes.axis("off")
    if not result.quality:
        axes.text(0.5, 0.5, "random weights: no quality to measure", ha="center", va="center", fontsize=9)
        return
    lines = []
    for measure, values in result.quality.items():
        lines.append(measure)
        digits = 5 if "cosine" in measure else 2
        lines += [f"    {key:<14}{value:.{digits}f}" for key, value in values.items()]
    axes.text(0.0, 1.0, "\n".join(lines), ha="left", va="top", family="monospace", fontsize=9)
