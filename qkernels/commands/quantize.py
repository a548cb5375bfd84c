"""`qkernels quantize MODEL_DIR -o OUT`: a float Hugging Face directory in, a quantized one out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from qkernels.commands.calibration import add_calibration_options, calibrated_options, smoothing
from qkernels.commands.common import add_json_option, add_threads_option, apply_threads, positive_int, write_json
from qkernels.scheme import Scheme

REPORT_FILE = "qkernels_report.json"
DTYPES = ("float32", "bfloat16", "float16", "auto")


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a Hugging Face model directory (safetensors, PyTorch or GGUF)",
        description="Quantize the Linear layers of a Hugging Face model directory and store the result with its "
        "configuration and tokenizer. The output loads without a network: `qkernels generate OUT`, or "
        "qkernels.hf.load_quantized(OUT).",
    )
    parser.add_argument(
        "model", metavar="MODEL_DIR", help="directory with config.json and weights, or with a .gguf file"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="directory to create")
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds an earlier quantized model")
    add_scheme_options(parser)
    add_calibration_options(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of what stays float (default: float32)"
    )
    add_threads_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def add_scheme_options(parser: argparse.ArgumentParser, *, default: str | None = "w8a8") -> None:
    """The options that choose what is quantized and how; `generate` has them too."""
    shown = default or "none: run the model as it is"
    parser.add_argument(
        "--scheme", default=default, help=f"w8a8, w8a16, w4a8, w4a8_intscale, w4a16, w3a16 or w2a16 (default: {shown})"
    )
    parser.add_argument(
        "--asymmetric-activations",
        action="store_true",
        help="8-bit inputs with a zero point: more exact where inputs are one-sided or skewed",
    )
    parser.add_argument(
        "--group-size",
        type=positive_int,
        metavar="N",
        help="4-bit weights: one scale per N input features, a multiple of 8 (default: 128, 64 or 32, what fits)",
    )
    parser.add_argument(
        "--asymmetric-weights",
        action="store_true",
        help="4-bit weights with a zero point per group: more exact, a little larger",
    )
    parser.add_argument(
        "--embeddings", action="store_true", help="also quantize embeddings, and an output head tied to one"
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="only layers whose name matches (glob, or re:REGEX); repeatable",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="not layers whose name matches (default: *lm_head); repeatable",
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of MODEL_DIR to read")


def quantize_model(model: Any, args: argparse.Namespace, *, finer: float = 0.0, **calibrated: Any) -> Any:
    """Apply the scheme options to a float model in place, with a progress bar, and return the report.

    `finer`: percent of the weights that may become w8a16, those that suffer most from the scheme on the first batch
    of the data. `calibrated` are further keywords of `quantize_`: smoothing, algorithm and their data.
    """
    import qkernels

    options: dict[str, Any] = {"embeddings": args.embeddings, "progress": True, **calibrated}
    if args.include:
        options["include"] = tuple(args.include)
    if args.exclude:
        options["exclude"] = tuple(args.exclude)
    scheme = chosen_scheme(args)
    if finer:
        data, chosen = options["calibration"], {k: v for k, v in options.items() if k in ("include", "exclude")}
        if options["smooth"] is not None:  # before the layers are judged, not after
            qkernels.smooth_(model, data, alpha=options["smooth"], scheme=scheme, progress=True, **chosen)
            options["smooth"] = None
        ranking = qkernels.sensitivity(model, data[:1], scheme, progress=True, **chosen)
        options["overrides"] = ranking.overrides("w8a16", share=finer / 100.0)
    return qkernels.quantize_(model, scheme, **options)


def chosen_scheme(args: argparse.Namespace) -> Scheme:
    """The scheme that the options name.

    Raises:
        ValueError: no such preset, or one that has no groups, no zero points, or inputs that are not quantized.
    """
    scheme = Scheme.resolve(args.scheme)
    if args.group_size is not None:
        scheme = scheme.replace(group_size=args.group_size)
    if args.asymmetric_weights:
        scheme = scheme.replace(weight_symmetric=False)
    if args.asymmetric_activations:
        scheme = scheme.replace(activation_symmetric=False)
    return scheme


def run(args: argparse.Namespace) -> int:
    """Quantize and store; print the report."""
    from qkernels import hf
    from qkernels.hooks import find_algorithm

    chosen_scheme(args)  # a typo must not cost the time to load a model
    smoothing(args)
    find_algorithm(args.algorithm)
    if hf.find_gguf(args.model, args.gguf_file) is None and hf.is_quantized(args.model):
        raise ValueError(f"model directory: {args.model} is quantized already")
    target = hf.check_output(args.output, force=args.force)
    apply_threads(args)

    started = time.perf_counter()
    print(f"loading {args.model}", file=sys.stderr)
    model = hf.load_float(args.model, gguf_file=args.gguf_file, dtype=parse_dtype(args.dtype))
    tokenizer = hf.load_tokenizer(args.model, gguf_file=args.gguf_file)
    static = not chosen_scheme(args).activation_dynamic
    report = quantize_model(model, args, **calibrated_options(args, tokenizer, static=static))
    print(f"writing {target}", file=sys.stderr)
    hf.save_quantized(
        model,
        target,
        tokenizer=tokenizer,
        source=args.model,
        force=args.force,
        extra={REPORT_FILE: json.dumps(report.to_dict(), indent=1)},
    )
    stored = sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())
    seconds = time.perf_counter() - started

    if args.json is not None:
        write_json({"output": str(target), "bytes": stored, "seconds": seconds, "report": report.to_dict()}, args.json)
    if args.json != "-":
        print(report)
        print(f"\nstored {stored / 1e6:.1f} MB in {target} ({seconds:.1f} s)")
    return 0


def parse_dtype(name: str) -> Any:
    """The torch dtype of a name out of `DTYPES`; None for "auto"."""
    import torch

    return None if name == "auto" else getattr(torch, name)
