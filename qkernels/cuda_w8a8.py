"""8-bit weights and activations on a GPU: layers on the CUDA module, and its operators under torch's dispatcher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import cuda
from ._library import plus_residual
from .checks import check_input, check_out_dtype
from .cpu_w8a8 import PreparedW8A8
from .cuda_bound import IntegerLayer
from .cuda_rows import RowGrid
from .joint import Joinable, Rows
from .packed import PackedW8A8
from .prepared import effective_weight
from .scheme import MAX_INTEGER_K, Scheme

__all__ = ["PreparedCudaW8A8", "register_operators"]


def _require(name: str, tensor: Tensor | None, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.numel() != numel or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name}: expected {numel} contiguous elements on {device}, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} on {tensor.device}"
        )


def _packed(packed: Tensor, rows: int, features: int) -> Tensor:
    """A packed weight that was checked, aligned: contiguous, or slabs among those of other layers."""
    whole = packed.is_contiguous()
    if packed.dim() == 3 and not whole:
        whole = packed.stride()[1:] == (cuda.SLAB_K, 1) and packed.stride(0) % (cuda.ATOM_ROWS * cuda.SLAB_K) == 0
    wanted = cuda.packed_w8_bytes(rows, features)
    if packed.dtype != torch.int8 or packed.numel() != wanted or not whole:
        raise ValueError(
            f"packed: expected {wanted} int8 elements as pack_w8 or a joint of layers has them, got {packed.dtype} of "
            f"shape {tuple(packed.shape)}, strides {packed.stride()}"
        )
    return packed.clone() if packed.data_ptr() % cuda.PACKED_ALIGNMENT else packed


def _linear_w8a8(
    x: Tensor,
    packed: Tensor,
    colsum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    has_minus128: bool,
    act_symmetric: bool,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``torch.ops.qkernels.linear_w8a8`` on CUDA tensors; static scales are not read back."""
    device = packed.device
    reason = cuda.unavailable(device)
    if reason:
        raise ValueError(f"packed: {reason}")
    check_input(x, K, device, "x")
    check_out_dtype(out_dtype)
    if not 1 <= K <= MAX_INTEGER_K or N < 1:
        raise ValueError(f"N, K: expected N >= 1 and 1 <= K <= {MAX_INTEGER_K}, got N = {N}, K = {K}")
    packed = _packed(packed, N, K)
    _require("colsum", colsum, torch.int32, N, device)
    _require("weight_scale", weight_scale, torch.float32, N, device)
    _require("bias", bias, torch.float32, N, device)
    _require("act_scale", act_scale, torch.float32, 1, device)
    _require("act_zero_point", act_zero_point, torch.int32, 1, device)
    _require("inv_smooth", inv_smooth, torch.float32, K, device)
    if act_scale is not None and not act_symmetric and act_zero_point is None:
        raise ValueError("act_zero_point: expected a tensor beside act_scale with act_symmetric=False, got None")
    return cuda.linear_w8a8(
        x,
        packed,
        colsum,
        weight_scale,
        bias,
        N,
        K,
        act_symmetric,
        act_scale,
        None if act_symmetric else act_zero_point,
        inv_smooth,
        out_dtype or x.dtype,
    )


def _dequantize_w8(
    packed: Tensor, weight_scale: Tensor, inv_smooth: Tensor | None, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    """``torch.ops.qkernels.dequantize_w8`` on CUDA tensors."""
    packed = _packed(packed, N, K)
    tensors = {"weight": cuda.unpack_w8(packed, N, K), "weight_scale": weight_scale}
    if inv_smooth is not None:
        tensors["inv_smooth"] = inv_smooth
    return effective_weight(tensors, Scheme(), K, dtype)


class PreparedCudaW8A8(IntegerLayer, Joinable, PackedW8A8):
    """8-bit weights per output channel and 8-bit activations on a GPU, by the CUDA kernels.

    Resident: ``packed`` and ``colsum`` (see :func:`qkernels.cuda.pack_w8`) and the small canonical tensors.
    """

    granule = cuda.ATOM_ROWS
    alignment = cuda.PACKED_ALIGNMENT

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the CUDA kernels from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedW8A8.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if scheme.weight_bits != 8 or scheme.activation_bits != 8:
            return f"no CUDA kernel for scheme {scheme.name}"
        if scheme.weight_granularity != "per_channel":
            return f"no CUDA kernel for group-wise 8-bit weights (scheme {scheme.name})"
        if in_features == 0 or out_features == 0:
            return f"no CUDA kernel for an empty weight [{out_features}, {in_features}]"
        return cuda.unavailable(device)

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedCudaW8A8:
        """Packs the weight."""
        packed, colsum = cuda.pack_w8(canonical["weight"])
        cuda.settle(packed.device)
        tensors: dict[str, Any] = {"packed": packed, "colsum": colsum, "bias": None}
        tensors.update((name, tensor) for name, tensor in canonical.items() if name != "weight")
        return cls(tensors, scheme, in_features, canonical["weight"].shape[0], reason)

    @property
    def kernel(self) -> str:
        """``"w8a8.cuda.sm"`` and the compute capability; ``cuda.kernel_name`` knows more for a number of rows."""
        return f"w8a8.cuda.sm{cuda.capability(self.device.index or 0)}"

    def bind(self) -> tuple[Any, float]:
        """See :class:`qkernels.cuda_bound.BoundLayer`."""
        tensors, rows, grid = self.tensors, self.out_features, self.grid()
        layer = cuda._cuda.LinearW8A8(
            tensors["packed"].data_ptr(),
            cuda.slab_rows(tensors["packed"], rows),
            tensors["colsum"].data_ptr(),
            tensors["weight_scale"].data_ptr(),
            cuda._address(tensors.get("bias")),
            rows,
            self.in_features,
            grid.symmetric,
            *map(cuda._address, (grid.inv_smooth, grid.scale, grid.zero_point)),
            True,
        )
        return layer, math.inf

    def grid(self) -> RowGrid:
        """See the base class."""
        get, symmetric = self.tensors.get, self.scheme.activation_symmetric
        return RowGrid(symmetric, get("act_scale"), None if symmetric else get("act_zero_point"), get("inv_smooth"))

    def general(self, x: Tensor) -> Tensor:
        """See the base class."""
        get, grid = self.tensors.__getitem__, self.grid()
        return cuda.linear_w8a8(
            x,
            get("packed"),
            get("colsum"),
            get("weight_scale"),
            self.tensors.get("bias"),
            self.out_features,
            self.in_features,
            *grid,
            x.dtype,
        )

    def rows_of(self, name: str, tensor: Tensor) -> Rows | None:
        """See :class:`qkernels.joint.Joinable`."""
        if name == "packed":
            slabs = -(-self.in_features // cuda.SLAB_K)
            return Rows(tensor.reshape(slabs, -1, cuda.SLAB_K), 1)
        return Rows(tensor, 0) if name in ("colsum", "weight_scale", "bias") else None

    @staticmethod
    def unpack(packed: Tensor, rows: int, features: int) -> Tensor:
        """See the base class."""
        return cuda.unpack_w8(packed, rows, features)

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Packs into the resident memory."""
        with torch.no_grad():
            for name, tensor in canonical.items():
                if name != "weight":
                    self.tensors[name].copy_(tensor)
        if "weight" in canonical:
            weight = canonical["weight"].detach().to(self.device).contiguous()
            own, colsum = self.tensors["packed"], self.tensors["colsum"]
            packed, _ = cuda.pack_w8(weight, own if own.is_contiguous() else None, colsum)
            if packed is not own:
                own.copy_(packed.view(own.shape))
            cuda.settle(self.device)


def register_operators() -> torch.library.Library:
    """CUDA implementations of operators that :mod:`qkernels.ops` defines.  The library must be kept alive."""
    library = torch.library.Library("qkernels", "IMPL", "CUDA")
    library.impl("linear_w8a8", plus_residual(_linear_w8a8, 13))
    library.impl("dequantize_w8", _dequantize_w8)
    return library
