"""Layers on the Triton kernels: W8A8 where the CUDA module cannot serve a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import cuda
from ..backends import PreparedReference
from ..checks import DTYPE_CODES
from ..cpu_w8a8 import PreparedW8A8
from ..eager import is_plain
from ..scheme import Scheme
from . import available

__all__ = ["PreparedTritonW8A8"]


class PreparedTritonW8A8(PreparedReference):
    """8-bit weights per output channel and 8-bit activations by the Triton kernels, over the canonical weight.

    Resident: the reference's tensors and ``colsum``.  Whatever needs torch's dispatcher runs the reference, whose bits
    are the same.
    """

    names = (*PreparedReference.names, "colsum")  # type: ignore[assignment]

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the Triton kernels from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedW8A8.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if (scheme.weight_bits, scheme.activation_bits, scheme.weight_granularity) != (8, 8, "per_channel"):
            return f"no Triton kernel for scheme {scheme.name}"
        if in_features == 0 or out_features == 0:
            return f"no Triton kernel for an empty weight [{out_features}, {in_features}]"
        return available()

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedTritonW8A8:
        """The tensors as they are, and the sums of the weight's rows."""
        weight = canonical["weight"]
        tensors = {"q_weight" if name == "weight" else name: tensor for name, tensor in canonical.items()}
        tensors["colsum"] = weight.sum(1, dtype=torch.int32)
        return cls(tensors, scheme, in_features, weight.shape[0], reason)

    @property
    def kernel(self) -> str:
        """``"w8a8.triton"``."""
        return "w8a8.triton"

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`.  Plain eager calls go to the Triton kernels."""
        if (
            is_plain(x)
            and x.device == self.device
            and x.dtype in DTYPE_CODES
            and x.dim()
            and x.shape[-1] == self.in_features
        ):
            return self.finished(self._launch(x))
        return self.around(x)

    def _launch(self, x: Tensor) -> Tensor:
        from .gemm_w8a8 import gemm_w8a8
        from .quantize import quantize_rows

        tensors = self.tensors
        rows = x.reshape(-1, self.in_features)
        q, scale, zero_point = quantize_rows(
            rows,
            symmetric=self.scheme.activation_symmetric,
            scale=tensors.get("act_scale"),
            zero_point=tensors.get("act_zero_point"),
            inv_smooth=tensors.get("inv_smooth"),
        )
        y = gemm_w8a8(
            q,
            scale,
            zero_point,
            tensors["q_weight"],
            tensors["weight_scale"],
            tensors.get("bias"),
            colsum=tensors["colsum"],
            out_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def canonical(self) -> dict[str, Tensor]:
        """The resident tensors themselves, without the sums."""
        canonical = super().canonical()
        del canonical["colsum"]
        return canonical

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Copy in place."""
        super().load(canonical)
        if "weight" in canonical:
            with torch.no_grad():
                self.tensors["colsum"].copy_(self.tensors["q_weight"].sum(1, dtype=torch.int32))
