"""Encoders: all-MiniLM-L6-v2 (embeddings of sentences) and the DistilBERT of the articles (sizes and speed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qkernels.demo.models import load_minilm, make_distilbert
from qkernels.demo.result import ModelResult
from qkernels.demo.sentences import all_sentences
from qkernels.demo.timing import interleaved
from qkernels.demo.variants import BUILD_STEPS, FLOAT, Variant, build
from qkernels.hf import mean_pool

# (batch, tokens): a short query, one paragraph, and two batch sizes of paragraphs.
MINILM_CASES = ((1, 16), (1, 128), (8, 128), (32, 128))
DISTILBERT_CASES = ((1, 128), (8, 128))
BATCH = 16


def run_minilm(*, quick: bool) -> ModelResult:
    """Sizes, cosine similarity of sentence embeddings to fp32, and latency of all-MiniLM-L6-v2.

    Args:
        quick: fewer timing rounds.
    """
    with tqdm(desc="MiniLM: load and quantize", total=1 + BUILD_STEPS, leave=False) as bar:
        bar.update()
        model, tokenizer = load_minilm()
        variants = build(model, step=lambda text: _step(bar, text))
    result = ModelResult("all-MiniLM-L6-v2", _parameters(model))
    result.add_sizes(variants)

    sentences = all_sentences()
    cosines: dict[str, torch.Tensor] = {}
    reference: torch.Tensor | None = None
    for variant in tqdm(variants, desc=f"MiniLM: embed {len(sentences)} sentences", leave=False):
        embedded = embed(variant.model, tokenizer, sentences)
        reference = embedded if reference is None else reference
        cosines[variant.key] = (embedded.double() * reference.double()).sum(dim=-1)
    result.quality["cosine to fp32, min"] = {key: float(value.min()) for key, value in cosines.items() if key != FLOAT}
    result.quality["cosine to fp32, mean"] = {
        key: float(value.mean()) for key, value in cosines.items() if key != FLOAT
    }
    result.note = f"cosine of {len(sentences)} sentences in 20 languages"

    vocabulary = tokenizer.vocab_size
    time_batches(result, variants, MINILM_CASES, vocabulary=vocabulary, quick=quick, label="MiniLM")
    return result


def run_distilbert(*, quick: bool) -> ModelResult:
    """Sizes and latency of the articles' DistilBERT, random weights.

    Args:
        quick: fewer timing rounds.
    """
    with tqdm(desc="DistilBERT: build and quantize", total=1 + BUILD_STEPS, leave=False) as bar:
        bar.update()
        model = make_distilbert()
        variants = build(model, step=lambda text: _step(bar, text))
    result = ModelResult(
        "DistilBERT (random weights)", _parameters(model), note="question-answering head, sizes as in the articles"
    )
    result.add_sizes(variants)
    time_batches(result, variants, DISTILBERT_CASES, vocabulary=30_522, quick=quick, label="DistilBERT")
    return result


def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Normalized sentence embeddings `[sentences, width]` in fp32."""
    parts = []
    for start in range(0, len(sentences), BATCH):
        inputs = tokenizer(
            sentences[start : start + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        parts.append(mean_pool(hidden, inputs["attention_mask"]))
    return torch.cat(parts)


def time_batches(
    result: ModelResult,
    variants: list[Variant],
    cases: tuple[tuple[int, int], ...],
    *,
    vocabulary: int,
    quick: bool,
    label: str,
) -> None:
    """Fill `result.latency_ms` with one row per (batch, tokens)."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens in cases:
        ids = torch.randint(1000, vocabulary, (batch, tokens), generator=generator)
        mask = torch.ones_like(ids)
        calls = {variant.key: _forward(variant.model, ids, mask) for variant in variants}
        with tqdm(desc=f"{label}: latency, batch {batch} x {tokens} tokens", leave=False, unit="round") as bar:
            medians = interleaved(
                calls,
                seconds=1.0 if quick else 10.0,
                min_rounds=3 if quick else 7,
                after_round=lambda bar=bar: bar.update(),  # type: ignore[misc]
            )
        result.latency_ms[f"batch {batch} x {tokens} tokens"] = {key: 1e3 * value for key, value in medians.items()}


def _forward(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    def call() -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)

    return call


def _step(bar: Any, text: str) -> None:
    bar.set_postfix_str(text)
    bar.update()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
