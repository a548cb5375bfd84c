"""The contenders: the float model, torch's dynamic quantization with both engines, and this package."""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qkernels

TORCH_ENGINES = ("x86", "onednn")
FLOAT = "fp32"
# Linear layers alone with the preset; the same with uint8 inputs, whose zero point lets one-sided and skewed inputs use
# all 256 levels; and embeddings too.
ASYMMETRIC = qkernels.Scheme(activation_symmetric=False)
OURS: dict[str, tuple[str | qkernels.Scheme, bool]] = {
    "w8a8": ("w8a8", False),
    "w8a8 asym": (ASYMMETRIC, False),
    "w8a8 asym+emb": (ASYMMETRIC, True),
}


@dataclass
class Variant:
    """One contender.

    `key` names it in tables and JSON; `directory_bytes` is the size of its saved weight files, None where the
    library has no directory format; `state_dict_bytes` is the size of `torch.save(model.state_dict())`.
    """

    key: str
    model: nn.Module
    directory_bytes: int | None = None
    state_dict_bytes: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """True for a model this package quantized."""
        return self.key in OURS


BUILD_STEPS = 2 * (1 + len(TORCH_ENGINES) + len(OURS))  # calls of `step` by `build`, at most


def build(model: nn.Module, *, step: Callable[[str], None]) -> list[Variant]:
    """All contenders of one float model, which itself stays as it is.

    Args:
        step: called with a few words before each piece of work, for progress.
    """
    variants: list[Variant] = []
    step(FLOAT)
    variants.append(Variant(FLOAT, model, directory_bytes=pretrained_bytes(model)))
    for engine in available_engines():
        step(f"torch {engine}")
        variants.append(Variant(f"torch {engine}", torch_dynamic(model, engine)))
    for key, (scheme, embeddings) in OURS.items():
        step(f"qkernels {key}")
        quantized = copy.deepcopy(model)
        report = qkernels.quantize_(quantized, scheme, embeddings=embeddings, progress=False)
        variants.append(Variant(key, quantized, directory_bytes=saved_bytes(quantized), report=report.to_dict()))
    for variant in variants:
        step(f"size of {variant.key}")
        variant.state_dict_bytes = state_dict_bytes(variant.model)
    return variants


def available_engines() -> list[str]:
    """The engines of torch's quantize_dynamic that this build of torch has."""
    return [name for name in TORCH_ENGINES if name in torch.backends.quantized.supported_engines]


def torch_dynamic(model: nn.Module, engine: str) -> nn.Module:
    """`torch.ao.quantization.quantize_dynamic` over all Linear layers, weights packed for `engine`."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of this interface on every call
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


def state_dict_bytes(model: nn.Module) -> int:
    """Size of `torch.save(model.state_dict())`, what the popular articles measure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def saved_bytes(model: nn.Module) -> int:
    """Size of the directory that `qkernels.save` writes."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        qkernels.save(model, target, progress=False)
        return directory_bytes(target)


def pretrained_bytes(model: nn.Module) -> int:
    """Size of the directory that transformers' `save_pretrained` writes."""
    from qkernels import hf

    with tempfile.TemporaryDirectory() as scratch, hf.quiet():
        target = Path(scratch) / "model"
        save: Callable[..., None] = model.save_pretrained  # type: ignore[assignment]
        save(str(target))
        return directory_bytes(target)


def directory_bytes(directory: Path) -> int:
    """Bytes of all files below `directory`."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
