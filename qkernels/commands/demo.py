"""`qkernels demo`: real models before and after, beside torch's own dynamic quantization."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkernels.commands.common import add_threads_option, apply_threads, write_json

MODELS = ("minilm", "smollm2", "distilbert")


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="quantize real models and compare size, speed and answers",
        description="Quantizes all-MiniLM-L6-v2, SmolLM2-135M and a DistilBERT, and compares size, latency and quality "
        "with fp32 and with torch's quantize_dynamic in the same run. The models come from installed packages; nothing "
        "is downloaded.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="less text, fewer timing rounds: noisier figures in about two minutes"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=None, metavar="NAME", help=f"some of: {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--plot", default="qkernels_demo.png", metavar="FILE", help="where the plot goes (default: %(default)s)"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no plot")
    parser.add_argument("--json", default=None, metavar="FILE", help="also write every figure as JSON")
    add_threads_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    plot = None if args.no_plot else args.plot
    for path in (plot, args.json):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: expected an existing directory to write to")
    apply_threads(args)
    from qkernels.demo.run import run_demo

    figures = run_demo(models=args.models, quick=args.quick, plot=plot)
    if args.json is not None:
        write_json(figures, args.json)
    return 0
