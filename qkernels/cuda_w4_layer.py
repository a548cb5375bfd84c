"""4-bit weights on a GPU: layers on the CUDA module, and their operators under torch's dispatcher.

Layers hold the packed weight of ``csrc/cuda/w4.h`` and run under ``torch.ops.qkernels.linear_packed`` like those of the
CPU (:mod:`qkernels.cpu_packed`), whose schema, shape function and gradient serve both.  The products are in
:mod:`qkernels.cuda_w4`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .checks import check_input, check_out_dtype
from .cpu_packed import PreparedPacked
from .cuda import _address, _cuda, capability, settle, unavailable
from .cuda_bound import Bound, FloatLayer, IntegerLayer
from .cuda_rows import RowGrid
from .cuda_w4 import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    GROUP_STEP,
    MAX_FEATURES,
    ORDERS,
    SLAB_K,
    dequantize_w4,
    describe,
    fused_rows,
    linear_w4a8,
    linear_w4a16,
    pack_groups,
    pack_multipliers,
    pack_w4,
    unpack_groups,
    unpack_multipliers,
    unpack_w4,
    wgmma_objection,
)
from .joint import Joinable, Rows
from .packed import (
    GROUPED,
    PackedLayer,
    channel_sums,
    check_multiplier,
    check_resident,
    check_sum,
    codebook_tensor,
    group_count,
    has_channel_sums,
)
from .prepared import effective_weight, scheme_from_key
from .scheme import Scheme

__all__ = ["PreparedCudaW4", "dequantize_packed", "linear_packed"]


def _canonical(tensors: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int) -> dict[str, Tensor]:
    """The canonical tensors that :meth:`PreparedCudaW4.pack` packed."""
    codes = cast(Tensor, tensors["packed"])
    canonical = {"weight": unpack_w4(codes, rows, features, ORDERS[scheme.activation_bits])}
    shape = (rows,) if scheme.weight_granularity == "per_channel" else (rows, group_count(scheme, features))
    if scheme.group_scales == "int":
        multiplier, zero = unpack_multipliers(cast(Tensor, tensors["packed_multiplier"]), shape)
        canonical["weight_scale"] = cast(Tensor, tensors["packed_scale"])
        canonical["weight_multiplier"] = multiplier
        if not scheme.weight_symmetric:
            canonical["weight_zero_point"] = zero
        return canonical
    for name, own in GROUPED.items():
        if (tensor := tensors.get(own)) is not None:
            canonical[name] = unpack_groups(tensor, shape)
    return canonical


def _run(
    x: Tensor,
    tensors: Mapping[str, Tensor | None],
    scheme: Scheme,
    rows: int,
    features: int,
    dtype: torch.dtype,
    dependent: bool,
) -> Tensor:
    """A layer over tensors that were checked; ``dependent``: none of which the kernel before this may be writing."""
    weight = describe(tensors, scheme, rows, features)
    bias = tensors.get("bias")
    if scheme.weight_only:
        return linear_w4a16(x, weight, bias, tensors.get("inv_smooth"), dtype, dependent=dependent)
    return linear_w4a8(x, weight, bias, _grid(tensors, scheme), dtype, settled=dependent)


def _grid(tensors: Mapping[str, Tensor | None], scheme: Scheme) -> RowGrid:
    """How the inputs of a layer with 8-bit activations are quantized."""
    zero_point = None if scheme.activation_symmetric else tensors.get("act_zero_point")
    return RowGrid(scheme.activation_symmetric, tensors.get("act_scale"), zero_point, tensors.get("inv_smooth"))


def _pack_grid(canonical: Mapping[str, Tensor], scheme: Scheme, features: int) -> dict[str, Tensor]:
    """What belongs to groups, as it is resident, and what products with zero points need of whole rows."""
    if scheme.group_scales == "int":
        zero = canonical.get("weight_zero_point")
        multiplier = pack_multipliers(canonical["weight_multiplier"], zero, scheme.zero_code)
        packed = {"packed_scale": canonical["weight_scale"], "packed_multiplier": multiplier}
        if has_channel_sums(scheme):
            packed["packed_sum"] = channel_sums(canonical, scheme, features)
        return packed
    return {own: pack_groups(canonical[name]) for name, own in GROUPED.items() if name in canonical}


class PreparedCudaW4(IntegerLayer, FloatLayer, Joinable, PackedLayer):
    """4-bit weights on a GPU, by the CUDA kernels.

    Resident: the packed codes, what belongs to their groups transposed, and the small canonical tensors; beside
    multipliers, under asymmetric activations, ``packed_sum`` too (:func:`qkernels.packed.channel_sums`).
    """

    granule = BLOCK_ROWS

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the CUDA kernels from a layer."""
        if device.type != "cuda" or scheme.weight_bits != 4:  # nothing to add to what the other kernels say
            return PreparedPacked.objection(scheme, in_features, out_features, device) or unavailable(device)
        if in_features == 0 or out_features == 0:
            return f"no CUDA kernel for an empty weight [{out_features}, {in_features}]"
        if in_features > MAX_FEATURES:
            return f"no CUDA kernel for 4-bit weights of more than {MAX_FEATURES} features ({in_features})"
        group = scheme.resolve_group_size(in_features)
        if group % GROUP_STEP and group < in_features:
            return f"no CUDA kernel for groups of {group} (multiples of {GROUP_STEP})"
        return unavailable(device)

    @classmethod
    def pack(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> dict[str, Tensor]:
        """See the base class."""
        packed = {"packed": pack_w4(canonical["weight"].contiguous(), in_features, ORDERS[scheme.activation_bits])}
        packed.update(_pack_grid(canonical, scheme, in_features))
        if scheme.codebook is not None:  # here: a copy to the device has no place in a CUDA graph
            codebook_tensor(scheme.codebook, packed["packed"].device)
        settle(packed["packed"].device)
        return packed

    def unpack(self) -> dict[str, Tensor]:
        """See the base class."""
        return _canonical(self.tensors, self.scheme, self.out_features, self.in_features)

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PackedLayer:
        """See the base class; the reason says where another kernel would be faster."""
        reason = reason or wgmma_objection(scheme, capability(canonical["weight"].device.index or 0))
        return super().from_canonical(canonical, scheme, in_features, reason)

    @property
    def kernel(self) -> str:
        """``"w4a16.cuda.sm"`` and the compute capability; ``"w4a8.cuda.mma.sm90"`` where mma.sync serves in place of
        wgmma."""
        found = capability(self.device.index or 0)
        mma = "mma." if wgmma_objection(self.scheme, found) else ""
        return f"w4a{self.scheme.activation_bits or 16}.cuda.{mma}sm{found}"

    def bind(self) -> tuple[Any, float]:
        """See :class:`qkernels.cuda_bound.BoundLayer`."""
        weight = describe(self.tensors, self.scheme, self.out_features, self.in_features)
        bias = _address(self.tensors.get("bias"))
        if not self.scheme.weight_only:
            grid = _grid(self.tensors, self.scheme)
            addresses = map(_address, (grid.inv_smooth, grid.scale, grid.zero_point))
            return _cuda.LinearW4A8(weight, bias, grid.symmetric, *addresses), math.inf
        smoothed = self.tensors.get("inv_smooth") is not None  # and so in float32
        fused = 0 if smoothed else fused_rows(self.device.index or 0, minima=weight[3] != 0)
        return _cuda.LinearW4A16(weight, bias), fused

    def grid(self) -> RowGrid | None:
        """See the base class."""
        return None if self.scheme.weight_only else _grid(self.tensors, self.scheme)

    def through(self, bound: Bound, x: Tensor) -> Tensor | None:
        """See the base classes."""
        return (FloatLayer if self.scheme.weight_only else IntegerLayer).through(self, bound, x)

    def general(self, x: Tensor) -> Tensor:
        """See the base class."""
        return _run(x, self.tensors, self.scheme, self.out_features, self.in_features, x.dtype, True)

    def rows_of(self, name: str, tensor: Tensor) -> Rows | None:
        """See :class:`qkernels.joint.Joinable`."""
        if name == "packed":
            return Rows(tensor.reshape(-(-self.in_features // SLAB_K), -1, BLOCK_BYTES), 1)
        if name == "packed_sum" or (name == "packed_scale" and self.scheme.group_scales == "int"):
            return Rows(tensor, 0)
        if name in GROUPED.values():
            return Rows(tensor.reshape(group_count(self.scheme, self.in_features), -1), 1)
        return Rows(tensor, 0) if name == "bias" else None

    def takes_floats(self) -> bool:
        """See :meth:`Prepared.takes_floats`."""
        return self.scheme.weight_only

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Packs into the resident memory."""
        with torch.no_grad():
            of_weight = {"weight", *GROUPED} & canonical.keys()
            if self.scheme.group_scales == "int" and of_weight:  # one says something of another
                here = {name: canonical[name].detach().to(self.device) for name in of_weight}
                for name, tensor in _pack_grid({**self.unpack(), **here}, self.scheme, self.in_features).items():
                    self.tensors[name].copy_(tensor.view(self.tensors[name].shape))
                canonical = {name: tensor for name, tensor in canonical.items() if name not in GROUPED}
            for name, tensor in canonical.items():
                if name == "weight":
                    codes, own = tensor.detach().to(self.device).contiguous(), self.tensors["packed"]
                    order = ORDERS[self.scheme.activation_bits]
                    packed = pack_w4(codes, self.in_features, order, own if own.is_contiguous() else None)
                    if packed is not own:
                        own.copy_(packed.view(own.shape))
                elif name in GROUPED:
                    own = self.tensors[GROUPED[name]]
                    own.copy_(pack_groups(tensor.detach().to(self.device)).view(own.shape))
                else:
                    self.tensors[name].copy_(tensor)
        settle(self.device)


# -- operators --------------------------------------------------------------------------------------------------------


def _checked(given: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int) -> dict[str, Tensor | None]:
    """Aligned tensors of the sizes that a kernel reads: contiguous, or among those of other layers.

    Raises:
        ValueError: naming the tensor.
    """
    packed = cast(Tensor, given["packed"])
    joined = not packed.is_contiguous() and _joined(packed, given, rows)
    device = packed.device
    objection = PreparedCudaW4.objection(scheme, features, rows, device)
    if objection:
        raise ValueError(f"packed: {objection}")
    groups = group_count(scheme, features) * _cuda.w4_group_pitch(rows)
    sizes = {"packed": _cuda.packed_w4_bytes(rows, features), "bias": rows, "inv_smooth": features}
    sizes |= {"act_scale": 1, "act_zero_point": 1}
    if scheme.group_scales == "int":
        sizes["packed_scale"] = sizes["packed_sum"] = rows
    check_multiplier(given, scheme, torch.int16)
    check_resident(given, sizes, groups, scheme, rows, features)
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in given.items():
        if tensor is not None and not (joined and name.startswith("packed") and tensor.dim() > 1):
            tensor = tensor.contiguous()
            if name.startswith("packed"):
                tensor = tensor.flatten()
                if tensor.data_ptr() % 16:
                    tensor = tensor.clone()
        tensors[name] = tensor
    return tensors


def _joined(packed: Tensor, given: Mapping[str, Tensor | None], rows: int) -> bool:
    """Whether the packed tensors lie among those of other layers as kernels can read them: the same distance in all."""
    if packed.dim() != 3 or packed.stride()[1:] != (BLOCK_BYTES, 1) or packed.data_ptr() % 16:
        return False
    pitch = packed.stride(0) // BLOCK_BYTES * BLOCK_ROWS
    for name in GROUPED.values():
        tensor = given.get(name)
        if tensor is None or (name == "packed_scale" and given.get("packed_multiplier") is not None):
            continue  # there is none, or it belongs to channels
        if tensor.dim() != 2 or tensor.stride() != (pitch, 1) or tensor.data_ptr() % 16:
            return False
    return packed.stride(0) % BLOCK_BYTES == 0


def linear_packed(x: Tensor, *rest: Any) -> Tensor:
    """``torch.ops.qkernels.linear_packed`` on CUDA tensors."""
    *given, key, rows, features, out_dtype = rest
    check_input(x, features, given[0].device, "x")
    check_out_dtype(out_dtype)
    scheme = scheme_from_key(key)
    named = dict(zip(PackedLayer.names, given, strict=True))
    check_sum(named, scheme, has_channel_sums(scheme))
    tensors = _checked(named, scheme, rows, features)
    return _run(x, tensors, scheme, rows, features, out_dtype or x.dtype, False)


def dequantize_packed(*rest: Any) -> Tensor:
    """``torch.ops.qkernels.dequantize_packed`` on CUDA tensors."""
    *given, smooth, key, rows, features, dtype = rest
    scheme = scheme_from_key(key)
    tensors = _checked(dict(zip(PackedLayer.names[:5], given, strict=True)), scheme, rows, features)
    if smooth is None:
        weight = describe(tensors, scheme, rows, features)
        return dequantize_w4(weight, 0, rows, dtype, cast(Tensor, tensors["packed"]).device)
    canonical = {**_canonical(tensors, scheme, rows, features), "inv_smooth": smooth}
    return effective_weight(canonical, scheme, features, dtype).contiguous()
