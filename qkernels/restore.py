"""Filling a float model with stored tensors: what has to fit, and the exchange layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._manifest import LayerEntry, Manifest
from .account import account, fusion_notes, take_snapshot
from .fuse import fuse_
from .nn import QuantEmbedding, QuantLinear
from .parents import adapt_parents
from .progress import Progress, tracking
from .report import Report
from .sharing import linear_over
from .survey import Layer, dress, is_quantized, survey

__all__ = ["Reader", "Targets", "check_model", "fill_model"]

Slot = tuple[nn.Module, str]
"""A module and the key of one of its parameters or buffers."""


@dataclass
class Targets:
    """Where stored things go in a model.

    Args:
        layers: stored layer -> the float layer it replaces.
        slots: stored tensor -> every place in the model that it fills (several where parameters are tied).
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    slots: dict[str, list[Slot]] = field(default_factory=dict)


def _tensor_at(slot: Slot) -> torch.Tensor | None:
    module, key = slot
    return module._parameters.get(key) if key in module._parameters else module._buffers.get(key)


def check_model(model: nn.Module, manifest: Manifest) -> Targets:
    """Match what is stored with what the model has.

    Raises:
        ValueError: a layer or tensor the model lacks, one that is not stored, or one of another kind, shape or tie.
    """
    targets = Targets()
    layers = {name: layer for layer in survey(model) for name in layer.names}
    for name, entry in manifest.layers.items():
        targets.layers[name] = _match_layer(name, entry, layers.get(name))
    _adopt_tied_embeddings(targets, layers)
    replaced = {id(layer.module) for layer in targets.layers.values()}
    if len(replaced) != len(targets.layers):
        raise ValueError(
            "model: two stored layers are one and the same module in it; it is not the architecture that was saved"
        )

    replaced |= {id(parent._modules[key]) for layer in targets.layers.values() for parent, key in layer.sites}
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[Slot]] = {}
    for module in model.modules():
        if id(module) not in replaced:
            for key in [*module._parameters, *module._buffers]:
                tensor = _tensor_at((module, key))
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, key))
    own = {f"{name}.{suffix}" for name, entry in manifest.layers.items() for suffix in entry.specs()}
    filled: dict[int, str] = {}
    for name in [*manifest.headers, *manifest.aliases]:
        if name in own:
            continue
        prefix, _, key = name.rpartition(".")
        parent = modules.get(prefix)
        tensor = None if parent is None or id(parent) in replaced else _tensor_at((parent, key))
        if tensor is None:
            raise ValueError(f"model: has no parameter or buffer {name!r}, which is stored")
        stored = manifest.aliases.get(name, name)
        _check_tensor(name, tensor, manifest, stored)
        if filled.setdefault(id(tensor), stored) != stored:
            raise ValueError(f"model: ties {name!r} to another parameter, but they are stored as two")
        targets.slots.setdefault(stored, [])
        targets.slots[stored] += [s for s in places[id(tensor)] if s not in targets.slots[stored]]
    _check_complete(model, replaced, filled)
    return targets


def _adopt_tied_embeddings(targets: Targets, layers: Mapping[str, Layer]) -> None:
    """Embeddings with the parameter of a stored one became one module with it when they were converted."""
    stored = {id(t.module._parameters["weight"]): t for t in targets.layers.values() if t.kind == "embedding"}
    taken = {id(target.module) for target in targets.layers.values()}
    for layer in layers.values():
        if layer.kind == "embedding" and layer.reason is None and id(layer.module) not in taken:
            target = stored.get(id(layer.module._parameters["weight"]))
            if target is not None:
                target.sites += [site for site in layer.sites if site not in target.sites]


def _match_layer(name: str, entry: LayerEntry, layer: Layer | None) -> Layer:
    if layer is None:
        raise ValueError(f"model: has no layer {name!r}, which is stored; it is not the architecture that was saved")
    if is_quantized(layer.module):
        raise ValueError(f"model: {name!r} is quantized already; expected the float architecture")
    if layer.reason is not None:
        raise ValueError(f"model: {name!r} cannot be replaced: {layer.reason}")
    if layer.kind != entry.kind or layer.shape != entry.shape:
        raise ValueError(
            f"model: expected {name!r} to be a {entry.kind} of shape {list(entry.shape)}, as stored, got a "
            f"{layer.kind} of shape "
            f"{list(layer.shape)}"
        )
    return layer


def _check_tensor(name: str, tensor: torch.Tensor, manifest: Manifest, stored: str) -> None:
    info = manifest.headers[stored]
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"model: {name!r} has no shape yet (a lazy module); run the model once")
    if tuple(tensor.shape) != info.shape:
        raise ValueError(f"model: expected {name!r} of shape {list(info.shape)}, as stored, got {list(tensor.shape)}")
    if tensor.dtype.is_floating_point != info.dtype.is_floating_point:
        raise ValueError(f"model: expected {name!r} of dtype {info.dtype}, as stored, got {tensor.dtype}")


def _check_complete(model: nn.Module, replaced: set[int], filled: dict[int, str]) -> None:
    missing = []
    for prefix, module in model.named_modules():
        if id(module) in replaced:
            continue
        for key in [*module._parameters, *module._buffers]:
            tensor = _tensor_at((module, key))
            # Loose buffers are made by the architecture itself, unless it lies on the meta device.
            loose = key in module._non_persistent_buffers_set and tensor is not None and tensor.device.type != "meta"
            if tensor is not None and not loose and id(tensor) not in filled:
                missing.append(f"{prefix}.{key}" if prefix else key)
    if missing:
        raise ValueError(
            f"directory: holds no tensor for {missing[0]!r} of the model ({len(missing)} are missing); it is not the "
            "architecture that was saved, or a large buffer that only the architecture itself can make (build it "
            "outside the meta device)"
        )


class Reader:
    """Tensors by name from the files of a directory whose headers were checked.

    Files are read, not mapped: they may change or vanish afterwards, and no page of them counts as memory of this
    process.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._files: dict[str, tuple[FileIO, int]] = {}
        self._scratch: torch.Tensor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, in memory of its own."""
        info = self._manifest.headers[name]
        return self._into(torch.empty(info.nbytes, dtype=torch.uint8), name)

    def lend(self, name: str) -> torch.Tensor:
        """The weight `name` in memory that the next call uses again: packing copies it anyway."""
        if self._scratch is None:
            weights = [f"{layer}.weight" for layer in self._manifest.layers]
            sizes = [self._manifest.headers[w].nbytes for w in weights if w in self._manifest.headers]
            self._scratch = torch.empty(max(sizes, default=0), dtype=torch.uint8)
        return self._into(self._scratch[: self._manifest.headers[name].nbytes], name)

    def reclaim(self, module: nn.Module) -> None:
        """Give a layer that kept the lent memory a copy of it."""
        if self._scratch is None or not isinstance(module, (QuantEmbedding, QuantLinear)):
            return
        lent: object = self._scratch.untyped_storage()._cdata
        for key, tensor in module._buffers.items():
            if tensor is not None and tensor.numel() and tensor.untyped_storage()._cdata == lent:
                module._buffers[key] = tensor.clone()
                module._moved()

    def _into(self, raw: torch.Tensor, name: str) -> torch.Tensor:
        label, info = self._manifest.tensors[name], self._manifest.headers[name]
        if label not in self._files:
            opened = (self._directory / label).open("rb", buffering=0)
            self._files[label] = (opened, 8 + int.from_bytes(opened.read(8), "little"))
        file, start = self._files[label]
        file.seek(start + info.begin)
        view, done = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
        while done < info.nbytes:
            count = file.readinto(view[done : done + (64 << 20)])
            if not count:
                raise ValueError(f"{label}: cut short while it was being read")
            done += count
        return raw.view(info.dtype).view(info.shape)


def fill_model(
    model: nn.Module,
    manifest: Manifest,
    targets: Targets,
    reader: Reader,
    *,
    device: torch.device | str | None,
    fuse: bool,
    progress: Progress,
) -> Report:
    """Replace the layers and fill the slots, one by one."""
    before = take_snapshot(model)
    total = len(targets.layers) + len(targets.slots)
    made: dict[str, nn.Module] = {}

    def place(old: torch.Tensor) -> torch.device:
        if device is not None:
            return torch.device(device)
        return torch.device("cpu") if old.device.type == "meta" else old.device

    with torch.no_grad(), tracking(progress, total=total, what="loading") as step:
        done = 0
        for name in sorted(targets.layers, key=lambda n: manifest.layers[n].shares is not None):
            entry, layer = manifest.layers[name], targets.layers[name]
            where = place(layer.weight)
            stored = {s: f"{name}.{s}" for s in entry.specs()}
            present = {s: full for s, full in stored.items() if full in manifest.headers}
            tensors = {
                s: (reader.lend if s == "weight" else reader.read)(full).to(where) for s, full in present.items()
            }
            new = _make_layer(entry, tensors, layer, None if entry.shares is None else made[entry.shares])
            reader.reclaim(new)
            dress(new, layer)
            made[name] = new
            for parent, key in layer.sites:
                parent._modules[key] = new
            layer.module = new
            done += 1
            step(done, total, name)
        for name, slots in targets.slots.items():
            old = _tensor_at(slots[0])
            if old is not None:
                _fill(slots, old, reader.read(name).to(place(old)))
            done += 1
            step(done, total, name)
    adapt_parents(model, is_quantized)
    return account(model, before, fusion_notes(fuse_(model) if fuse else {}, {}))


def _make_layer(
    entry: LayerEntry, tensors: dict[str, torch.Tensor], layer: Layer, owner: nn.Module | None
) -> nn.Module:
    rows, columns = entry.shape
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if entry.kind == "embedding":
        padding = layer.module.padding_idx
        return QuantEmbedding(rows, columns, tensors, padding_idx=padding, dtype=dtype)  # type: ignore[arg-type]
    if owner is not None:
        return linear_over(owner, tensors, entry.scheme, dtype)
    return QuantLinear(columns, rows, tensors, entry.scheme, dtype=dtype)


def _fill(slots: list[Slot], old: torch.Tensor, new: torch.Tensor) -> None:
    value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module, key in slots:
        tensors: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        tensors[key] = value
