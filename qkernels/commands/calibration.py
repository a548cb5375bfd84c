"""Options and data of calibrated quantization, for every subcommand that quantizes."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from qkernels.commands.common import non_negative_float, positive_int

WINDOW = 256  # tokens per batch of a language model
LINES = 16  # sentences per batch of an encoder


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """`--smooth`, `--algorithm` and where their data comes from."""
    parser.add_argument(
        "--smooth", metavar="ALPHA", help='SmoothQuant before quantizing: a number from 0 to 1, or "auto" (needs data)'
    )
    parser.add_argument(
        "--algorithm",
        default="rtn",
        metavar="NAME",
        help="how weights are rounded: rtn (to nearest, default), mse, hqq; with data: gptq, awq",
    )
    parser.add_argument(
        "--finer",
        type=percentage,
        default=0.0,
        metavar="PERCENT",
        help="w8a16 for the layers that suffer most, up to this share of the weights (needs data)",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text to calibrate on (default: a short one of the package)"
    )
    parser.add_argument(
        "--calibration-tokens",
        type=positive_int,
        default=8192,
        metavar="N",
        help="use N tokens at most (default: 8192)",
    )


def percentage(text: str) -> float:
    """An argparse type: a number from 0 to 100."""
    value = non_negative_float(text)
    if value > 100.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 100, got {text!r}")
    return value


def smoothing(args: argparse.Namespace) -> float | str | None:
    """The value of `--smooth`.

    Raises:
        ValueError: neither a number nor "auto".
    """
    if args.smooth is None or args.smooth == "auto":
        return args.smooth  # type: ignore[no-any-return]
    try:
        return float(args.smooth)
    except ValueError:
        raise ValueError(f"--smooth: expected a number from 0 to 1 or 'auto', got {args.smooth!r}") from None


def calibrated_options(args: argparse.Namespace, tokenizer: Any, *, static: bool = False) -> dict[str, Any]:
    """The keywords of `quantize_model` that the options stand for.

    Raises:
        ValueError: data is needed and there is no tokenizer to read it with.
        OSError: the file cannot be read.
    """
    smooth = smoothing(args)
    options: dict[str, Any] = {"smooth": smooth, "algorithm": args.algorithm, "finer": args.finer}
    if smooth is not None or args.algorithm in ("gptq", "awq") or static or args.finer:
        if tokenizer is None:
            raise ValueError("calibration: expected a tokenizer in the model directory, found none")
        options["calibration"] = text_batches(tokenizer, calibration_text(args.calibration), args.calibration_tokens)
    return options


def calibration_text(path: str | None) -> str:
    """The text of a file, or the package's own."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    return resources.files("qkernels").joinpath("data/calibration.txt").read_text(encoding="utf-8")


def text_batches(tokenizer: Any, text: str, limit: int) -> list[dict[str, Any]]:
    """Paragraphs as padded batches where the tokenizer can pad, else one row of tokens after the other."""
    if getattr(tokenizer, "mask_token", None) is not None and tokenizer.pad_token is not None:
        lines = sorted((line for line in text.splitlines() if line.strip()), key=len)  # little padding
        return [
            dict(tokenizer(lines[i : i + LINES], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, len(lines), LINES)
        ]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0][:limit]
    if ids.numel() < 2:
        raise ValueError("calibration: expected a text of at least two tokens")
    whole = ids[: max(ids.numel() // WINDOW, 1) * WINDOW]
    return [{"input_ids": part.unsqueeze(0)} for part in whole.split(WINDOW)]
