"""8-bit weights under floating-point activations on a GPU, and lookups in 8-bit tables.

Products read a packed weight of their own (``PAIRS`` of :class:`qkernels.cuda.W8Layout`), lookups any, so that one
resident table serves an embedding and its head in either scheme.

    up to fused_rows() rows    the fused kernel: products of 16-bit values, float32 sums, scaled once
    above (before Hopper)      dequantized in slices and multiplied by the vendor's library
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from . import cuda, cuda_w4_layer
from ._library import plus_residual, vmap_rows
from .checks import DTYPE_CODES, check_input, check_out_dtype
from .cpu_packed import PreparedPacked
from .cuda import W8Layout, _address, _cuda, _on, _stream, capability, settle
from .cuda_bound import FloatLayer
from .cuda_slices import aligned_rows, by_slices, by_terms
from .cuda_w4 import Plan, workspace
from .joint import Joinable, Rows
from .packed import PackedLayer, check_resident
from .prepared import effective_weight, scheme_from_key
from .scheme import Scheme

__all__ = [
    "PHASED_TILES",
    "PreparedCudaW8A16",
    "embedding_w8",
    "fused_rows",
    "gather_w8",
    "gemm_w8a16",
    "linear_w8a16",
    "register_operators",
]

FUSED_ROWS = 64
"""Where :func:`fused_rows` ends for the kernel of mma.sync (measured on an H200)."""

PHASED_TILES = [(8, 2), (16, 2), (64, 2), (16, 4), (32, 4), (8, 8), (16, 8)]
"""Tokens and phases, more than one, that a plan of the wgmma kernel may name (``w8a16_has_tile``)."""


@functools.lru_cache(maxsize=4096)
def _plan(rows: int, channels: int, features: int, index: int) -> Plan:
    """What the module would do."""
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    return _cuda.plan_w8a16(rows, channels, features, capability(index), sms)


# -- kernels ----------------------------------------------------------------------------------------------------------


def gather_w8(
    table: Tensor,
    scale: Tensor,
    features: int,
    out: Tensor,
    *,
    ids: Tensor | None = None,
    first: int = 0,
    layout: int = W8Layout.PAIRS,
) -> Tensor:
    """Rows of an 8-bit table as floats: ``out[i] = scale[row] * table[row]``, ``row = ids[i]`` or ``first + i``.

    Args:
        table: int8, packed by :func:`qkernels.cuda.pack_w8` (among others too, see :func:`qkernels.cuda.slab_rows`) or
            ``[N, K]`` contiguous, as ``layout``, of :class:`qkernels.cuda.W8Layout`, says.
        scale: float32 ``[N]``.
        out: contiguous, ``ids.numel()`` rows (or any number of them) of ``features`` values; returned.
        ids: int32 or int64, contiguous.  One outside the table stops the kernel with an assertion, as torch's own
            lookups do on a GPU.
    """
    count = out.numel() // features
    with _on(out.device):
        _cuda.gather_w8(
            table.data_ptr(),
            layout,
            cuda.slab_rows(table, scale.numel()) if layout != W8Layout.ROWS else 0,
            scale.data_ptr(),
            scale.numel(),
            features,
            _address(ids),
            ids is not None and ids.dtype == torch.int64,
            first,
            count,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            _stream(out.device),
        )
    return out


def embedding_w8(ids: Tensor, table: Tensor, scale: Tensor, layout: int, features: int, dtype: torch.dtype) -> Tensor:
    """``[*ids.shape, features]`` from a table, see :func:`gather_w8`.

    Raises:
        TypeError: ids of another dtype than int32 and int64.
        ValueError: ids elsewhere than the table.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input: expected an int32 or int64 tensor, got {ids.dtype}")
    if ids.device != table.device:
        raise ValueError(f"input: expected a tensor on {table.device}, as the table is, got {ids.device}")
    out = torch.empty((*ids.shape, features), dtype=dtype, device=table.device)
    return gather_w8(table, scale, features, out, ids=ids.contiguous(), layout=layout) if ids.numel() else out


def gemm_w8a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    plan: Plan | None = None,
    dependent: bool = False,
) -> Tensor:
    """The fused product of 16-bit ``x [M, K]``, M >= 1.

    Args:
        packed: pairs, as :func:`qkernels.cuda.pack_w8` packs them; scale: float32 ``[N]``; bias: float32 ``[N]``.
        plan: None: the module's own choice.
        dependent: the launch may fetch weights while the kernel before it ends; that one must not write them.
    """
    x = aligned_rows(x)
    rows, features = x.shape
    channels, device = scale.numel(), x.device
    out = x.new_empty((rows, channels), dtype=out_dtype)
    if plan is None:
        plan = _plan(rows, channels, features, device.index or 0)
    with _on(device):
        stream = _stream(device)
        _cuda.gemm_w8a16(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            rows,
            x.stride(0),
            packed.data_ptr(),
            cuda.slab_rows(packed, channels),
            scale.data_ptr(),
            _address(bias),
            channels,
            features,
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
            channels,
            plan,
            *workspace(device, stream, *plan[4:6]),
            dependent,
            stream,
        )
    return out


def fused_rows(index: int) -> float:
    """Up to so many rows the fused kernel runs on a device: it is faster than dequantizing first."""
    return math.inf if capability(index) == 90 and _cuda.has_sm90a() else FUSED_ROWS


def linear_w8a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    features: int,
    out_dtype: torch.dtype,
    *,
    dependent: bool = False,
) -> Tensor:
    """``x [..., K]`` times a packed weight, plus bias, in fp32 sums.

    Args:
        x: float32, bfloat16 or float16.  The kernel multiplies 16-bit values, which hold every code exactly: float32,
            or what smoothing makes, goes in as three bfloat16 terms, without loss.
        scale, bias: float32 ``[N]``; inv_smooth: float32 ``[K]``.
        dependent: the launch may fetch weights while the kernel before it ends; that one must not write them.
    """
    channels = scale.numel()
    flat = x.reshape(-1, features)
    shape, rows = (*x.shape[:-1], channels), flat.shape[0]
    if not rows:
        return torch.empty(shape, dtype=out_dtype, device=x.device)
    if inv_smooth is not None:
        flat = flat.to(torch.float32) * inv_smooth
    if rows > fused_rows(x.device.index or 0):

        def dequantize(first: int, count: int, out: Tensor) -> Tensor:
            return gather_w8(packed, scale, features, out, first=first)

        return by_slices(flat.contiguous(), channels, dequantize, bias, out_dtype).view(shape)
    if flat.dtype != torch.float32:
        return gemm_w8a16(flat, packed, scale, bias, out_dtype, dependent=dependent).view(shape)

    def product(terms: Tensor) -> Tensor:
        return gemm_w8a16(terms, packed, scale, None, torch.float32, dependent=dependent)

    return by_terms(flat, product, bias, out_dtype).view(shape)


# -- layers -----------------------------------------------------------------------------------------------------------


class PreparedCudaW8A16(FloatLayer, Joinable, PackedLayer):
    """8-bit weights per output channel under floating-point activations on a GPU, by the CUDA kernels."""

    granule = cuda.ATOM_ROWS

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the CUDA kernels from a layer."""
        if device.type != "cuda" or scheme.weight_bits != 8 or not scheme.weight_only:
            # nothing to add to what the other kernels say
            return PreparedPacked.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if scheme.weight_granularity != "per_channel":
            return f"no CUDA kernel for group-wise 8-bit weights (scheme {scheme.name})"
        if in_features == 0 or out_features == 0:
            return f"no CUDA kernel for an empty weight [{out_features}, {in_features}]"
        return cuda.unavailable(device)

    @classmethod
    def pack(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> dict[str, Tensor]:
        """See the base class."""
        packed, _ = cuda.pack_w8(canonical["weight"].contiguous(), layout=W8Layout.PAIRS)
        settle(packed.device)
        return {"packed": packed, "packed_scale": canonical["weight_scale"]}

    def unpack(self) -> dict[str, Tensor]:
        """See the base class."""
        tensors = self.tensors
        weight = cuda.unpack_w8(tensors["packed"], self.out_features, self.in_features, layout=W8Layout.PAIRS)
        return {"weight": weight, "weight_scale": tensors["packed_scale"]}

    @property
    def kernel(self) -> str:
        """``"w8a16.cuda.sm"`` and the compute capability."""
        return f"w8a16.cuda.sm{cuda.capability(self.device.index or 0)}"

    def bind(self) -> tuple[Any, float]:
        """See :class:`qkernels.cuda_bound.BoundLayer`."""
        tensors, rows = self.tensors, self.out_features
        packed, scale, bias = tensors["packed"], tensors["packed_scale"], tensors.get("bias")
        addresses = packed.data_ptr(), cuda.slab_rows(packed, rows), scale.data_ptr(), _address(bias)
        smoothed = tensors.get("inv_smooth") is not None  # and so in float32
        fused = 0 if smoothed else fused_rows(self.device.index or 0)
        return _cuda.LinearW8A16(*addresses, rows, self.in_features), fused

    def general(self, x: Tensor) -> Tensor:
        """See the base class."""
        get = self.tensors.get
        rest = get("bias"), get("inv_smooth"), self.in_features, x.dtype
        return linear_w8a16(x, self.tensors["packed"], self.tensors["packed_scale"], *rest, dependent=True)

    def rows_of(self, name: str, tensor: Tensor) -> Rows | None:
        """See :class:`qkernels.joint.Joinable`."""
        if name == "packed":
            return Rows(tensor.reshape(-(-self.in_features // cuda.SLAB_K), -1, cuda.SLAB_K), 1)
        return Rows(tensor, 0) if name in ("packed_scale", "bias") else None

    def takes_floats(self) -> bool:
        """See :meth:`Prepared.takes_floats`."""
        return True

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Packs into the resident memory."""
        with torch.no_grad():
            for name, tensor in canonical.items():
                if name == "weight":
                    weight, own = tensor.detach().to(self.device).contiguous(), self.tensors["packed"]
                    packed, _ = cuda.pack_w8(weight, own if own.is_contiguous() else None, layout=W8Layout.PAIRS)
                    if packed is not own:
                        own.copy_(packed.view(own.shape))
                else:
                    self.tensors["packed_scale" if name == "weight_scale" else name].copy_(tensor)
        settle(self.device)


# -- operators --------------------------------------------------------------------------------------------------------


def _checked(given: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int) -> dict[str, Tensor | None]:
    """Contiguous, aligned tensors of the sizes that a kernel reads.

    Raises:
        ValueError: naming the tensor.
    """
    device = cast(Tensor, given["packed"]).device
    objection = PreparedCudaW8A16.objection(scheme, features, rows, device)
    if objection:
        raise ValueError(f"packed: {objection}")
    sizes = {"packed": cuda.packed_w8_bytes(rows, features), "inv_smooth": features}
    check_resident(given, sizes, rows, scheme, rows, features)
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in given.items():
        if tensor is not None:
            tensor = tensor.contiguous()
            if name == "packed" and tensor.data_ptr() % 16:
                tensor = tensor.clone()
        tensors[name] = tensor
    return tensors


def _linear_packed(x: Tensor, *rest: Any) -> Tensor:
    """``torch.ops.qkernels.linear_packed`` on CUDA tensors."""
    *given, key, rows, features, out_dtype = rest
    scheme = scheme_from_key(key)
    if scheme.weight_bits == 4:
        return cuda_w4_layer.linear_packed(x, *rest)
    check_input(x, features, given[0].device, "x")
    check_out_dtype(out_dtype)
    tensors: Any = _checked(dict(zip(PackedLayer.names, given, strict=True)), scheme, rows, features)
    return linear_w8a16(
        x,
        tensors["packed"],
        tensors["packed_scale"],
        tensors["bias"],
        tensors["inv_smooth"],
        features,
        out_dtype or x.dtype,
    )


def _dequantize_packed(*rest: Any) -> Tensor:
    """``torch.ops.qkernels.dequantize_packed`` on CUDA tensors."""
    *given, smooth, key, rows, features, dtype = rest
    scheme = scheme_from_key(key)
    if scheme.weight_bits == 4:
        return cuda_w4_layer.dequantize_packed(*rest)
    tensors: Any = _checked(dict(zip(PackedLayer.names[:5], given, strict=True)), scheme, rows, features)
    packed, scale = tensors["packed"], tensors["packed_scale"]
    if smooth is None:
        return gather_w8(packed, scale, features, packed.new_empty((rows, features), dtype=dtype))
    weight = cuda.unpack_w8(packed, rows, features, layout=W8Layout.PAIRS)
    canonical = {"weight": weight, "weight_scale": scale, "inv_smooth": smooth}
    return effective_weight(canonical, scheme, features, dtype).contiguous()


def _embedding_w8(ids: Tensor, table: Tensor, scale: Tensor, layout: int, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """``torch.ops.qkernels.embedding_w8`` on CUDA tensors."""
    check_out_dtype(dtype, "dtype")
    if layout not in list(W8Layout):
        raise ValueError(f"layout: expected one of {[int(value) for value in W8Layout]}, got {layout}")
    wanted = cuda.packed_w8_bytes(N, K) if layout != W8Layout.ROWS else N * K
    if table.dtype != torch.int8 or table.numel() != wanted or not table.is_contiguous():
        raise ValueError(f"table: expected {wanted} contiguous int8 elements, got {table.dtype} {list(table.shape)}")
    if scale.dtype != torch.float32 or scale.numel() != N or not scale.is_contiguous() or scale.device != table.device:
        raise ValueError(f"scale: expected {N} contiguous float32 elements on {table.device}, got {list(scale.shape)}")
    if layout != W8Layout.ROWS and table.data_ptr() % 16:
        table = table.clone()
    return embedding_w8(ids, table, scale, layout, K, dtype)


def _embedding_w8_fake(
    ids: Tensor, table: Tensor, scale: Tensor, layout: int, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    return table.new_empty((*ids.shape, K), dtype=dtype)


def register_operators(library: torch.library.Library) -> torch.library.Library:
    """Define ``torch.ops.qkernels.embedding_w8``, and implement on CUDA what :mod:`qkernels.ops` defines.

    The library returned must be kept alive.
    """
    library.define(
        "embedding_w8(Tensor ids, Tensor table, Tensor scale, int layout, int N, int K, ScalarType dtype) -> Tensor"
    )
    library.impl("embedding_w8", _embedding_w8, "CUDA")
    torch.library.register_fake("qkernels::embedding_w8", _embedding_w8_fake, lib=library)
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap("qkernels::embedding_w8", vmap_rows("embedding_w8"), lib=library)
    implementations = torch.library.Library("qkernels", "IMPL", "CUDA")
    implementations.impl("linear_packed", plus_residual(_linear_packed, len(PackedLayer.names) + 5))
    implementations.impl("dequantize_packed", _dequantize_packed)
    return implementations
