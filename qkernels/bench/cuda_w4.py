"""What ``qkernels bench --device cuda --schemes w4a16 w4a8 w4a8_intscale`` times: 4-bit weights on a GPU, in groups of
128.

    w4a16 layer        floating-point activations in and out
    w4a16 triton       the portable kernel
    w4a8 layer         quantize and gemm from floating-point activations; so w4a8_intscale
    w4a8 gemm          int8 activations to scaled output
    w4a8 triton        the portable kernel, likewise
    cublas bf16        torch.mm in bfloat16, its weights cold too
    humming            Humming's layer of the same bits and groups, where humming-kernels is installed (bf16 and fp16)
    gemlite            GemLite over the same codes, W4A16, where it is installed (bf16 and fp16)

Everybody's weights are normal: where operations limit, so does power, and equally likely codes cost more of it (8192 x
8192 at 4096 rows on an H200: 812 us, 790 with normal ones).

W4A16 is timed once its distance from the float32 reference is below half a step of the output; W4A8 once it has the
reference's bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qkernels import cuda, cuda_w4, reference, triton
from qkernels.bench.cuda_gemlite import gemlite_contender
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.scheme import Scheme

__all__ = ["ProblemW4"]

NORM_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-18}
"""Of the norm of the output, how far W4A16 may be off."""


class ProblemW4:
    """The operands of one shape and number of rows; copies of the weight fill ``cold_bytes``."""

    def __init__(self, name: str, k: int, n: int, m: int, cold_bytes: int, dtype: torch.dtype) -> None:
        self.scheme = Scheme.from_preset(name)
        self.name, self.k, self.n, self.m, self.dtype = name, k, n, m, dtype
        count = max(2, min(64, -(-2 * cold_bytes // (n * k))))
        self.canonical = []
        for _ in range(count):
            self.canonical.append(reference.quantize_weight(torch.randn(n, k, device="cuda"), self.scheme))
        self.layers = [PreparedCudaW4.from_canonical(t, self.scheme, k) for t in self.canonical]
        self.x = torch.randn(m, k, device="cuda").to(dtype)

    @property
    def kernel(self) -> str:
        """The kernel of ours."""
        return self.layers[0].kernel

    def contenders(self) -> Iterator[tuple[str, bool, Callable[[int], object]]]:
        """(name, ours, call) of everyone who can take this problem."""
        count, x = len(self.layers), self.x
        yield f"{self.name} layer", True, lambda index: self.layers[index % count].run(x)
        if not self.scheme.weight_only:
            q, scale, _ = cuda.quantize_rows(x)
            weights = [cuda_w4.describe(layer.tensors, self.scheme, self.n, self.k) for layer in self.layers]
            yield (
                f"{self.name} gemm",
                True,
                lambda index: cuda_w4.gemm_w4a8(q, scale, weights[index % count], None, self.dtype),
            )
            yield from self._portable_w4a8(q, scale)
        elif not triton.available():
            from qkernels.triton.gemm_w4a16 import gemm_w4a16

            group = self.scheme.resolve_group_size(self.k)

            def portable(index: int) -> Tensor:
                tensors = self.canonical[index % count]
                return gemm_w4a16(x, tensors["weight"], tensors["weight_scale"], group_size=group)

            yield "w4a16 triton", True, portable
            yield from gemlite_contender(self.scheme, self.canonical, x)
        wide = [torch.randn(self.n, self.k, device="cuda").to(torch.bfloat16) for _ in range(max(2, count // 4))]
        if self.dtype != torch.float32 and importlib.util.find_spec("humming") is not None:
            yield "humming", False, self._humming(max(2, count))
        x16, out16 = x.to(torch.bfloat16), torch.empty(self.m, self.n, dtype=torch.bfloat16, device="cuda")
        yield "cublas bf16", False, lambda index: torch.mm(x16, wide[index % len(wide)].t(), out=out16)

    def _humming(self, count: int) -> Callable[[int], object]:
        from humming.layer import HummingLayer

        layers = []
        for _ in range(count):
            layer = HummingLayer(
                shape_n=self.n,
                shape_k=self.k,
                weight_config={"dtype": "int4", "group_size": self.scheme.resolve_group_size(self.k)},
                input_config=None if self.scheme.weight_only else {"dtype": "int8"},
                torch_dtype=self.dtype,
            ).cuda()
            layer.load_from_unquantized(torch.randn(self.n, self.k, device="cuda", dtype=self.dtype))
            layer.transform()
            layers.append(layer)
        return lambda index: layers[index % count](self.x)

    def _portable_w4a8(self, q: Tensor, scale: Tensor) -> Iterator[tuple[str, bool, Callable[[int], object]]]:
        if not triton.available():
            from qkernels.triton.gemm_w4a8 import gemm_w4a8

            group, dtype = self.scheme.resolve_group_size(self.k), self.dtype

            def portable(index: int) -> Tensor:
                t = self.canonical[index % len(self.canonical)]
                return gemm_w4a8(
                    q,
                    scale,
                    None,
                    t["weight"],
                    t["weight_scale"],
                    group_size=group,
                    weight_multiplier=t.get("weight_multiplier"),
                    out_dtype=dtype,
                )

            yield f"{self.name} triton", True, portable

    def exact(self, call: Callable[[int], object]) -> bool:
        """Whether the result over the first weight is the reference's, in the sense of the file's head."""
        result = call(0)
        if not isinstance(result, Tensor):
            return False
        if not self.scheme.weight_only:
            wanted = reference.linear(self.x, self.canonical[0], self.scheme, self.k)
            bits = torch.int32 if self.dtype == torch.float32 else torch.int16
            return torch.equal(result.view(bits), wanted.view(bits))
        wanted = reference.linear(self.x, self.canonical[0], self.scheme, self.k, torch.float32)
        return float((result.float() - wanted).norm()) <= NORM_STEP[self.dtype] * float(wanted.norm())
