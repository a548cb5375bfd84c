"""`save` and `load`: a directory of safetensors and one JSON file, in the canonical layout, on any machine the same.

Nothing is ever pickled. Saving unpacks one layer at a time and writes beside the target, which is replaced at the
end. Loading checks every file in full before it touches the model, then replaces and fills one layer at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ._atomic import replacing
from ._manifest import MANIFEST, LayerEntry, Manifest, read_manifest
from ._safetensors import sha256_of, write_tensors
from .checks import check_values
from .experts import take_apart
from .nn import QuantEmbedding, QuantLinear
from .progress import Progress, tracking
from .report import Report
from .restore import Reader, check_model, fill_model
from .sharing import owners
from .survey import origin, storage_key

__all__ = ["MANIFEST", "load", "save"]

MAX_LOOSE_BUFFER_BYTES = 1 << 16
"""Non-persistent buffers (rotary frequencies) up to this size are stored, so that a model on the meta device can be
filled."""

_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
PathLike = str | os.PathLike[str]


@dataclass
class _Tensor:
    """One tensor to store: what it is, and how to get it once more."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def save(
    model: nn.Module,
    directory: PathLike,
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress = None,
) -> None:
    """Write all parameters and buffers of `model`, quantized or not, into `directory`.

    The directory holds model.safetensors (or numbered shards of it) and qkernels.json. It is created or, if `save`
    wrote it before, replaced as a whole once everything is on the disk; files of others in it stay. Tied tensors are
    stored once.

    Args:
        model: any module; the quantized layers in it are stored in the canonical layout, one unpacked at a time.
        directory: where to.
        max_shard_size: bytes of tensors per file, or text such as "500MB". A single larger tensor has a file for
            itself.
        progress: None (a bar on a terminal), True, False, or a callable `(done, total, name)`.

    Raises:
        ValueError: an argument is wrong, the model has tensors on the meta device, or `directory` holds a
            model.safetensors of others.
        OSError: the disk is full, nothing may be written there, and so on. What was there before is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    limit = _parse_size(max_shard_size)
    target = Path(directory)
    manifest = Manifest()
    tensors = _collect(model, manifest)
    shards = _split(tensors, limit)
    names = _shard_names(len(shards))
    _refuse_strangers(target, names)
    with replacing(target, drop=_own_files) as fresh, tracking(progress, total=len(tensors), what="saving") as step:
        done = 0
        for name, shard in zip(names, shards, strict=True):

            def produce(shard: list[_Tensor] = shard) -> Iterator[torch.Tensor]:
                nonlocal done
                for tensor in shard:
                    yield tensor.get()
                    done += 1
                    step(done, len(tensors), tensor.name)

            digest = write_tensors(fresh / name, {t.name: (t.dtype, t.shape) for t in shard}, produce())
            manifest.files[name] = {"size": (fresh / name).stat().st_size, "sha256": digest}
            manifest.tensors.update((t.name, name) for t in shard)
        with (fresh / MANIFEST).open("x", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())


def load(
    model: nn.Module,
    directory: PathLike,
    *,
    verify: bool = True,
    device: torch.device | str | None = None,
    fuse: bool = True,
    progress: Progress = None,
) -> Report:
    """Fill `model`, a float model of the same architecture, with what `save` wrote; its layers are replaced as they
    were.

    Every file is checked first: sizes, headers, names, shapes, dtypes, checksums, scales. Nothing is allocated on the
    word of a file, and until all checks have passed the model is untouched.

    Args:
        model: may lie on the meta device; then no float copy of the weights ever exists.
        directory: where from.
        verify: also compare checksums, which reads every file once more.
        fuse: as in `quantize_`.
        device: where the tensors go; None for where the model's are (the CPU for those on the meta device).
        progress: None (a bar on a terminal), True, False, or a callable `(done, total, name)`.

    Returns:
        The report, as `quantize_` gives it; bytes_before are those of the float architecture.

    Raises:
        ValueError: the files are damaged or hostile, of another version, or do not fit the model.
        OSError: a file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    source = Path(directory)
    manifest = read_manifest(source)
    with Reader(source, manifest) as reader:
        with take_apart(model, chosen=manifest.splits) as apart:
            targets = check_model(model, manifest)
            if verify:
                for name, facts in manifest.files.items():
                    if sha256_of(source / name) != facts["sha256"]:
                        raise ValueError(f"{name}: its SHA-256 is not the one {MANIFEST} gives; the file is damaged")
            _check_small_tensors(manifest, reader)
            apart.release()
        return fill_model(model, manifest, targets, reader, device=device, fuse=fuse, progress=progress)


def _check_small_tensors(manifest: Manifest, reader: Reader) -> None:
    """Scales, zero points and the like of every layer: read once beforehand, because they are small and say much."""
    for name, entry in manifest.layers.items():
        for suffix in entry.specs():
            if suffix not in ("weight", "bias") and f"{name}.{suffix}" in manifest.headers:
                check_values(suffix, reader.read(f"{name}.{suffix}"), entry.scheme, f"{name}.")


# --------------------------------------------------------------------------------------------------------------- saving


def _collect(model: nn.Module, manifest: Manifest) -> list[_Tensor]:
    """Everything to store, and the manifest's account of layers, aliases and loose buffers."""
    tensors: list[_Tensor] = []
    first: dict[tuple[object, ...], str] = {}
    tables = owners(model)
    for prefix, module in model.named_modules():
        if isinstance(module, (QuantEmbedding, QuantLinear)):
            tensors += _layer_tensors(prefix, module, tables.get(prefix), manifest)
            continue
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"model: {prefix or 'it'} has an extra state ({type(module).__name__}.get_extra_state), which "
                "cannot be stored"
            )
        for name, tensor, persistent in _own_tensors(module):
            full = f"{prefix}.{name}" if prefix else name
            if tensor.device.type == "meta":
                raise ValueError(f"model: {full!r} is on the meta device and holds no data")
            if not persistent:
                if tensor.nbytes > MAX_LOOSE_BUFFER_BYTES:
                    continue
                manifest.non_persistent.append(full)
            known = first.setdefault(storage_key(tensor), full) if tensor.numel() else full
            if known != full:
                manifest.aliases[full] = known
                continue
            tensors.append(_Tensor(full, tensor.dtype, tuple(tensor.shape), partial(_same, tensor)))
    # Wide dtypes first, so that every tensor is aligned to its own size in the file.
    return sorted(tensors, key=lambda t: -t.dtype.itemsize)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, name not in module._non_persistent_buffers_set


def _layer_tensors(
    prefix: str, module: QuantEmbedding | QuantLinear, owner: str | None, manifest: Manifest
) -> list[_Tensor]:
    rows, columns = module._weight_shape()
    dtype = str(module.dtype).removeprefix("torch.")
    entry = LayerEntry(origin(module)["kind"], module.scheme, (rows, columns), dtype, owner)
    manifest.layers[prefix] = entry
    wanted = entry.specs()
    found = []
    for name, tensor in module.canonical().items():
        if tensor.device.type == "meta":
            raise ValueError(f"model: {prefix!r} is on the meta device and holds no data")
        if name not in wanted:
            continue
        full = f"{prefix}.{name}" if prefix else name
        found.append(_Tensor(full, tensor.dtype, tuple(tensor.shape), partial(_unpacked, module, name)))
    return found


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def _unpacked(module: QuantEmbedding | QuantLinear, name: str) -> torch.Tensor:
    return module.canonical()[name]


def _parse_size(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", size.strip().upper()) if isinstance(size, str) else None
        if match is None:
            raise ValueError(f"max_shard_size: expected bytes or text such as '500MB', got {size!r}")
        value = int(match[1]) * _SIZES[match[2]]
    if value < 1:
        raise ValueError(f"max_shard_size: expected at least 1 byte, got {size!r}")
    return value


def _split(tensors: list[_Tensor], limit: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _refuse_strangers(directory: Path, names: Collection[str]) -> None:
    """Never overwrite a float checkpoint that somebody pointed us at."""
    if (directory / MANIFEST).exists():
        return
    for name in names:
        if (directory / name).exists():
            raise ValueError(
                f"directory: {directory} holds a {name} that qkernels.save did not write; choose another directory"
            )


def _own_files(directory: Path) -> Collection[str]:
    """Names of what an earlier `save` wrote, as far as its manifest can be read."""
    own = {MANIFEST}
    try:
        own.update(read_manifest(directory).files)
    except (ValueError, OSError):
        own.update(p.name for p in directory.glob("model*.safetensors"))
    return own
