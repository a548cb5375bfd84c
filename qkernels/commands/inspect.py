"""`qkernels inspect OUT`: the report of a quantized directory, layer by layer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qkernels.commands.common import add_json_option, write_json
from qkernels.commands.quantize import REPORT_FILE
from qkernels.report import Report


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser("inspect", help="print the report of a quantized model directory")
    parser.add_argument("model", metavar="OUT", help="a directory that `qkernels quantize` wrote")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report that was stored with the model, or make one by loading it."""
    directory = Path(args.model)
    if not directory.is_dir():
        raise ValueError(f"OUT: expected an existing directory, got {args.model!r}")
    stored = directory / REPORT_FILE
    report = read_report(stored) if stored.is_file() else load_report(directory)
    if args.json is not None:
        write_json(report.to_dict(), args.json)
    if args.json != "-":
        print(report)
    return 0


def read_report(path: Path) -> Report:
    """The report that `qkernels quantize` stored.

    Raises:
        ValueError: not JSON, or not a report.
    """
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def load_report(directory: Path) -> Report:
    """The report of a directory that `qkernels.save` wrote beside a `config.json`: the model is loaded for it."""
    from qkernels import hf, serialization

    if not hf.is_quantized(directory):
        raise ValueError(f"OUT: expected a quantized model, {directory} holds no {serialization.MANIFEST}")
    with hf.quiet():
        model = hf.skeleton(hf.load_config(directory))
    return serialization.load(model, directory)
