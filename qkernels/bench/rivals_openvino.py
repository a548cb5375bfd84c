"""OpenVINO's MatMul over compressed weights as rivals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import reference
from qkernels.bench.contenders import FillingContender, signed_codes
from qkernels.scheme import Scheme

_GROUPS = (128, 64, 32)  # inputs under one scale that its documentation recommends, the fastest first


class OpenVino(FillingContender):
    """A MatMul whose constant weight is converted, scaled (and reshaped) as its own weight compression writes it.

    8 bits with a scale a channel, or 4 with one a group. For schemes of 8-bit inputs the CPU plug-in quantizes the rows
    dynamically, where there is VNNI, by groups: those of the weight, or of 128. A group longer than the row leaves them
    in fp32, the largest number there is as well, although that means a scale a row elsewhere.
    """

    most_copies = 128  # compiling one takes tens of milliseconds

    def __init__(self, name: str, scheme: Scheme) -> None:
        self.name = name
        self.scheme = self.holds = scheme
        self.bytes_per_weight = scheme.weight_bits / 8

    def refuses(self, k: int, n: int) -> str | None:
        """Groups are an axis of its constants."""
        group = self.scheme.resolve_group_size(k)
        return f"K must be a multiple of the group, {group}" if k % group else None

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        import numpy
        import openvino
        from openvino import opset13 as ops

        n, k = weight.shape
        x = ops.parameter([-1, k], numpy.float32, name="x")
        y = ops.add(ops.matmul(x, self._weight(weight), False, True), ops.constant(bias[None].numpy()))
        model = openvino.Model([y], [x], "linear")
        options = {
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self._dynamic_group(k)),
            "ENABLE_CPU_PINNING": "NO",
        }
        core = openvino.Core()
        self.requests = [core.compile_model(model, "CPU", options).create_infer_request() for _ in range(copies)]
        self.outputs = n

    def _weight(self, weight: Tensor) -> Any:
        """The node that stands for ``weight`` [N, K]."""
        import openvino
        from openvino import opset13 as ops

        codes, scale = signed_codes(weight, self.scheme)
        if self.scheme.weight_bits == 8:
            return ops.multiply(ops.convert(ops.constant(codes.flatten(1).numpy()), "f32"), ops.constant(scale.numpy()))
        nibbles = openvino.Tensor(openvino.Type.i4, openvino.Shape(codes.shape))
        nibbles.data.reshape(-1)[:] = reference.pack_int4((codes & 15).to(torch.uint8)).flatten().numpy()
        widened = ops.convert(openvino.op.Constant(nibbles), "f32")
        scaled = ops.multiply(widened, ops.constant(scale[..., None].numpy()))
        return ops.reshape(scaled, list(weight.shape), False)

    def _dynamic_group(self, k: int) -> int:
        """Inputs under one scale; 0: they stay as they are."""
        if self.scheme.weight_only:
            return 0
        if self.scheme.weight_granularity == "per_group":
            return self.scheme.resolve_group_size(k)
        return next((size for size in _GROUPS if size <= k), _GROUPS[-1])

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        import openvino

        self.x = x.float().contiguous()
        self.y = torch.empty(x.shape[0], self.outputs)
        for request in self.requests:
            request.set_input_tensor(openvino.Tensor(self.x.numpy(), shared_memory=True))
            request.set_output_tensor(openvino.Tensor(self.y.numpy(), shared_memory=True))
        self.calls = [request.infer for request in self.requests]
