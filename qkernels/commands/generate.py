"""`qkernels generate MODEL_DIR --prompt ...`: streams text and says how fast it came."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from qkernels.commands.common import (
    add_json_option,
    add_threads_option,
    apply_threads,
    non_negative_float,
    positive_int,
    write_json,
)
from qkernels.commands.quantize import DTYPES, add_scheme_options, chosen_scheme, parse_dtype, quantize_model


def add_parser(subparsers: Any) -> None:
    """Mount the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="stream text from a language model and print tokens per second",
        description="Generate text on the CPU from a directory that `qkernels quantize` wrote, or from a float one, "
        "which --scheme quantizes first. Prints the speed of the prompt (prefill) and of the answer (decode) apart.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="a quantized or a float model directory")
    parser.add_argument("--prompt", required=True, help="the text to continue, or the question to a chat model")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, metavar="N", help="stop after N tokens (default: 128)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the model's chat template"
    )
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    add_scheme_options(parser, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of a float model's parameters")
    add_threads_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    import torch

    from qkernels import hf

    if args.scheme is not None:
        chosen_scheme(args)
    apply_threads(args)
    hf.find_gguf(args.model, args.gguf_file)
    if hf.is_quantized(args.model):
        if args.scheme is not None:
            raise ValueError(f"--scheme: {args.model} is quantized already")
        model = hf.load_quantized(args.model)
    else:
        model = hf.load_float(args.model, gguf_file=args.gguf_file, dtype=parse_dtype(args.dtype))
        if args.scheme is not None:
            quantize_model(model, args)
    tokenizer = hf.load_tokenizer(args.model, gguf_file=args.gguf_file)
    if tokenizer is None:
        raise ValueError(f"model directory: expected a tokenizer in {args.model}, found none")
    if not callable(getattr(model, "generate", None)) or not model.can_generate():  # type: ignore[operator]
        raise ValueError(f"model directory: expected a language model, {type(model).__name__} does not generate text")

    torch.manual_seed(args.seed)
    result = stream(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        chat=not args.raw,
        echo=args.json != "-",
    )
    if args.json is not None:
        write_json(result, args.json)
    print(format_speed(result), file=sys.stderr)
    return 0


class TimedStreamer:
    """A transformers streamer that notes when each token came and passes it on to `inner`."""

    def __init__(self, inner: Any | None) -> None:
        self.inner = inner
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt first, then with every new token."""
        self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """Called once after the last token."""
        if self.inner is not None:
            self.inner.end()


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = True,
    echo: bool = True,
) -> dict[str, Any]:
    """Generate from `prompt`, printing the text as it comes.

    Args:
        temperature: 0 for greedy decoding.
        chat: wrap the prompt in the tokenizer's chat template, where it has one.
        echo: print to standard output.

    Returns:
        `text`, `prompt_tokens`, `new_tokens`, `prefill_seconds` (prompt in, first token out),
            `prefill_tokens_per_second`, `decode_seconds` (all tokens after the first) and
            `decode_tokens_per_second`.

    Raises:
        ValueError: the prompt has no tokens.
    """
    import torch
    from transformers import TextStreamer

    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = int(inputs["input_ids"].shape[-1])
    if length == 0:
        raise ValueError("prompt: expected text of at least one token, it is empty")
    streamer = TimedStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if echo else None)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            **choice,
        )
    # The first time stamp is the prompt's, taken when the work starts; the second is the first new token's.
    first, last = streamer.times[1], streamer.times[-1]
    prefill, decode = first - streamer.times[0], last - first
    new_tokens = len(streamer.times) - 1
    answer = output[0] if model.config.is_encoder_decoder else output[0, length:]
    return {
        "text": tokenizer.decode(answer, skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": length / prefill,
        "decode_seconds": decode,
        "decode_tokens_per_second": (new_tokens - 1) / decode if new_tokens > 1 else None,
    }


def format_speed(result: dict[str, Any]) -> str:
    """One line: tokens per second of prompt and answer."""
    text = f"[prefill {result['prompt_tokens']} tokens, {result['prefill_tokens_per_second']:.1f} tokens/s"
    if result["decode_tokens_per_second"] is not None:
        text += f"; decode {result['new_tokens']} tokens, {result['decode_tokens_per_second']:.1f} tokens/s"
    return text + "]"
