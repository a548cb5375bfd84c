"""`qkernels inspect OUT`: the report of a quantized directory, layer by layer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qkernels.commands.common import add_json_option, write_json
from qkernels.commands.quantize import REPORT_FILE


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser("inspect", help="print the report of a quantized model directory")
    parser.add_argument("model", metavar="OUT", help="a directory that `qkernels quantize` wrote")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report that was stored with the model."""
    from qkernels.report import Report

    path = Path(args.model) / REPORT_FILE
    if not path.parent.is_dir():
        raise ValueError(f"OUT: expected an existing directory, got {args.model!r}")
    if not path.is_file():
        raise ValueError(
            f"OUT: expected a directory that `qkernels quantize` wrote, {args.model} holds no {REPORT_FILE}"
        )
    try:
        report = Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if args.json is not None:
        write_json(report.to_dict(), args.json)
    if args.json != "-":
        print(report)
    return 0
