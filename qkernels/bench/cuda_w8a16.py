"""What ``qkernels bench --device cuda --schemes w8a16`` times: 8-bit weights under floating-point activations on a GPU.

    w8a16 layer        floating-point activations in and out
    w8a16 triton       the portable kernel
    gemlite            GemLite over the same codes, where it is installed
    cublas bf16        torch.mm in bfloat16, its weights cold too

Ours is timed once its distance from the float32 reference is below half a step of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qkernels import cuda_w8a16, reference, triton
from qkernels.bench.cuda_gemlite import gemlite_contender
from qkernels.bench.cuda_w4 import NORM_STEP
from qkernels.scheme import Scheme

__all__ = ["ProblemW8A16"]

Call = Callable[[int], object]


class ProblemW8A16:
    """The operands of one shape and number of rows; copies of the weight fill ``cold_bytes``."""

    name = "w8a16"

    def __init__(self, k: int, n: int, m: int, cold_bytes: int, dtype: torch.dtype) -> None:
        self.scheme = Scheme.from_preset(self.name)
        self.k, self.n, self.m, self.dtype = k, n, m, dtype
        self.canonical = []
        for _ in range(max(2, min(64, -(-cold_bytes // (n * k))))):
            self.canonical.append(reference.quantize_weight(torch.randn(n, k, device="cuda"), self.scheme))
        prepare = cuda_w8a16.PreparedCudaW8A16.from_canonical
        self.layers = [prepare(tensors, self.scheme, k) for tensors in self.canonical]
        self.x = torch.randn(m, k, device="cuda").to(dtype)

    @property
    def kernel(self) -> str:
        """The kernel of ours."""
        return self.layers[0].kernel

    def contenders(self) -> Iterator[tuple[str, bool, Call]]:
        """(name, ours, call) of everyone who can take this problem."""
        count, x = len(self.layers), self.x
        yield "w8a16 layer", True, lambda index: self.layers[index % count].run(x)
        if not triton.available():
            from qkernels.triton.gemm_w8a16 import gemm_w8a16

            def portable(index: int) -> Tensor:
                tensors = self.canonical[index % count]
                return gemm_w8a16(x, tensors["weight"], tensors["weight_scale"])

            yield "w8a16 triton", True, portable
        yield from gemlite_contender(self.scheme, self.canonical[: max(2, count // 2)], x)
        wide = [torch.randn(self.n, self.k, device="cuda").to(torch.bfloat16) for _ in range(max(2, count // 2))]
        x16, out16 = x.to(torch.bfloat16), torch.empty(self.m, self.n, dtype=torch.bfloat16, device="cuda")
        yield "cublas bf16", False, lambda index: torch.mm(x16, wide[index % len(wide)].t(), out=out16)

    def exact(self, call: Call) -> bool:
        """Whether the result over the first weight is the reference's, in the sense of the file's head."""
        result = call(0)
        wanted = reference.linear(self.x, self.canonical[0], self.scheme, self.k, torch.float32)
        return isinstance(result, Tensor) and float((result.float() - wanted).norm()) <= NORM_STEP[self.dtype] * float(
            wanted.norm()
        )
