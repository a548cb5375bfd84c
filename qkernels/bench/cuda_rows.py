"""What ``qkernels bench --device cuda --schemes quantize`` times: the quantizers of rows ``[M, K]`` on a GPU.

    quantize                 per token, 3 bytes a 16-bit value
    quantize overlapped      the same, each launch beginning while the one before it ends, as before a product
    rms norm                 normalized and quantized, 3 bytes
    residual + rms norm      the residual added before, the sum written, 7 bytes
    layer norm               3 bytes
    silu * up                the product of two tensors, 5 bytes
    gelu                     by the error function, 3 bytes
    residual + rms norm, values   not quantized, as weight-only Linears read it: 8 bytes
    silu * up, values        the same of the product, 6 bytes
    copy                     torch's copy of a tensor, as many bytes read and written in all as quantize's
    torch: rms norm, quantize     the parts: torch's norm and our quantizer
    torch: silu * up, quantize    the same of the product

Every row's limit is its bytes over the copy bandwidth.  Inputs rotate through more memory than the L2 holds.  A kernel
is timed once its scales lie within 2^-16 of the reference's and its codes within one, its values within 2^-16 of its
row's largest and one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkernels import cuda, reference
from qkernels.cuda_rows import RowGrid, activate, normalize, quantize_activation, quantize_norm
from qkernels.scheme import Scheme

__all__ = ["ProblemRows"]

_EPS = 1e-5
_BYTES = {
    "residual + rms norm": (3, 1),
    "silu * up": (2, 1),
    "residual + rms norm, values": (4, 0),
    "silu * up, values": (3, 0),
    "torch: silu * up, quantize": (2, 1),
}
"""Values read or written in the dtype of the input, and in int8, per value; (1, 1) for all others."""


class ProblemRows:
    """Inputs of one length and number of rows; copies of them fill ``cold_bytes``."""

    name = "quantize"
    kernel = ""
    scheme = Scheme()

    def __init__(self, k: int, m: int, cold_bytes: int, dtype: torch.dtype) -> None:
        self.k, self.n, self.m, self.dtype = k, k, m, dtype
        copies = max(2, min(64, -(-cold_bytes // (2 * m * k * dtype.itemsize))))
        self.pairs = [[torch.randn(m, k, device="cuda").to(dtype) for _ in range(2)] for _ in range(copies)]
        half = int(self.bytes_of("quantize")) // 2
        self.bytes = [torch.randint(0, 256, (half,), dtype=torch.uint8, device="cuda") for _ in range(copies + 1)]
        self.weight = (torch.rand(k, device="cuda") + 0.5).to(dtype)
        self.bias = torch.randn(k, device="cuda").to(dtype)

    def bytes_of(self, contender: str) -> float:
        """What has to move."""
        wide, codes = _BYTES.get(contender, (1, 1))
        return self.m * self.k * (wide * self.dtype.itemsize + codes) + 4.0 * self.m * codes

    def contenders(self) -> Iterator[tuple[str, bool, Callable[[int], object]]]:
        """(name, ours, call) of everyone who can take this problem."""
        pairs, count, grid = self.pairs, len(self.pairs), RowGrid()
        weight, bias = self.weight, self.bias

        def norm(index: int, layer: bool = False, residual: bool = False) -> Any:
            x, beside = pairs[index % count]
            return quantize_norm(
                x, weight, bias if layer else None, _EPS, grid, layer=layer, residual=beside if residual else None
            )[0]

        def values(index: int) -> Tensor:
            x, beside = pairs[index % count]
            return normalize(x, weight, None, _EPS, layer=False, residual=beside)[0]

        def product(index: int) -> Tensor:
            x, up = pairs[index % count]
            return activate(x, "silu", up)

        def activation(index: int, name: str, gated: bool) -> Any:
            x, up = pairs[index % count]
            return quantize_activation(x, name, up if gated else None, grid)

        yield "quantize", True, lambda index: cuda.quantize_rows(pairs[index % count][0])
        yield "quantize overlapped", True, lambda index: cuda.quantize_rows(pairs[index % count][0], for_gemm=True)
        yield "rms norm", True, norm
        yield "residual + rms norm", True, lambda index: norm(index, residual=True)
        yield "layer norm", True, lambda index: norm(index, layer=True)
        yield "silu * up", True, lambda index: activation(index, "silu", True)
        yield "gelu", True, lambda index: activation(index, "gelu", False)
        yield "residual + rms norm, values", True, values
        yield "silu * up, values", True, product
        yield "copy", False, lambda index: self.bytes[-1].copy_(self.bytes[index % count])
        yield (
            "torch: rms norm, quantize",
            False,
            lambda index: cuda.quantize_rows(functional.rms_norm(pairs[index % count][0], (self.k,), weight, _EPS)),
        )
        yield (
            "torch: silu * up, quantize",
            False,
            lambda index: cuda.quantize_rows(functional.silu(pairs[index % count][0]) * pairs[index % count][1]),
        )

    def exact(self, call: Callable[[int], object], name: str) -> bool:
        """Whether the result over the first input is the reference's, in the sense of the file's head."""
        x, beside = self.pairs[0]
        result: Any = call(0)
        if isinstance(result, Tensor):
            silu = reference.activated(x, "silu", beside)
            y = silu if "silu" in name else reference.rms_norm(reference.add_residual(x, beside), self.weight, _EPS)
            slack = y.abs().amax(-1, keepdim=True) * 2.0**-16 + y.abs() * torch.finfo(self.dtype).eps
            return bool(((result.float() - y).abs() <= slack).all())
        if name == "rms norm":
            y = reference.rms_norm(x, self.weight, _EPS)
        elif name == "residual + rms norm":
            y = reference.rms_norm(reference.add_residual(x, beside), self.weight, _EPS)
        elif name == "layer norm":
            y = reference.layer_norm(x, self.weight, self.bias, _EPS)
        elif name.startswith("quantize"):
            y = x.float()
        else:
            y = reference.activated(x, name.split()[0], beside if "up" in name else None)
        q, scale, _ = reference.quantize_activations(y)
        near: Tensor = (result[1] - scale).abs() <= scale * 2.0**-16
        return bool(near.all()) and int((result[0].int() - q.int()).abs().max()) <= (not name.startswith("quantize"))
