"""The `qkernels` command: one parser, one place that turns errors into messages.

Every subcommand lives in its own module under `qkernels.commands` and offers `add_parser(subparsers)`, which must
set the default `run`, a function `(argparse.Namespace) -> int`. Modules import transformers only inside `run`,
so that `--help` stays quick.

Exit codes: 0 success, 1 a check that the user asked for failed, 2 wrong usage or unusable input (one line on standard
error, no traceback unless `--debug`), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from qkernels._version import __version__
from qkernels.bench.cli import add_parser as add_bench_parser
from qkernels.commands import demo, evaluate, generate, info, inspect, quantize

# What unusable input raises: our checks (ValueError, TypeError), the file system and transformers (OSError), a missing
# extra (ImportError).
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, subcommands included."""
    parser = argparse.ArgumentParser(
        prog="qkernels", description="INT8/INT4 Linear layers for PyTorch: quantize, inspect, run and measure models."
    )
    parser.add_argument("--version", action="version", version=f"qkernels {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (info, demo, quantize, inspect, generate, evaluate):
        command.add_parser(subparsers)
    add_bench_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes them from `sys.argv`.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("qkernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`qkernels info | head`): nothing went wrong, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if args.debug:
            traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        print(f"qkernels {args.command}: error: {text}", file=sys.stderr)
        return 2
