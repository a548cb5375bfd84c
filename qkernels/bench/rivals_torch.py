"""torch's own Linear layers as rivals: floating point, dynamic int8, and products with 8-bit and 4-bit weights."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from qkernels.bench.contenders import LocalContender, signed_codes
from qkernels.scheme import Scheme


class TorchLinear(LocalContender):
    """``nn.Linear`` in fp32 or bf16."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self.bytes_per_weight = float(dtype.itemsize)

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        self.weights = [weight.to(self.dtype, copy=True) for _ in range(copies)]
        self.bias = bias.to(self.dtype)

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        x = x.to(self.dtype)
        linear = torch.nn.functional.linear
        self.calls = [functools.partial(linear, x, weight, self.bias) for weight in self.weights]


class QuantizeDynamic(LocalContender):
    """``torch.ao.quantization.quantize_dynamic`` with one of torch's engines."""

    def __init__(self, name: str, engine: str) -> None:
        self.name = name
        self.engine = engine

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        n, k = weight.shape
        linear = torch.nn.Linear(k, n)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        before = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = self.engine
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.modules = [
                    torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})[0]
                    for _ in range(copies)
                ]
        finally:
            torch.backends.quantized.engine = before

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        self.calls = [functools.partial(module, x.float()) for module in self.modules]


class Int8Pack(LocalContender):
    """``_weight_int8pack_mm``, what int8 weight-only quantization calls; bf16 rows: fp32 ones meet scalar code."""

    name = "int8pack"
    scheme = holds = Scheme.resolve("w8a16")

    def refuses(self, k: int, n: int) -> str | None:
        """Its vectors of 16 have no tail: it reads past the end and returns garbage."""
        return "K must be a multiple of 16" if k % 16 else None

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        codes, scale = signed_codes(weight, self.scheme)
        self.weights = [codes.flatten(1).clone() for _ in range(copies)]
        self.scale = scale.flatten().bfloat16()
        self.bias = bias.bfloat16()

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        x = x.bfloat16()
        self.calls = [functools.partial(self._linear, x, weight) for weight in self.weights]

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, weight, self.scale).add_(self.bias)


class Int4Pack(LocalContender):
    """``_weight_int4pack_mm_for_cpu``, what torchao's int4 weight-only quantization calls on CPUs.

    bf16 rows: for fp32 ones torch has scalar code only. Its weights are ``(q - 8) * scale + offset``; the offset is 0.
    """

    name = "int4pack"
    scheme = holds = Scheme.resolve("w4a16")
    bytes_per_weight = 0.5

    def refuses(self, k: int, n: int) -> str | None:
        """It has no tails."""
        group = self.scheme.resolve_group_size(k)
        return f"N must be a multiple of 16 and K of the group, {group}" if n % 16 or k % group else None

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        codes, scale = signed_codes(weight, self.scheme)
        levels = codes.flatten(1).int() + 8
        tiles = 1  # only other devices have a use for it
        self.weights = [torch._convert_weight_to_int4pack_for_cpu(levels, tiles) for _ in range(copies)]
        scale_and_offset = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16()
        self.scales = [scale_and_offset.clone() for _ in range(copies)]
        self.group = codes.shape[2]
        self.bias = bias.bfloat16()

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        x = x.bfloat16()
        weights = zip(self.weights, self.scales, strict=True)
        self.calls = [functools.partial(self._linear, x, weight, scales) for weight, scales in weights]

    def _linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, weight, self.group, scales).add_(self.bias)
