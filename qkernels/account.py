"""Making the report: the bytes of every module before and after, and what is known of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from . import _C
from .nn import QuantEmbedding, QuantLinear
from .report import LayerReport, Report, measure
from .sharing import owners
from .survey import is_conv1d, module_note, type_name

__all__ = ["Snapshot", "account", "fusion_notes", "take_snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A model before a conversion: bytes and class of every module, by name."""

    bytes: dict[str, int]
    types: dict[str, str]


def take_snapshot(model: nn.Module) -> Snapshot:
    """What `account` compares with."""
    return Snapshot(measure(model), {name: type_name(module) for name, module in model.named_modules()})


def account(model: nn.Module, before: Snapshot, notes: Mapping[str, str | None]) -> Report:
    """The report of a conversion that has just been done.

    Args:
        model: as it is now.
        before: as it was.
        notes: layer -> why it was left, or what else there is to say of it.
    """
    after = measure(model)
    tables = owners(model)
    entries = []
    held = _held(model, before.bytes)
    for name, module in model.named_modules():
        shape = _shape(module)
        if name not in after and name not in held and shape is None:
            continue
        note = notes.get(name)
        scheme = kernel = None
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            scheme, kernel = module.scheme.name, module.kernel
            shares = f"shares the weight of {tables[name]}" if name in tables else None
            note = "; ".join(text for text in (shares, module.reason, note) if text) or None
        elif note is None:
            note = module_note(module)
        entries.append(
            LayerReport(
                name=name,
                type=before.types.get(name, type_name(module)),
                shape=shape,
                scheme=scheme,
                kernel=kernel,
                bytes_before=held.get(name, 0),
                bytes_after=after.get(name, 0),
                reason=note,
            )
        )
    return Report(tuple(entries), isa=str(_C.info()["isa"]))


def _held(model: nn.Module, before: Mapping[str, int]) -> dict[str, int]:
    """Bytes by module; those of modules that are gone (experts put together again) count on what stands around them."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    held: dict[str, int] = {}
    for name, count in before.items():
        while name not in names:
            name = name.rpartition(".")[0]
        held[name] = held.get(name, 0) + count
    return held


def fusion_notes(fused: Mapping[str, str], notes: Mapping[str, str | None]) -> dict[str, str | None]:
    """``notes`` of the layers that were fused, with what fusion says of them."""
    return {layer: "; ".join(text for text in (notes.get(layer), words) if text) for layer, words in fused.items()}


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """`(out_features, in_features)` or `(num_embeddings, embedding_dim)` of a layer; None for other modules."""
    if isinstance(module, (QuantEmbedding, nn.Embedding, nn.EmbeddingBag)):
        return int(module.num_embeddings), int(module.embedding_dim)
    if isinstance(module, (QuantLinear, nn.Linear)):
        return int(module.out_features), int(module.in_features)
    if is_conv1d(module):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return None
