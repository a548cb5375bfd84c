"""Other implementations, each used as its own documentation says; those that are not installed are left out.

All of them get fp32 rows (``bf16``, ``int4pack`` and ``int8pack`` bf16 ones), and those that quantize them do so inside
the timed call, as ours do. Those of 4 bits, ``int8pack``, ONNX Runtime and OpenVINO hold the codes and scales of our
layers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qkernels.bench.contenders import Contender
from qkernels.bench.rivals_onnxruntime import MatMulNBits, OnnxRuntime
from qkernels.bench.rivals_openvino import OpenVino
from qkernels.bench.rivals_torch import Int4Pack, Int8Pack, QuantizeDynamic, TorchLinear
from qkernels.bench.rivals_zentorch import Zentorch
from qkernels.scheme import Scheme


@dataclass(frozen=True)
class _Entry:
    """One rival.

    Fields:
        make: builds it.
        kinds: bits of weights and inputs ("w4a8") of the schemes that it is compared with; None: with all of them.
        lacking: why it cannot be measured here; empty if it can.
    """

    make: Callable[[], Contender]
    kinds: tuple[str, ...] | None
    lacking: str = ""


def _lacking(*modules: str) -> str:
    return "" if all(importlib.util.find_spec(module) is not None for module in modules) else "not installed"


def _entries(zentorch_python: Path | None) -> dict[str, _Entry]:
    entries = {
        "fp32": _Entry(functools.partial(TorchLinear, "fp32", torch.float32), None),
        "bf16": _Entry(functools.partial(TorchLinear, "bf16", torch.bfloat16), None),
    }
    for engine in ("x86", "onednn"):
        name = f"quantize_dynamic-{engine}"
        there = engine in torch.backends.quantized.supported_engines
        lacking = "" if there else "this torch lacks the engine"
        entries[name] = _Entry(functools.partial(QuantizeDynamic, name, engine), None, lacking)
    # No product of 4-bit weights and 8-bit inputs in torch is more than scalar code on x86: int4pack stands in.
    for operator, kinds, rival in (
        ("_weight_int4pack_mm_for_cpu", ("w4a8", "w4a16"), Int4Pack),
        ("_weight_int8pack_mm", ("w8a16",), Int8Pack),
    ):
        lacking = "" if hasattr(torch, operator) else "this torch lacks the operator"
        entries[rival.name] = _Entry(rival, kinds, lacking)
    onnxruntime, openvino = _lacking("onnx", "onnxruntime"), _lacking("openvino")
    w8a8 = Scheme.resolve("w8a8")
    entries["onnxruntime"] = _Entry(OnnxRuntime, ("w8a8",), onnxruntime)
    entries["openvino"] = _Entry(functools.partial(OpenVino, "openvino", w8a8), ("w8a8",), openvino)
    for scheme in map(Scheme.resolve, ("w4a8", "w4a16", "w8a16")):
        name = f"onnxruntime-{scheme.name}"
        entries[name] = _Entry(functools.partial(MatMulNBits, name, scheme), (scheme.name,), onnxruntime)
        name = f"openvino-{scheme.name}"
        entries[name] = _Entry(functools.partial(OpenVino, name, scheme), (scheme.name,), openvino)
    zentorch = functools.partial(Zentorch, zentorch_python or Path())
    entries["zentorch"] = _Entry(zentorch, ("w8a8",), "" if zentorch_python is not None else "no --zentorch-python")
    return entries


def rivals(
    wanted: Sequence[str] | None, schemes: Sequence[str], zentorch_python: Path | None
) -> tuple[list[Contender], dict[str, str]]:
    """The rivals, and why each of the others is left out.

    Args:
        wanted: their names; None: all that are installed and go with one of the schemes.
        schemes: names of presets. A rival that goes with none of them, but is wanted, is compared with all.
    """
    kinds = {scheme.name: _kind(scheme) for scheme in map(Scheme.resolve, schemes)}
    chosen: list[Contender] = []
    missing: dict[str, str] = {}
    for name, entry in _entries(zentorch_python).items():
        fitting = tuple(scheme for scheme, kind in kinds.items() if entry.kinds is None or kind in entry.kinds)
        if not fitting if wanted is None else name not in wanted:
            continue
        if entry.lacking:
            missing[name] = entry.lacking
            continue
        rival = entry.make()
        rival.rival_of = fitting or tuple(kinds)
        chosen.append(rival)
    return chosen, missing


def _kind(scheme: Scheme) -> str:
    return f"w{scheme.weight_bits}a{16 if scheme.weight_only else scheme.activation_bits}"
