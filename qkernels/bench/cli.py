"""The command line of ``qkernels bench``. Torch and everything heavy is imported only when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ("768x768", "768x3072", "3072x768", "4096x4096", "4096x14336")
QUICK_SHAPES = ("256x128",)
ROWS = (1, 8, 32, 128, 512)
QUICK_ROWS = (1, 32)
RIVALS = (
    *("fp32", "bf16", "quantize_dynamic-x86", "quantize_dynamic-onednn", "int4pack", "int8pack"),
    *("onnxruntime", "onnxruntime-w4a8", "onnxruntime-w4a16", "onnxruntime-w8a16"),
    *("openvino", "openvino-w4a8", "openvino-w4a16", "openvino-w8a16", "zentorch"),
)


def _shape(text: str) -> tuple[int, int]:
    """An argparse type: ``KxN`` as ``(K, N)``."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected KxN such as 768x3072, got {text!r}")
    return int(parts[0]), int(parts[1])


def _positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand on ``subparsers`` (what ``ArgumentParser.add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels and their rivals against this machine's measured limits",
        description="Times every shape and number of rows M: the GEMM alone, quantize + GEMM, the whole layer, and the "
        "rivals that are installed, interleaved. Each result is compared with the exact one before it is timed.",
    )
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--rows", "-M", nargs="+", type=_positive, metavar="M", help=f"default: {ROWS}")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=["w8a8"],
        metavar="NAME",
        help="presets; attention or norm, by itself on a CPU; with --device cuda also quantize (default: w8a8)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the input")
    parser.add_argument(
        "--rivals",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(RIVALS)} (default: those that are installed and go with the schemes)",
    )
    parser.add_argument(
        "--zentorch-python", type=Path, metavar="PYTHON", help="interpreter of an environment with zentorch"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: torch's own choice")
    parser.add_argument("--isa", metavar="NAME", help="force a tier for this run (default: the one in use)")
    parser.add_argument("--state", choices=("cold", "warm", "both"), default="both", help="of the weights in the cache")
    parser.add_argument(
        "--cold-mb", type=_positive, default=512, metavar="MB", help="weights rotate through this much when cold"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="interleaved rounds per row (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.5, help="at most this long per contender, row and state")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the current GPU")
    parser.add_argument(
        "--cutlass",
        type=Path,
        metavar="LIBRARY",
        help="with --device cuda: what `make cutlass-rival` built, as a rival",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds, no cold rows: a check")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a roofline, and one plot of time against M")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that ``args`` describes; 1 if a result of ours was wrong, else 0."""
    if args.device == "cuda":
        return _run_cuda(args)
    from qkernels.bench import attention, norms
    from qkernels.bench.grid import run_grid

    alone: dict[str, tuple[tuple[str, ...], tuple[int, ...], Callable[[argparse.Namespace], int]]] = {
        "attention": (attention.SHAPES, attention.ROWS, attention.run_attention),
        "norm": (norms.SHAPES, norms.ROWS, norms.run_norms),
    }
    named = sorted(alone.keys() & set(args.schemes))
    if named and (len(args.schemes) > 1 or args.rivals):
        raise ValueError(f"--schemes: expected {named[0]} by itself on a CPU, without --rivals")
    if named and args.plot:
        raise ValueError(f"--plot: not for --schemes {named[0]}")
    shapes, rows, bench = alone[named[0]] if named else (SHAPES, ROWS, run_grid)
    args.shapes = args.shapes or [_shape(text) for text in (QUICK_SHAPES if args.quick else shapes)]
    args.rows = args.rows or list(QUICK_ROWS if args.quick else rows)
    args.rounds = args.rounds or (3 if args.quick else 15)
    if args.quick:
        args.state = "warm"
        args.seconds = min(args.seconds, 0.05)
    unknown = sorted(set(args.rivals or ()) - set(RIVALS))
    if unknown:
        raise ValueError(f"--rivals: expected names of {', '.join(RIVALS)}; got {', '.join(unknown)}")
    return bench(args)


def _run_cuda(args: argparse.Namespace) -> int:
    from qkernels.bench.cuda_grid import ROWS as CUDA_ROWS
    from qkernels.bench.cuda_grid import SHAPES as CUDA_SHAPES
    from qkernels.bench.cuda_grid import run_cuda_grid

    args.shapes = args.shapes or ([_shape(text) for text in QUICK_SHAPES] if args.quick else list(CUDA_SHAPES))
    args.rows = args.rows or list(QUICK_ROWS if args.quick else CUDA_ROWS)
    args.rounds = args.rounds or (3 if args.quick else 15)
    if args.dtype == "float32":  # the CPU's default; a GPU's activations are 16 bits wide
        args.dtype = "bfloat16"
    return run_cuda_grid(args)
