"""A picture of a GPU result: time against the number of rows, one panel per shape, with the limit as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLES = {
    "gemm": "C0o-",
    "gemm overlapped": "C0o--",
    "layer": "C1s-",
    "triton gemm": "C2^-",
    "int_mm": "C3x:",
    "cutlass": "C7D:",
    "cutlass best": "C7D--",
    "humming": "C9P:",
    "cublas bf16": "C4v:",
    "w4a16 layer": "C5o-",
    "w4a16 triton": "C2^-",
    "w4a8 triton": "C2^-",
    "w8a16 layer": "C8o-",
    "w8a16 triton": "C2^-",
    "w4a8_intscale layer": "C0s-",
    "w4a8_intscale gemm": "C0o-",
    "w4a8_intscale triton": "C3^-",
    "w4a8 layer": "C6s-",
    "w4a8 gemm": "C6o-",
}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Write the picture of a result of ``qkernels bench --device cuda`` to ``path``.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.0 * len(shapes), 4.4), squeeze=False, layout="constrained")
    for axis, (k, n) in zip(axes[0], shapes, strict=True):
        own = [row for row in rows if (row["k"], row["n"]) == (k, n)]
        limit = sorted({(row["m"], row["limit"]) for row in own if row["contender"] == own[0]["contender"]})
        axis.plot(*zip(*limit, strict=True), "k-", lw=1, label="limit")
        for name in dict.fromkeys(row["contender"] for row in own):
            points = sorted((row["m"], row["median"]) for row in own if row["contender"] == name)
            axis.plot(*zip(*points, strict=True), STYLES.get(name, "-"), ms=4, lw=1, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"K={k} N={n}")
        axis.set_xlabel("rows")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds")
    axes[0][-1].legend(fontsize=7)
    schemes = ", ".join(dict.fromkeys(row["scheme"].upper() for row in rows))
    figure.suptitle(f"{result['device']}, {schemes}, {result['dtype']} outputs, weights from memory")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
