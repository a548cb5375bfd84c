"""Layers over packed weights, whichever device packs them: what runs under ``torch.ops.qkernels.linear_packed`` and
``linear_w8a8``."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from . import reference
from .cuda_slices import split_float32
from .prepared import Prepared
from .scheme import Scheme

__all__ = [
    "GROUPED",
    "PackedLayer",
    "PackedW8A8",
    "channel_sums",
    "check_multiplier",
    "check_resident",
    "check_sum",
    "codebook_tensor",
    "group_count",
    "has_channel_sums",
]

GROUPED = {
    "weight_scale": "packed_scale",
    "weight_zero_point": "packed_zero_point",
    "weight_min": "packed_min",
    "weight_multiplier": "packed_multiplier",
}
"""What belongs to groups: its canonical name, and that of its resident form."""

_SUMMED_AT_ONCE = 1 << 22
"""Weights, whose whole numbers need memory of their own while they are added up."""


def group_count(scheme: Scheme, features: int) -> int:
    """Groups of a row, at least one."""
    return max(1, -(-features // scheme.resolve_group_size(features)))


def has_channel_sums(scheme: Scheme) -> bool:
    """Whether a product needs :func:`channel_sums`: zero points of activations times one integer sum over all K."""
    return scheme.group_scales == "int" and not scheme.activation_symmetric


def channel_sums(canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor:
    """The sum over K of ``multiplier * (q - zero_point)``, int32 ``[N]``, of weights of ``group_scales="int"``."""
    names = [name for name in ("weight", "weight_multiplier", "weight_zero_point") if name in canonical]
    count, step = canonical["weight"].shape[0], max(1, _SUMMED_AT_ONCE // max(1, in_features))
    sums = [
        reference.multiplied_codes(
            {name: canonical[name][first : first + step] for name in names}, scheme, in_features
        ).sum(1, dtype=torch.int32)
        for first in range(0, max(1, count), step)
    ]
    return torch.cat(sums)


def check_resident(
    given: Mapping[str, Tensor | None], sizes: Mapping[str, int], rest: int, scheme: Scheme, rows: int, features: int
) -> None:
    """Whether resident tensors have the sizes that a kernel reads, on the device of ``packed``.

    Args:
        sizes: elements by name; rest: of every other tensor.

    Raises:
        ValueError: naming the tensor.
    """
    device = cast(Tensor, given["packed"]).device
    for name, tensor in given.items():
        wanted = sizes.get(name, rest)
        if tensor is not None and (tensor.numel() != wanted or tensor.device != device):
            raise ValueError(
                f"{name}: expected {wanted} elements on {device} for a [{rows}, {features}] layer of scheme "
                f"{scheme.name}, got {tensor.numel()} on {tensor.device}"
            )


def check_multiplier(given: Mapping[str, Tensor | None], scheme: Scheme, dtype: torch.dtype) -> None:
    """Whether multipliers of groups, and float32 scales of channels beside them, are there just where the scheme has
    them: kernels read the scales of groups otherwise.

    Args:
        dtype: of multipliers, as the kernels read them.

    Raises:
        ValueError: naming the tensor.
    """
    whole, scale = scheme.group_scales == "int", given.get("packed_scale")
    _check_presence("packed_multiplier", given, dtype if whole else None, scheme)
    if whole and scale is not None and scale.dtype != torch.float32:
        raise ValueError(f"packed_scale: expected float32 for scheme {scheme.name}, got {scale.dtype}")


def check_sum(given: Mapping[str, Tensor | None], scheme: Scheme, wanted: bool) -> None:
    """Whether int32 sums of channels are there just where kernels read them.

    Raises:
        ValueError: naming the tensor.
    """
    _check_presence("packed_sum", given, torch.int32 if wanted else None, scheme)


def _check_presence(name: str, given: Mapping[str, Tensor | None], dtype: torch.dtype | None, scheme: Scheme) -> None:
    """Whether a tensor has a dtype; None: whether there is none."""
    found = None if (tensor := given.get(name)) is None else tensor.dtype
    if found != dtype:
        raise ValueError(f"{name}: expected {dtype or 'none'} for scheme {scheme.name}, got {found or 'none'}")


@functools.cache
def codebook_tensor(entries: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 ``[4, 16]``, kept for good, since kernels borrow its address: the entries, and three terms of bfloat16
    values each that add up to them (:func:`qkernels.cuda_slices.split_float32`)."""
    book = torch.tensor(entries, dtype=torch.float32)[None]
    return torch.cat((book, split_float32(book).to(torch.float32))).to(device)


class PackedLayer(Prepared):
    """A layer that holds its weight in the layout of its kernels, and the small canonical tensors as they are."""

    names = (
        "packed",
        "packed_scale",
        "packed_zero_point",
        "packed_min",
        "packed_multiplier",
        "packed_sum",
        "bias",
        "act_scale",
        "act_zero_point",
        "inv_smooth",
    )

    @classmethod
    @abstractmethod
    def pack(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> dict[str, Tensor]:
        """The packed tensors that canonical ones become."""

    @abstractmethod
    def unpack(self) -> dict[str, Tensor]:
        """The canonical tensors that :meth:`pack` packed, without loss."""

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PackedLayer:
        """Packs the weight and what belongs to its groups."""
        tensors: dict[str, Tensor | None] = {"bias": None, **cls.pack(canonical, scheme, in_features)}
        tensors.update((name, tensor) for name, tensor in canonical.items() if name in cls.names)
        return cls(tensors, scheme, in_features, canonical["weight"].shape[0], reason)

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self.tensors["packed"].device

    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """Through ``torch.ops.qkernels.linear_packed``."""
        return torch.ops.qkernels.linear_packed(
            x,
            *(tensors.get(name) for name in self.names),
            self.scheme_key,
            self.out_features,
            self.in_features,
            out_dtype,
        )

    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Through ``torch.ops.qkernels.dequantize_packed``."""
        return torch.ops.qkernels.dequantize_packed(
            *(tensors.get(name) for name in self.names[:5]),
            tensors.get("inv_smooth"),
            self.scheme_key,
            self.out_features,
            self.in_features,
            dtype,
        )

    def canonical(self) -> dict[str, Tensor]:
        """Unpacks; the small tensors are the resident ones."""
        small = {name: tensor for name, tensor in self.resident().items() if not name.startswith("packed")}
        return {**self.unpack(), **small}


class PackedW8A8(Prepared):
    """A layer of 8-bit weights per output channel under 8-bit activations, whichever device packs them.

    Resident: ``packed``, the sums ``colsum`` of its rows, and the small canonical tensors.
    """

    names = ("packed", "colsum", "weight_scale", "bias", "act_scale", "act_zero_point", "inv_smooth")
    has_minus128 = True
    """Whether -128 may be among the weights."""

    @staticmethod
    @abstractmethod
    def unpack(packed: Tensor, rows: int, features: int) -> Tensor:
        """The weight int8 ``[N, K]``, without loss."""

    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """Through ``torch.ops.qkernels.linear_w8a8``."""
        get = tensors.get
        return torch.ops.qkernels.linear_w8a8(
            x,
            get("packed"),
            get("colsum"),
            get("weight_scale"),
            get("bias"),
            self.out_features,
            self.in_features,
            self.has_minus128,
            self.scheme.activation_symmetric,
            get("act_scale"),
            get("act_zero_point"),
            get("inv_smooth"),
            out_dtype,
        )

    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Through ``torch.ops.qkernels.dequantize_w8``."""
        get = tensors.get
        return torch.ops.qkernels.dequantize_w8(
            get("packed"), get("weight_scale"), get("inv_smooth"), self.out_features, self.in_features, dtype
        )

    def canonical(self) -> dict[str, Tensor]:
        """Unpacks the weight; the small tensors are the resident ones."""
        tensors = self.resident()
        canonical = {"weight": self.unpack(tensors.pop("packed"), self.out_features, self.in_features)}
        del tensors["colsum"]
        canonical.update(tensors)
        return canonical
