"""Pictures of a result: a roofline, and the time against M for each scheme with the limit as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkernels.bench.grid import traffic
from qkernels.scheme import Scheme


def draw(result: dict[str, Any], path: Path, schemes: Sequence[str]) -> list[Path]:
    """Write ``path`` (the roofline) and beside it ``<stem>-<scheme>.png`` for each scheme; returns what was written.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = [path]
    figure = plt.figure(figsize=(9, 6), layout="constrained")
    _roofline(figure.add_subplot(), result)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    for scheme in schemes:
        own = path.with_name(f"{path.stem}-{scheme}{path.suffix}")
        shapes = sorted({(row["k"], row["n"]) for row in result["rows"]}, key=lambda shape: shape[0] * shape[1])
        figure, axes = plt.subplots(
            1, len(shapes), figsize=(4.2 * len(shapes), 4.2), squeeze=False, layout="constrained"
        )
        for axis, shape in zip(axes[0], shapes, strict=True):
            _against_rows(axis, result, scheme, shape)
        axes[0][0].set_ylabel("microseconds")
        axes[0][-1].legend(fontsize=7)
        figure.suptitle(_title(result))
        figure.savefig(own, dpi=130)
        plt.close(figure)
        written.append(own)
    return written


def _title(result: dict[str, Any]) -> str:
    return f"{result['machine']['processor']}, {result['threads']} threads, {result['isa']}"


def _roofline(axis: Any, result: dict[str, Any]) -> None:
    """Operations a second over operations a byte: bandwidth is a slope, peaks are ceilings."""
    ceilings = result["ceilings"]
    reads = {int(name[5:]): value["best"] for name, value in ceilings.items() if name.startswith("read.")}
    memory = reads[max(reads)]
    peak = ceilings[f"int8.{result['isa']}"]["best"]
    float_peak = max(value["best"] for name, value in ceilings.items() if name.startswith("fp32."))
    for top, style, name in ((peak, "k-", f"int8 {result['isa']}"), (float_peak, "k:", "fp32")):
        ridge = top / memory  # operations a byte from which on the peak is the limit
        left, right = min(0.5, ridge / 2), max(4096.0, ridge * 2)
        axis.plot([left, ridge, right], [left * memory / 1e9, top / 1e9, top / 1e9], style, lw=1)
        axis.text(right, top / 1e9 * 1.05, f"{name} {top / 1e9:.0f} GOPS", fontsize=7, ha="right")
    axis.plot([], [], "k-", lw=1, label=f"memory {memory / 1e9:.0f} GB/s")
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[result["input_dtype"]]
    state = "cold" if any(row["state"] == "cold" for row in result["rows"]) else "warm"
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    for index, name in enumerate(names):
        rows = [row for row in result["rows"] if row["contender"] == name and row["state"] == state]
        if not rows:
            continue
        scheme = Scheme.resolve(rows[0]["scheme"])
        xs = [2 * r["m"] * r["n"] * r["k"] / traffic(scheme, r["k"], r["n"], r["m"], itemsize) for r in rows]
        marker = "o" if rows[0]["ours"] else "x"
        axis.plot(xs, [row["gops"] for row in rows], marker, ms=5, color=f"C{index % 10}", label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GOPS", title=f"{_title(result)}, {state}")
    axis.set_ylim(min(row["gops"] for row in result["rows"]) / 2, 2 * peak / 1e9)
    axis.legend(fontsize=7, loc="lower right")


def _against_rows(axis: Any, result: dict[str, Any], scheme: str, shape: tuple[int, int]) -> None:
    """Time against M at one shape: ours, the rivals of the scheme, its limit."""
    here = [row for row in result["rows"] if (row["k"], row["n"]) == shape]
    state = "cold" if any(row["state"] == "cold" for row in here) else "warm"
    here = [row for row in here if row["state"] == state]
    layer = f"{scheme} layer"
    names = list(dict.fromkeys(r["contender"] for r in here if r["contender"] == layer or scheme in r["rival_of"]))
    for index, name in enumerate(names):
        rows = sorted((row for row in here if row["contender"] == name), key=lambda row: row["m"])
        thick = {"lw": 2.5, "color": "C3"} if name == layer else {"lw": 1, "color": f"C{(index + 3) % 10}"}
        axis.plot([r["m"] for r in rows], [r["median"] * 1e6 for r in rows], marker=".", label=name, **thick)
        if name == layer:
            axis.plot([r["m"] for r in rows], [r["limit"] * 1e6 for r in rows], "k--", lw=1, label="limit")
    axis.set(xscale="log", yscale="log", xlabel="M", title=f"K={shape[0]} N={shape[1]}, {state}")
