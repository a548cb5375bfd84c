"""SmolLM2-135M: perplexity on the package's own text, greedy continuations, and latency of prompt and answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qkernels.demo.models import load_smollm
from qkernels.demo.result import ModelResult
from qkernels.demo.sentences import PROMPTS
from qkernels.demo.timing import interleaved
from qkernels.demo.variants import BUILD_STEPS, FLOAT, build

WINDOW = 1024  # tokens per perplexity window
WINDOWS, QUICK_WINDOWS = 20, 4  # scored: 20,480 tokens, or 4,096 with --quick
NEW_TOKENS = 32  # per greedy continuation
DECODE_CONTEXT = 64  # tokens in the cache when decoding is timed
DECODE_STEPS = 8  # decoded per timed call
PREFILL_CASES = ((1, 128), (1, 512), (4, 128))
DECODE_BATCHES = (1, 4, 16)
LOSS_ROWS = 256  # rows of logits whose loss is computed at once: bounds the memory for a copy of [rows, vocabulary]


@dataclass
class TextScore:
    """One model's reading of a text.

    `nats` is the negative log-likelihood summed over the `tokens` scored; `choices` holds the likeliest token at each.
    """

    nats: float
    tokens: int
    choices: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nats / self.tokens)


def held_out_text() -> str:
    """The text the language models are judged on; nothing is ever calibrated on it."""
    return resources.files("qkernels").joinpath("data/prose.txt").read_text(encoding="utf-8")


def score_text(
    model: nn.Module, ids: torch.Tensor, *, window: int = WINDOW, after_window: Callable[[], None] | None = None
) -> TextScore:
    """Score tokens in windows that do not overlap; the first token of each window is context alone.

    Args:
        ids: int64 `[tokens]`.
        window: tokens per window; a rest shorter than two tokens is dropped.
    """
    nats, tokens = 0.0, 0
    choices = []
    for start in range(0, ids.numel(), window):
        part = ids[start : start + window]
        if part.numel() < 2:
            break
        with torch.inference_mode():
            logits = model(part.unsqueeze(0), use_cache=False).logits[0, :-1]
            targets = part[1:]
            for row in range(0, logits.shape[0], LOSS_ROWS):
                rows = logits[row : row + LOSS_ROWS].float()
                nats += float(nn.functional.cross_entropy(rows, targets[row : row + LOSS_ROWS], reduction="sum"))
            choices.append(logits.argmax(dim=-1))
            tokens += targets.numel()
        if after_window is not None:
            after_window()
    if not tokens:
        raise ValueError(f"ids: expected at least 2 tokens, got {ids.numel()}")
    return TextScore(nats, tokens, torch.cat(choices))


def continue_greedily(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = NEW_TOKENS) -> list[int]:
    """The ids of a greedy continuation; shorter where the model ends its text."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of leading tokens two continuations share."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    return count


def run_smollm(*, quick: bool) -> ModelResult:
    """Sizes, perplexity, agreement and latency of SmolLM2-135M-Instruct.

    Args:
        quick: 4 windows of text, 2 prompts, fewer timing rounds.
    """
    with tqdm(desc="SmolLM2: load and quantize", total=1 + BUILD_STEPS, leave=False) as bar:
        bar.update()
        model, tokenizer = load_smollm()

        def step(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        variants = build(model, step=step)
    result = ModelResult("SmolLM2-135M-Instruct", sum(parameter.numel() for parameter in model.parameters()))
    result.add_sizes(variants)

    ids = tokenizer(held_out_text(), return_tensors="pt")["input_ids"][0]
    ids = ids[: WINDOW * (QUICK_WINDOWS if quick else WINDOWS)]
    scores: dict[str, TextScore] = {}
    windows = math.ceil(ids.numel() / WINDOW)
    with tqdm(desc=f"SmolLM2: perplexity over {ids.numel()} tokens", total=windows * len(variants), leave=False) as bar:
        for variant in variants:
            bar.set_postfix_str(variant.key)
            scores[variant.key] = score_text(variant.model, ids, after_window=bar.update)
    result.quality["perplexity"] = {key: score.perplexity for key, score in scores.items()}
    result.quality["same likeliest token, %"] = {
        key: 100.0 * float((score.choices == scores[FLOAT].choices).double().mean())
        for key, score in scores.items()
        if key != FLOAT
    }

    prompts = PROMPTS[:2] if quick else PROMPTS
    answers: dict[str, list[list[int]]] = {variant.key: [] for variant in variants}
    with tqdm(desc="SmolLM2: greedy continuations", total=len(prompts) * len(variants), leave=False) as bar:
        for variant in variants:
            for prompt in prompts:
                answers[variant.key].append(continue_greedily(variant.model, tokenizer, prompt))
                bar.update()
    total = sum(len(answer) for answer in answers[FLOAT])
    result.quality["greedy tokens before the first difference, %"] = {
        key: 100.0
        * sum(common_prefix(mine, theirs) for mine, theirs in zip(given, answers[FLOAT], strict=True))
        / total
        for key, given in answers.items()
        if key != FLOAT
    }
    result.note = (
        f"perplexity over {ids.numel()} tokens in windows of {WINDOW}; {len(prompts)} greedy continuations of "
        f"{NEW_TOKENS} tokens. The weights come from a 4-bit GGUF file (Q4_1), so they sit on a 4-bit grid already: "
        "fp32 here means that file, dequantized"
    )
    time_generation(
        result, {variant.key: variant.model for variant in variants}, vocabulary=len(tokenizer), quick=quick
    )
    return result


def time_generation(result: ModelResult, models: dict[str, Any], *, vocabulary: int, quick: bool) -> None:
    """Fill `result.latency_ms` with prompts (prefill) and single tokens (decode) at several batch sizes."""
    generator = torch.Generator().manual_seed(0)
    limits: dict[str, Any] = {"seconds": 1.0 if quick else 10.0, "min_rounds": 3 if quick else 7}
    for batch, tokens in PREFILL_CASES:
        ids = torch.randint(100, vocabulary, (batch, tokens), generator=generator)
        calls = {key: _prefill(model, ids) for key, model in models.items()}
        with tqdm(desc=f"SmolLM2: prompt of {tokens} tokens, batch {batch}", leave=False, unit="round") as bar:
            medians = interleaved(calls, after_round=bar.update, **limits)
        result.latency_ms[f"prefill, batch {batch} x {tokens} tokens"] = {
            key: 1e3 * value for key, value in medians.items()
        }
    for batch in DECODE_BATCHES:
        ids = torch.randint(100, vocabulary, (batch, DECODE_CONTEXT), generator=generator)
        calls = {key: _decode(model, ids) for key, model in models.items()}
        with tqdm(desc=f"SmolLM2: decode, batch {batch}", leave=False, unit="round") as bar:
            medians = interleaved(calls, after_round=bar.update, **limits)
        result.latency_ms[f"decode one token, batch {batch}"] = {
            key: 1e3 * value / DECODE_STEPS for key, value in medians.items()
        }


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            model(ids, use_cache=True, logits_to_keep=1)

    return call


def _decode(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A call that decodes `DECODE_STEPS` tokens behind the same context, which is read only once."""
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, -1:]

    def call() -> None:
        with torch.inference_mode():
            for _ in range(DECODE_STEPS):
                model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-DECODE_STEPS)  # negative: remove so many from the end

    return call
