"""The safetensors container: headers checked before anything they ask for is done, and a writer that holds one tensor
at a time.

A file is an unsigned little-endian 64-bit length, that many bytes of JSON, and the tensors' bytes without gaps:

    [8 bytes: n][n bytes: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}][data]
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["DTYPES", "TensorInfo", "parse_json", "read_header", "sha256_of", "write_tensors"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: dtype, shape, and its first and one-past-last byte in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose keys are unique. Raises ValueError naming `what` for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return found

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Lengths, offsets, shapes and dtypes are checked against each other and against the size of the file, so that whoever
    reads the data afterwards allocates no more than the file holds.

    Raises:
        ValueError: the file is truncated, oversized or contradicts itself.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path.name}: expected a safetensors file of at least 8 bytes, got {size}")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path.name}: the header claims {length} bytes, the file has {size} (truncated or not safetensors)"
            )
        header = parse_json(file.read(length), f"{path.name}: header")
    header.pop("__metadata__", None)
    available = size - 8 - length
    tensors = {name: _tensor_info(path.name, name, entry, available) for name, entry in header.items()}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise ValueError(f"{path.name}: the data of {name!r} begins at byte {info.begin}, expected {position}")
        position = info.end
    if position != available:
        raise ValueError(f"{path.name}: the header describes {position} bytes of data, the file has {available}")
    return tensors


def _tensor_info(file: str, name: str, entry: object, available: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: {name!r}: expected dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{file}: {name!r}: dtype: expected one of {', '.join(DTYPES)}, got {_short(dtype)}")
    if not _is_counts(shape) or len(shape) > 32:
        raise ValueError(f"{file}: {name!r}: shape: expected a list of sizes, got {_short(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise ValueError(
            f"{file}: {name!r}: data_offsets: expected two positions within {available} bytes, got {_short(offsets)}"
        )
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{file}: {name!r}: shape {_short(shape)} of {dtype} takes {wanted} bytes, data_offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], data: Iterable[torch.Tensor]
) -> str:
    """Write one file and wait until the disk has it.

    Args:
        path: a file that does not exist yet.
        tensors: name -> dtype and shape, in the order of the data. Wide dtypes should come first, so that all data is
            aligned.
        data: the tensors, in the same order; each may be made when it is asked for, and is dropped once written.

    Returns:
        The SHA-256 of the file.

    Raises:
        ValueError: a dtype the format does not know, or a tensor that is not what was announced.
        OSError: the disk is full, or another failure of it.
    """
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _NAMES:
            raise ValueError(f"{name}: expected one of the dtypes {', '.join(_NAMES.values())}, got {dtype}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        _write(file, len(text).to_bytes(8, "little") + text, digest)
        for (name, (dtype, shape)), tensor in zip(tensors.items(), data, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            _write(file, memoryview(flat.numpy()), digest)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(file: IO[bytes], data: bytes | memoryview, digest: Any) -> None:
    digest.update(data)
    file.write(data)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
