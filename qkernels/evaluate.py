"""What a model lost by being quantized: perplexity of a text, agreement of embeddings, and where along the blocks.

    before = perplexity(model, windows), observe_blocks(model, batches)
    qk.quantize_(model, "w8a8")
    after = perplexity(model, windows), observe_blocks(model, batches)

transformers is not needed: batches are tensors, tuples or mappings, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .observe import call_model, output_tensors, quiescent
from .progress import Progress, tracking

__all__ = ["BlockOutputs", "TextLoss", "block_errors", "cosines", "observe_blocks", "perplexity", "text_windows"]

LOSS_ROWS = 256  # rows of logits whose loss is computed at once: bounds the memory for a copy of [rows, vocabulary]


@dataclass(frozen=True)
class TextLoss:
    """A language model's reading of a text: `nats` of negative log-likelihood over `tokens` scored."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nats / self.tokens)


def text_windows(ids: Tensor, window: int, limit: int | None = None) -> list[Tensor]:
    """Token ids `[tokens]` cut into rows `[1, window]` that do not overlap; a rest shorter than two is dropped.

    Args:
        limit: tokens to use at most.

    Raises:
        ValueError: fewer than two tokens, or a window below two.
    """
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    ids = ids.reshape(-1)[:limit]
    if ids.numel() < 2:
        raise ValueError(f"ids: expected at least 2 tokens, got {ids.numel()}")
    parts = [ids[start : start + window] for start in range(0, ids.numel(), window)]
    return [part.unsqueeze(0) for part in parts if part.numel() >= 2]


def perplexity(model: nn.Module, windows: Sequence[Tensor], *, progress: Progress = None) -> TextLoss:
    """Score windows of token ids `[1, tokens]`; the first token of each window is context alone.

    Args:
        model: called with the ids; its first floating-point output is the logits `[1, tokens, vocabulary]`.

    Raises:
        ValueError: no window, or logits of another shape.
    """
    nats, tokens = 0.0, 0
    with quiescent(model), tracking(progress, total=len(windows), what="perplexity") as step:
        for count, window in enumerate(windows):
            logits = output_tensors(call_model(model, window))[0]
            if logits.shape[:-1] != window.shape:
                raise ValueError(f"model: expected logits for ids {list(window.shape)}, got shape {list(logits.shape)}")
            rows, targets = logits[0, :-1], window[0, 1:]
            for row in range(0, len(rows), LOSS_ROWS):
                part = rows[row : row + LOSS_ROWS].float()
                nats += float(nn.functional.cross_entropy(part, targets[row : row + LOSS_ROWS], reduction="sum"))
            tokens += targets.numel()
            step(count + 1, len(windows), "")
    if not tokens:
        raise ValueError("windows: expected at least one, got none")
    return TextLoss(nats, tokens)


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of every pair of rows `[rows, width]`, fp64 `[rows]`."""
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {list(before.shape)}, got {list(after.shape)}")
    return nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)


@dataclass
class BlockOutputs:
    """What the blocks of a model (children of its ModuleLists) gave for some batches, in the order of their calls."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def observe_blocks(model: nn.Module, batches: Sequence[Any]) -> BlockOutputs:
    """Run the model and keep what every block gives, in fp32; the last entry, "", is the model's own output."""
    found = BlockOutputs()
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output_tensors(output)
            if tensors:
                found.outputs.setdefault(name, []).append(tensors[0].detach().to(torch.float32))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            handles += [c.register_forward_hook(keep(f"{name}.{key}")) for key, c in module.named_children()]
    try:
        with quiescent(model):
            for batch in batches:
                tensors = output_tensors(call_model(model, batch))
                if tensors:
                    found.outputs.setdefault("", []).append(tensors[0].to(torch.float32))
    finally:
        for handle in handles:
            handle.remove()
    found.outputs[""] = found.outputs.pop("", [])
    return found


def block_errors(before: BlockOutputs, after: BlockOutputs) -> dict[str, float]:
    """Norm of the change of every block's output over its norm; "" is the whole model."""
    errors = {}
    for name, expected in before.outputs.items():
        given = after.outputs.get(name, [])
        if len(given) != len(expected):
            raise ValueError(f"after: expected {len(expected)} outputs of {name!r}, got {len(given)}")
        change = sum(float((a - b).double().square().sum()) for a, b in zip(expected, given, strict=True))
        size = sum(float(a.double().square().sum()) for a in expected)
        errors[name] = math.sqrt(change / size) if size else math.sqrt(change)
    return errors
