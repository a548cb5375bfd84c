"""Layers on the Triton kernels of integer products, W8A8 and W4A8, where the CUDA module cannot serve a GPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import cuda
from ..backends import PreparedReference
from ..checks import DTYPE_CODES
from ..cpu_packed import PreparedPacked
from ..cpu_w8a8 import PreparedW8A8
from ..eager import is_plain
from ..packed import channel_sums, has_channel_sums
from ..scheme import Scheme
from . import available, unfit

__all__ = ["PreparedTritonW4A8", "PreparedTritonW8A8"]

_INTEGERS = ("weight", "weight_multiplier", "weight_zero_point")
"""Canonical tensors that integer weights are made of."""


class _IntegerProduct(PreparedReference):
    """8-bit activations by a Triton kernel, over the canonical weight.

    Plain eager calls go to the kernel.  Whatever needs torch's dispatcher runs the reference, whose bits are the same.
    Resident: the reference's tensors and, for a kernel that needs it, ``colsum``.
    """

    names = (*PreparedReference.names, "colsum")  # type: ignore[assignment]

    @classmethod
    def sums(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor | None:
        """``colsum`` int32 ``[N]``, the sum of each row of an integer weight; None: the kernel does without it."""
        return None

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedReference:
        """The tensors as they are, and the sums of the weight's rows."""
        prepared = super().from_canonical(canonical, scheme, in_features, reason)
        colsum = cls.sums(canonical, scheme, in_features)
        if colsum is not None:
            prepared.tensors = {**prepared.tensors, "colsum": colsum}
        return prepared

    def canonical(self) -> dict[str, Tensor]:
        """The resident tensors themselves, without the sums."""
        canonical = super().canonical()
        canonical.pop("colsum", None)
        return canonical

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Copy in place."""
        super().load(canonical)
        if "colsum" in self.tensors and not canonical.keys().isdisjoint(_INTEGERS):
            with torch.no_grad():
                self.tensors["colsum"].copy_(self.sums(self.canonical(), self.scheme, self.in_features))

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`."""
        if (
            is_plain(x)
            and x.device == self.device
            and x.dtype in DTYPE_CODES
            and x.dim()
            and x.shape[-1] == self.in_features
        ):
            from .quantize import quantize_rows

            tensors = self.tensors
            with cuda._on(x.device):
                q, scale, zero_point = quantize_rows(
                    x.reshape(-1, self.in_features),
                    symmetric=self.scheme.activation_symmetric,
                    scale=tensors.get("act_scale"),
                    zero_point=tensors.get("act_zero_point"),
                    inv_smooth=tensors.get("inv_smooth"),
                )
                y = self.multiply(q, scale, zero_point, x.dtype)
            return self.finished(y.view(*x.shape[:-1], self.out_features))
        return self.around(x)

    @abstractmethod
    def multiply(self, q: Tensor, scale: Tensor, zero_point: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The product of quantized rows ``[M, K]``, asymmetric codes less 128, and its epilogue: ``[M, N]``."""


class PreparedTritonW8A8(_IntegerProduct):
    """8-bit weights per output channel and 8-bit activations."""

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the Triton kernels from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedW8A8.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if (scheme.weight_bits, scheme.activation_bits, scheme.weight_granularity) != (8, 8, "per_channel"):
            return f"no Triton kernel for scheme {scheme.name}"
        return unfit(scheme, in_features, out_features) or available()

    @classmethod
    def sums(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor | None:
        """See the base class."""
        return canonical["weight"].sum(1, dtype=torch.int32)

    @property
    def kernel(self) -> str:
        """``"w8a8.triton"``."""
        return "w8a8.triton"

    def multiply(self, q: Tensor, scale: Tensor, zero_point: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See the base class."""
        from .gemm_w8a8 import gemm_w8a8

        tensors = self.tensors
        return gemm_w8a8(
            q,
            scale,
            zero_point,
            tensors["q_weight"],
            tensors["weight_scale"],
            tensors.get("bias"),
            colsum=tensors["colsum"],
            out_dtype=out_dtype,
        )


class PreparedTritonW4A8(_IntegerProduct):
    """4-bit weights, per channel or in groups, and 8-bit activations."""

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the Triton kernels from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedPacked.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if (scheme.weight_bits, scheme.activation_bits) != (4, 8):
            return f"no Triton kernel for scheme {scheme.name}"
        return unfit(scheme, in_features, out_features) or available()

    @classmethod
    def sums(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor | None:
        """See the base class: of asymmetric activations times integer scales of groups."""
        if not has_channel_sums(scheme):
            return None
        return channel_sums(canonical, scheme, in_features)

    @property
    def kernel(self) -> str:
        """``"w4a8.triton"``."""
        return "w4a8.triton"

    def multiply(self, q: Tensor, scale: Tensor, zero_point: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See the base class."""
        from .gemm_w4a8 import gemm_w4a8

        tensors = self.tensors
        return gemm_w4a8(
            q,
            scale,
            zero_point,
            tensors["q_weight"],
            tensors["weight_scale"],
            tensors.get("bias"),
            group_size=self.scheme.resolve_group_size(self.in_features),
            weight_zero_point=tensors.get("weight_zero_point"),
            weight_min=tensors.get("weight_min"),
            weight_multiplier=tensors.get("weight_multiplier"),
            colsum=tensors.get("colsum"),
            out_dtype=out_dtype,
        )
