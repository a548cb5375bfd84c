"""`qkernels info`: which kernels serve on this machine, and why."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qkernels.commands.common import add_json_option, write_json


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser("info", help="the machine, the chosen kernels and the reason for the choice")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print `qkernels.info()`."""
    import qkernels

    facts = qkernels.info()
    if args.json is not None:
        write_json(facts, args.json)
    if args.json != "-":
        print(format_facts(facts))
    return 0


def format_facts(facts: Mapping[str, Any], *, indent: str = "") -> str:
    """A nested mapping as aligned `key  value` lines."""
    width = max((len(str(key)) for key in facts), default=0)
    lines: list[str] = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", format_facts(value, indent=indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
            lines.append(f"{indent}{key:<{width}}  {shown or '-'}")
    return "\n".join(lines)
