"""The account of a conversion: what became of every layer and of every byte.

Bytes are resident bytes. A byte that several tensors share (tied weights, views of one storage) is counted once, on
the first module that holds it, so the totals are what the model occupies and never more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

__all__ = ["LayerReport", "Report", "measure"]

_NOTE_WIDTH = 72  # characters; longer notes are wrapped below their row


@dataclass(frozen=True)
class LayerReport:
    """One module that owns parameters or buffers (or runs quantized weights).

    Args:
        name: qualified name in the model; "" is the model itself.
        type: class name of the module before the conversion.
        shape: `(out_features, in_features)` or `(num_embeddings, embedding_dim)` for layers, None for other modules.
        scheme: name of the scheme the layer runs in, None when it was left alone.
        kernel: the kernel that serves it, such as "w8a8.avx2" or "reference"; None when it was left alone.
        bytes_before: resident bytes of its parameters and buffers before.
        bytes_after: the same, after.
        reason: why it was left alone, why it has no kernel, or with what it shares its bytes; None when there is
            nothing to say.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    scheme: str | None
    kernel: str | None
    bytes_before: int
    bytes_after: int
    reason: str | None

    @property
    def quantized(self) -> bool:
        """Whether the layer runs quantized weights."""
        return self.scheme is not None


@dataclass(frozen=True)
class Report:
    """What a conversion did. `print(report)` shows it; `to_dict` gives all of it for machines.

    Args:
        layers: one entry per module that owns parameters or buffers, in the order of `model.named_modules()`.
        isa: the instruction set in use when the report was made, or None.
    """

    layers: tuple[LayerReport, ...]
    isa: str | None = None

    @property
    def bytes_before(self) -> int:
        """Resident bytes of all parameters and buffers before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Resident bytes of all parameters and buffers after."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that run quantized weights."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The modules that were left alone; each says why in `reason`."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The entry of the module called `name`. Raises KeyError for a name the report does not hold."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain dicts, lists, strings and numbers (`json.dumps` takes it)."""
        layers = []
        for layer in self.layers:
            entry = asdict(layer)
            entry["shape"] = None if layer.shape is None else list(layer.shape)
            layers.append(entry)
        return {
            "isa": self.isa,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "quantized": len(self.quantized),
            "left": len(self.left),
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`. Raises ValueError for a mapping of another form."""
        names = {field.name for field in fields(LayerReport)}
        entries = data.get("layers")
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) and set(e) == names for e in entries):
            raise ValueError(f"report: expected 'layers' to be a list of mappings with the keys {sorted(names)}")
        return cls(
            layers=tuple(
                LayerReport(**{**entry, "shape": None if entry["shape"] is None else tuple(entry["shape"])})
                for entry in entries
            ),
            isa=data.get("isa"),
        )

    def __str__(self) -> str:
        return _render(self)


# ---------------------------------------------------------------------------------------------------------------- bytes


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors a module owns directly: parameters, then buffers (persistent or not)."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer


_MOST_RUNS = 1 << 16


def _extents(tensor: torch.Tensor) -> tuple[object, list[tuple[int, int]]] | None:
    """`(storage, [(first byte, one past the last byte), ...])`, or None when there is no memory to speak of.

    A tensor with gaps (a weight among those of other layers) is as many runs of bytes as there are between them.
    """
    if nn.parameter.is_lazy(tensor) or tensor.numel() == 0:
        return None
    item = tensor.element_size()
    if tensor.layout != torch.strided:  # sparse: no single storage; its own object is the key
        values = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
        return ("sparse", id(tensor)), [(0, values.numel() * values.element_size())]
    try:
        storage: object = (str(tensor.device), tensor.untyped_storage()._cdata)
    except RuntimeError:  # tensor subclasses without a storage of their own
        return ("opaque", id(tensor)), [(0, tensor.numel() * item)]
    first, run, starts = int(tensor.storage_offset()), 1, [0]
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dimension: dimension[1]):
        if stride <= run or len(starts) * size > _MOST_RUNS:
            run += (size - 1) * stride
        elif size > 1:
            starts = [start + index * stride for start in starts for index in range(size)]
    return storage, [((first + start) * item, (first + start + run) * item) for start in starts]


class _Coverage:
    """Which bytes of which storage were counted already."""

    def __init__(self) -> None:
        self._ranges: dict[object, list[tuple[int, int]]] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Mark the bytes of `tensor`; return how many of them are new."""
        extents = _extents(tensor)
        return 0 if extents is None else sum(self._add(extents[0], *run) for run in extents[1])

    def _add(self, storage: object, first: int, last: int) -> int:
        ranges = self._ranges.setdefault(storage, [])
        known = sum(max(0, min(last, b) - max(first, a)) for a, b in ranges)
        overlapping = [(a, b) for a, b in ranges if a <= last and first <= b]
        merged = (min([first, *(a for a, _ in overlapping)]), max([last, *(b for _, b in overlapping)]))
        self._ranges[storage] = [r for r in ranges if r not in overlapping] + [merged]
        return last - first - known


def measure(model: nn.Module) -> dict[str, int]:
    """Resident bytes of every module that owns parameters or buffers, by qualified name.

    A shared byte counts on the first module that holds it; a shared module appears once, under its first name. The
    values add up to the bytes of the model. Tensors on the meta device count as if they were allocated.
    """
    coverage = _Coverage()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        owned = list(_tensors(module))
        if owned:
            sizes[name] = sum(coverage.add(tensor) for _, tensor in owned)
    return sizes


# ------------------------------------------------------------------------------------------------------------- printing

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f}" if count >= 10_000 else f"{count / 1e6:,.4f}"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _group_name(names: list[str]) -> str:
    """One name for names that differ in their numbers only: "layer.{0-5}.query"."""
    if len(names) == 1:
        return names[0] or "(model)"
    columns = list(zip(*([int(n) for n in _NUMBER.findall(name)] for name in names), strict=True))
    position = iter(range(len(columns)))

    def place(match: re.Match[str]) -> str:
        column = columns[next(position)]
        return match.group() if len(set(column)) == 1 else "{" + _ranges(column) + "}"

    return _NUMBER.sub(place, names[0])


def _rows(layers: Iterable[LayerReport]) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        reason = None if layer.reason is None else _NUMBER.sub("*", re.sub(r"\b\d+\b", "*", layer.reason))
        key = (_NUMBER.sub("*", layer.name), layer.type, layer.shape, layer.scheme, layer.kernel, reason)
        groups.setdefault(key, []).append(layer)
    rows = []
    for members in groups.values():
        first = members[0]
        rows.append(
            [
                _group_name([m.name for m in members]),
                "x".join(map(str, first.shape)) if first.shape is not None else first.type.rpartition(".")[2],
                str(len(members)),
                first.scheme or "-",
                first.kernel or "-",
                _megabytes(sum(m.bytes_before for m in members)),
                _megabytes(sum(m.bytes_after for m in members)),
                first.reason or "",
            ]
        )
    return rows


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _render(report: Report) -> str:
    head = ["layer", "shape", "count", "scheme", "kernel", "MB before", "MB after", "note"]
    right = {2, 5, 6}
    total = ["total", "", str(len(report)), "", "", _megabytes(report.bytes_before), _megabytes(report.bytes_after), ""]
    body = _rows(report.layers)
    widths = [max(len(row[i]) for row in [head, total, *body]) for i in range(len(head) - 1)]

    def line(row: list[str]) -> list[str]:
        cells = [row[i].rjust(w) if i in right else row[i].ljust(w) for i, w in enumerate(widths)]
        notes = _wrap(row[-1], _NOTE_WIDTH)
        indent = " " * (sum(widths) + 2 * len(widths))
        return ["  ".join([*cells, notes[0]]).rstrip(), *(indent + note for note in notes[1:])]

    rule = "-" * (sum(widths) + 2 * len(widths) + len(head[-1]))
    lines = [*line(head), rule]
    for row in body:
        lines += line(row)
    lines += [rule, *line(total)]
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    summary = f"{len(report.quantized)} layers quantized, {len(report.left)} modules left alone, {ratio:.2f}x smaller"
    lines.append(summary + (f", isa {report.isa}" if report.isa else ""))
    return "\n".join(lines)
