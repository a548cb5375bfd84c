"""What several subcommands share: JSON output and options that appear more than once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json [FILE]`: without FILE, JSON goes to standard output in place of the text."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default=None,
        metavar="FILE",
        help="write the result as JSON to FILE, or to standard output in place of the text",
    )


def write_json(data: Any, destination: str) -> None:
    """Write `data` to `destination`, a path or "-" for standard output.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(destination).write_text(text, encoding="utf-8")


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """Add `--threads N`, applied by `apply_threads`."""
    parser.add_argument(
        "--threads", type=positive_int, default=None, metavar="N", help="CPU threads (default: torch's own choice)"
    )


def apply_threads(args: argparse.Namespace) -> None:
    """Set torch's thread count when the user gave one."""
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
