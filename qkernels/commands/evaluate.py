"""`qkernels evaluate MODEL_DIR --scheme ...`: what quantizing a model costs, measured before and after."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from qkernels.commands.calibration import add_calibration_options, calibrated_options, smoothing
from qkernels.commands.common import (
    add_json_option,
    add_threads_option,
    apply_threads,
    non_negative_float,
    positive_int,
    write_json,
)
from qkernels.commands.quantize import DTYPES, add_scheme_options, chosen_scheme, parse_dtype, quantize_model

WINDOW = 1024  # tokens per window of perplexity
BATCH = 16  # sentences embedded at once
BLOCK_TOKENS = 256  # tokens that the error of every block is measured on


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="perplexity or embedding similarity, and the error of every block, before and after quantizing",
        description="Load a float model directory, measure it, quantize it, measure it again. Language models read a "
        "held-out text (perplexity); encoders embed sentences (cosine to the float model's). Nothing is stored.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="a float Hugging Face model directory, or one with GGUF")
    add_scheme_options(parser)
    add_calibration_options(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="text to judge on; for encoders one sentence per line (default: the package's)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=20_480, metavar="N", help="score N tokens at most (default: 20480)"
    )
    parser.add_argument(
        "--max-rise",
        type=non_negative_float,
        metavar="PERCENT",
        help="exit with 1 if perplexity rises by more than this",
    )
    parser.add_argument(
        "--min-cosine", type=non_negative_float, metavar="COSINE", help="exit with 1 if a cosine is below this"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the error of every block (PNG, SVG, PDF)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the float model")
    add_threads_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, quantize, measure, print."""
    from qkernels import evaluate, hf
    from qkernels.hooks import find_algorithm

    scheme = chosen_scheme(args)
    smoothing(args)
    find_algorithm(args.algorithm)
    _check_disjoint(args)
    if hf.find_gguf(args.model, args.gguf_file) is None and hf.is_quantized(args.model):
        raise ValueError(f"model directory: {args.model} is quantized already; evaluate needs the float model")
    apply_threads(args)
    print(f"loading {args.model}", file=sys.stderr)
    model = hf.load_float(args.model, gguf_file=args.gguf_file, dtype=parse_dtype(args.dtype))
    tokenizer = hf.load_tokenizer(args.model, gguf_file=args.gguf_file)
    if tokenizer is None:
        raise ValueError(f"model directory: expected a tokenizer in {args.model}, found none")
    options = calibrated_options(args, tokenizer, static=not scheme.activation_dynamic)
    judge = _Judge(model, tokenizer, args)

    before = judge.measure()
    blocks = evaluate.observe_blocks(model, judge.sample)
    started = time.perf_counter()
    report = quantize_model(model, args, **options)
    seconds = time.perf_counter() - started
    after = judge.measure()
    errors = evaluate.block_errors(blocks, evaluate.observe_blocks(model, judge.sample))

    result = {
        "model": str(args.model),
        "scheme": scheme.name,
        "smooth": args.smooth,
        "algorithm": args.algorithm,
        "finer": args.finer,
        "seconds": seconds,
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "quality": judge.compare(before, after),
        "block_errors": {name or "output": value for name, value in errors.items()},
        "report": report.to_dict(),
    }
    if args.plot is not None:
        draw(result, args.plot)
    if args.json is not None:
        write_json(result, args.json)
    if args.json != "-":
        print(format_result(result))
    return 0 if within(result["quality"], args) else 1


def _check_disjoint(args: argparse.Namespace) -> None:
    if (
        args.text is not None
        and args.calibration is not None
        and Path(args.text).resolve() == Path(args.calibration).resolve()
    ):
        raise ValueError(f"--text: expected another file than --calibration, got {args.text} for both")


class _Judge:
    """Measures one model the same way twice."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        from qkernels import evaluate
        from qkernels.demo.language import held_out_text
        from qkernels.demo.sentences import all_sentences

        self.model, self.tokenizer = model, tokenizer
        own = None if args.text is None else Path(args.text).read_text(encoding="utf-8")
        self.language = bool(getattr(model, "can_generate", lambda: False)())
        if self.language:
            ids = tokenizer(own or held_out_text(), return_tensors="pt")["input_ids"][0]
            self.windows = evaluate.text_windows(ids, WINDOW, args.tokens)
            self.sample: list[Any] = [{"input_ids": self.windows[0][:, :BLOCK_TOKENS]}]
            return
        self.sentences = all_sentences() if own is None else [line for line in own.splitlines() if line.strip()]
        if not self.sentences:
            raise ValueError(f"--text: expected sentences, one per line, in {args.text}")
        self.batches = [
            dict(
                tokenizer(
                    self.sentences[i : i + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"
                )
            )
            for i in range(0, len(self.sentences), BATCH)
        ]
        self.sample = self.batches[:1]

    def measure(self) -> Any:
        """A `TextLoss`, or embeddings `[sentences, width]`."""
        import torch

        from qkernels import evaluate, hf

        if self.language:
            return evaluate.perplexity(self.model, self.windows, progress=True)
        with torch.inference_mode():
            parts = [hf.mean_pool(self.model(**batch)[0], batch["attention_mask"]) for batch in self.batches]
        return torch.cat(parts)

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        """What is printed and stored."""
        from qkernels import evaluate

        if self.language:
            rise = 100.0 * (after.perplexity / before.perplexity - 1.0)
            return {
                "tokens": before.tokens,
                "perplexity": {"before": before.perplexity, "after": after.perplexity},
                "rise_percent": rise,
            }
        values = evaluate.cosines(before, after)
        return {"sentences": len(values), "cosine": {"min": float(values.min()), "mean": float(values.mean())}}


def within(quality: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the result is as good as the user demanded."""
    if args.max_rise is not None and "rise_percent" in quality and not quality["rise_percent"] <= args.max_rise:
        return False
    return not (args.min_cosine is not None and "cosine" in quality and not quality["cosine"]["min"] >= args.min_cosine)


def format_result(result: dict[str, Any]) -> str:
    """The table."""
    quality, size = result["quality"], result["bytes"]
    lines = [
        f"{result['model']}: {result['scheme']}, {result['algorithm']}"
        + (f", smoothed ({result['smooth']})" if result["smooth"] is not None else "")
        + (f", {result['finer']:g} % of the weights finer" if result["finer"] else "")
        + f", quantized in {result['seconds']:.1f} s",
        f"resident size   {size['before'] / 1e6:10.2f} MB -> {size['after'] / 1e6:10.2f} MB",
    ]
    if "perplexity" in quality:
        values = quality["perplexity"]
        lines.append(
            f"perplexity      {values['before']:10.3f}    -> {values['after']:10.3f}     "
            f"{quality['rise_percent']:+.2f} % ({quality['tokens']} tokens)"
        )
    else:
        values = quality["cosine"]
        lines.append(
            f"cosine to float {values['mean']:10.5f} mean, {values['min']:.5f} min ({quality['sentences']} sentences)"
        )
    width = max(len(name) for name in result["block_errors"])
    lines.append("relative error of the output of")
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in result["block_errors"].items()]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: str) -> None:
    """The error of every block as bars.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "qkernels[demo]"') from error
    names, values = list(result["block_errors"]), list(result["block_errors"].values())
    figure = Figure(figsize=(max(6.0, 0.3 * len(names)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(names)), values, color="#4c8fd1")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylabel("relative error of the output")
    axes.set_title(f"{result['scheme']}, {result['algorithm']}", fontsize=10)
    figure.savefig(path, dpi=110)
