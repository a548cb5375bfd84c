"""The choice of a kernel for a quantized Linear.

:func:`prepare` turns the canonical tensors of a layer into a :class:`Prepared`: the first class in ``CANDIDATES`` with
no objection to the scheme, the sizes and the device takes it, and the reference, which serves everything, comes last.
A new kernel is a subclass of Prepared, registered with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_canonical
from .cpu_w8a8 import PreparedW8A8
from .prepared import Prepared
from .scheme import MAX_INTEGER_K, Scheme

__all__ = ["CANDIDATES", "Prepared", "PreparedReference", "PreparedW8A8", "prepare", "register"]


class PreparedReference(Prepared):
    """The pure torch definition over canonical tensors, on any device."""

    names = (
        "q_weight",
        "weight_scale",
        "weight_zero_point",
        "weight_min",
        "weight_multiplier",
        "bias",
        "act_scale",
        "act_zero_point",
        "inv_smooth",
    )

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """Nothing: the reference serves every layer."""
        return ""

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedReference:
        """The tensors as they are."""
        tensors = {"q_weight" if name == "weight" else name: tensor for name, tensor in canonical.items()}
        return cls(tensors, scheme, in_features, canonical["weight"].shape[0], reason)

    @property
    def kernel(self) -> str:
        """``"reference"``."""
        return "reference"

    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """Through ``torch.ops.qkernels.linear_quantized``."""
        get = tensors.get
        return torch.ops.qkernels.linear_quantized(
            x,
            get("q_weight"),
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_min"),
            get("weight_multiplier"),
            get("bias"),
            get("act_scale"),
            get("act_zero_point"),
            get("inv_smooth"),
            self.scheme_key,
            self.in_features,
            out_dtype,
        )

    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Through ``torch.ops.qkernels.dequantize_quantized``."""
        get = tensors.get
        return torch.ops.qkernels.dequantize_quantized(
            get("q_weight"),
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_min"),
            get("weight_multiplier"),
            get("inv_smooth"),
            self.scheme_key,
            self.in_features,
            dtype,
        )

    def canonical(self) -> dict[str, Tensor]:
        """The resident tensors themselves."""
        return {"weight" if name == "q_weight" else name: tensor for name, tensor in self.resident().items()}

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Copy in place."""
        own = self.canonical()
        with torch.no_grad():
            for name, tensor in canonical.items():
                own[name].copy_(tensor)


CANDIDATES: list[type[Prepared]] = [PreparedW8A8]
"""Kernels in order of preference; the reference stands behind them."""


def register(candidate: type[Prepared]) -> type[Prepared]:
    """Put a kernel in front of the others (usable as a decorator)."""
    CANDIDATES.insert(0, candidate)
    return candidate


def prepare(
    tensors: Mapping[str, Tensor],
    scheme: Scheme | str,
    in_features: int,
    device: torch.device | str | None = None,
) -> Prepared:
    """A quantized Linear ready to run.

    Args:
        tensors: the canonical tensors (names, shapes and dtypes in :mod:`qkernels.reference`).
        scheme: what they mean.
        in_features: K.
        device: where to run; None: where ``weight`` is.

    Returns:
        The layer, with ``.kernel``, ``.reason``, ``.tensors``, ``.run(x)`` and ``.canonical()``.

    Raises:
        ValueError, TypeError: naming the tensor; also where K is too large for exact int32 sums.
    """
    scheme = Scheme.resolve(scheme)
    weight = tensors.get("weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = "nothing" if weight is None else f"{type(weight).__name__} {list(getattr(weight, 'shape', []))}"
        raise ValueError(f"weight: expected a two-dimensional tensor, got {got}")
    if isinstance(in_features, bool) or not isinstance(in_features, int) or in_features < 0:
        raise ValueError(f"in_features: expected an int >= 0, got {in_features!r}")
    if not scheme.weight_only and in_features > MAX_INTEGER_K:
        raise ValueError(
            f"in_features: expected <= {MAX_INTEGER_K} for exact int32 sums (scheme {scheme.name}), got {in_features}"
        )
    checked = check_canonical(tensors, scheme, in_features, weight.shape[0])
    if device is not None:
        checked = {name: tensor.to(device) for name, tensor in checked.items()}
    where = checked["weight"].device
    objections = []
    for candidate in CANDIDATES:
        objection = candidate.objection(scheme, in_features, weight.shape[0], where)
        if not objection:
            return candidate.from_canonical(checked, scheme, in_features)
        if objection not in objections:
            objections.append(objection)
    return PreparedReference.from_canonical(checked, scheme, in_features, "; ".join(objections))
