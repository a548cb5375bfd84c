"""The demo's figures as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qkernels.demo.result import ModelResult

MISSING = "-"
NOTE_WIDTH = 110  # characters


def format_grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first flush left and the others flush right; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])])


def format_result(result: ModelResult) -> str:
    """One model's sizes, quality and latency, one column per contender.

    The last column of a latency row is the ratio of torch's better engine to our fastest contender.
    """
    keys = result.variants
    rows = [["", *keys, "vs best torch"]]
    rows.append(["saved directory, MB", *(_megabytes(result.directory_bytes[key]) for key in keys), ""])
    rows.append(["torch.save(state_dict), MB", *(_megabytes(result.state_dict_bytes[key]) for key in keys), ""])
    for measure, values in result.quality.items():
        digits = 5 if "cosine" in measure else 2
        rows.append([measure, *(f"{values[key]:.{digits}f}" if key in values else MISSING for key in keys), ""])
    for case, values in result.latency_ms.items():
        ratios = [
            ratio for ratio in (result.speedup_over_torch(case, key) for key in ours(result)) if ratio is not None
        ]
        rows.append(
            [f"{case}, ms", *(f"{values[key]:.2f}" for key in keys), f"{max(ratios):.2f}x" if ratios else MISSING]
        )
    head = f"{result.name}, {result.parameters / 1e6:.1f} M parameters"
    text = f"{head}\n{format_grid(rows)}"
    return f"{text}\n{textwrap.fill(f'({result.note})', NOTE_WIDTH)}" if result.note else text


def ours(result: ModelResult) -> list[str]:
    """The contenders of this package."""
    return [key for key in result.variants if key in result.reports]


def _megabytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / 1e6:.1f}"
