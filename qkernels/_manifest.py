"""`qkernels.json`: what is stored in a directory, in which layout; read with suspicion.

    {
      "format": "qkernels", "format_version": 1, "qkernels_version": "0.1.0",
      "files":   {"model.safetensors": {"size": 123, "sha256": "..."}},
      "tensors": {"encoder.0.weight": "model.safetensors", ...},
      "schemes": {"w8a8": {...}},                               Scheme.to_dict()
      "layers":  {"encoder.0": {"kind": "linear", "scheme": "w8a8", "shape": [out, in], "dtype": "float32", "shares":
      null}, ...},
      "aliases": {"lm_head.weight": "embed.weight"},            float tensors that are one
      "non_persistent": ["rotary.inv_freq"]                     buffers that a state dict would not hold
    }

`kind` is linear, conv1d or embedding; `dtype` that of the float weight it replaced; `shares` names the layer whose
weight and scales it uses (an output head tied to an embedding), so that they are stored once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._safetensors import TensorInfo, parse_json, read_header
from ._version import __version__
from .checks import TensorSpec, canonical_specs
from .scheme import Scheme

__all__ = ["FORMAT_VERSION", "MANIFEST", "LayerEntry", "Manifest", "layer_specs", "read_manifest"]

MANIFEST = "qkernels.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
_FLOAT_NAMES = ("float32", "bfloat16", "float16")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_SHARED = ("weight", "weight_scale", "weight_zero_point", "weight_min", "weight_multiplier")


@dataclass(frozen=True)
class LayerEntry:
    """One quantized layer. `shape` is `(out_features, in_features)` or `(num_embeddings, embedding_dim)`."""

    kind: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: str = "float32"
    shares: str | None = None

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors it stores under its own name."""
        return {k: v for k, v in layer_specs(self).items() if self.shares is None or k not in _SHARED}


def layer_specs(entry: LayerEntry) -> dict[str, TensorSpec]:
    """Every canonical tensor of a layer, shared ones included."""
    rows, columns = entry.shape
    specs = canonical_specs(entry.scheme, columns, rows)
    if entry.kind == "embedding":
        return {name: specs[name] for name in ("weight", "weight_scale")}
    return specs


@dataclass
class Manifest:
    """The contents of `qkernels.json`; `headers` holds what the files themselves say, once `read_manifest` has
    checked them."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    non_persistent: list[str] = field(default_factory=list)
    headers: dict[str, TensorInfo] = field(default_factory=dict)

    def splits(self, name: str) -> bool:
        """Whether a module that may hold stacked experts was stored as experts with layers of their own."""
        return any(tensor.startswith(f"{name}.0.") for tensor in self.tensors)

    def to_json(self) -> str:
        """As the file holds it."""
        schemes: dict[str, Scheme] = {}
        labels: dict[Scheme, str] = {}
        for entry in self.layers.values():
            if entry.scheme not in labels:
                name = entry.scheme.name
                label = name if name not in schemes else f"{name}#{len(schemes)}"
                labels[entry.scheme], schemes[label] = label, entry.scheme
        data = {
            "format": "qkernels",
            "format_version": FORMAT_VERSION,
            "qkernels_version": __version__,
            "files": self.files,
            "tensors": self.tensors,
            "schemes": {label: scheme.to_dict() for label, scheme in schemes.items()},
            "layers": {
                name: {
                    "kind": e.kind,
                    "scheme": labels[e.scheme],
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "shares": e.shares,
                }
                for name, e in self.layers.items()
            },
            "aliases": self.aliases,
            "non_persistent": self.non_persistent,
        }
        return json.dumps(data, indent=1) + "\n"


def _bad(where: str, expected: str, got: object) -> ValueError:
    text = repr(got)
    return ValueError(f"{MANIFEST}: {where}: expected {expected}, got {text if len(text) <= 80 else text[:77] + '...'}")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory and the headers of its files, checked against each other and the sizes on the disk.

    Raises:
        ValueError: not a directory that `save` wrote, a version this release does not know, or contradictions.
        OSError: a file cannot be read.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ValueError(f"directory: expected a directory that qkernels.save wrote, {directory} is none")
    if not path.is_file():
        raise ValueError(f"directory: expected {MANIFEST} in {directory}, it is missing")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}")
    data = parse_json(path.read_bytes(), MANIFEST)
    if data.get("format") != "qkernels":
        raise _bad("format", "'qkernels'", data.get("format"))
    if type(data.get("format_version")) is not int or data["format_version"] != FORMAT_VERSION:
        raise _bad(
            "format_version",
            f"{FORMAT_VERSION}, the one this release ({__version__}) reads",
            data.get("format_version"),
        )
    manifest = Manifest(
        files=_files(data.get("files")),
        tensors=_strings(data.get("tensors"), "tensors"),
        aliases=_strings(data.get("aliases"), "aliases"),
        non_persistent=_string_list(data.get("non_persistent"), "non_persistent"),
    )
    manifest.layers = _layers(data.get("layers"), _schemes(data.get("schemes")))
    _check_files(directory, manifest)
    _check_layers(manifest)
    return manifest


def _strings(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _bad(where, "a mapping of strings to strings", value)
    return value


def _string_list(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _bad(where, "a list of strings", value)
    return value


def _files(value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise _bad("files", "a mapping", value)
    for name, facts in value.items():
        if not _FILE_NAME.fullmatch(name):
            raise _bad("files", "plain names ending in .safetensors, without any path", name)
        if (
            not isinstance(facts, dict)
            or type(facts.get("size")) is not int
            or not isinstance(facts.get("sha256"), str)
        ):
            raise _bad(f"files: {name}", "size and sha256", facts)
    return value


def _schemes(value: object) -> dict[str, Scheme]:
    if not isinstance(value, dict):
        raise _bad("schemes", "a mapping", value)
    schemes = {}
    for label, facts in value.items():
        try:
            schemes[label] = Scheme.from_dict(facts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST}: schemes: {label!r}: {error}") from error
    return schemes


def _layers(value: object, schemes: Mapping[str, Scheme]) -> dict[str, LayerEntry]:
    if not isinstance(value, dict):
        raise _bad("layers", "a mapping", value)
    layers = {}
    for name, facts in value.items():
        if not isinstance(facts, dict) or set(facts) != {"kind", "scheme", "shape", "dtype", "shares"}:
            raise _bad(f"layers: {name!r}", "kind, scheme, shape, dtype and shares", facts)
        shape, shares = facts["shape"], facts["shares"]
        if facts["kind"] not in ("linear", "conv1d", "embedding"):
            raise _bad(f"layers: {name!r}: kind", "linear, conv1d or embedding", facts["kind"])
        if not isinstance(facts["scheme"], str) or facts["scheme"] not in schemes:
            raise _bad(f"layers: {name!r}: scheme", f"one of {sorted(schemes)}", facts["scheme"])
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(type(v) is int and 0 <= v < 1 << 40 for v in shape)
        ):
            raise _bad(f"layers: {name!r}: shape", "two sizes", shape)
        if facts["dtype"] not in _FLOAT_NAMES:
            raise _bad(f"layers: {name!r}: dtype", f"one of {', '.join(_FLOAT_NAMES)}", facts["dtype"])
        if shares is not None and not isinstance(shares, str):
            raise _bad(f"layers: {name!r}: shares", "the name of a layer or null", shares)
        layers[name] = LayerEntry(facts["kind"], schemes[facts["scheme"]], (shape[0], shape[1]), facts["dtype"], shares)
    return layers


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, facts in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"directory: expected the file {name}, which {MANIFEST} names, it is missing")
        if path.stat().st_size != facts["size"]:
            raise ValueError(
                f"{name}: expected {facts['size']} bytes, as {MANIFEST} says, got {path.stat().st_size} (truncated?)"
            )
        for tensor, info in read_header(path).items():
            if manifest.tensors.get(tensor) != name:
                raise ValueError(
                    f"{name}: holds {tensor!r}, which {MANIFEST} places in {manifest.tensors.get(tensor)!r}"
                )
            manifest.headers[tensor] = info
    missing = [t for t in manifest.tensors if t not in manifest.headers]
    if missing:
        raise ValueError(f"{MANIFEST}: tensors: {missing[0]!r} is in none of the files ({len(missing)} are missing)")
    for alias, target in manifest.aliases.items():
        if target not in manifest.headers or alias in manifest.headers:
            raise _bad(f"aliases: {alias!r}", "the name of a stored tensor for one that is not", target)


def _check_layers(manifest: Manifest) -> None:
    for name, entry in manifest.layers.items():
        if entry.shares is not None:
            other = manifest.layers.get(entry.shares)
            if other is None or other.shares is not None or other.shape != entry.shape or entry.kind == "embedding":
                raise _bad(
                    f"layers: {name!r}: shares", "a layer of the same shape that has its own weight", entry.shares
                )
        for suffix, spec in entry.specs().items():
            info = manifest.headers.get(f"{name}.{suffix}")
            if info is None:
                if spec.required:
                    raise ValueError(
                        f"{MANIFEST}: layers: {name!r} needs the tensor {name + '.' + suffix!r}, no file holds it"
                    )
                continue
            if info.dtype not in spec.dtypes or info.shape != spec.shape:
                wanted = " or ".join(str(d) for d in spec.dtypes)
                raise ValueError(
                    f"{name}.{suffix}: expected {wanted} {list(spec.shape)} for scheme {entry.scheme.name}, got "
                    f"{info.dtype} {list(info.shape)}"
                )
