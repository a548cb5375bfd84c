"""What a run of either benchmark says at its end, and writes: rows, notes, and what they were measured with."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["outcome"]


def outcome(
    args: argparse.Namespace, notes: Sequence[str], rows: Sequence[DataclassInstance], **facts: Any
) -> dict[str, Any]:
    """The result of a run, whose notes are printed; written to ``--json`` where that is given.

    Args:
        facts: what the benchmark knows of the machine and of the run.
    """
    result = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["qkernels", *sys.argv[1:]],
        **facts,
        "versions": versions(),
        "commit": commit(),
        "notes": list(notes),
        "rows": [asdict(row) for row in rows],
    }
    for note in notes:
        print(note)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def versions() -> Mapping[str, str]:
    """Of everything that was, or could have been, measured."""
    found = {}
    for name in ("qkernels", "torch", "numpy", "onnxruntime", "openvino", "humming-kernels", "gemlite"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that runs, with "+" if it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
