"""ONNX Runtime's operators for quantized Linear layers as rivals."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkernels import reference
from qkernels.bench.contenders import FillingContender, signed_codes
from qkernels.scheme import Scheme

_BLOCK = 128  # inputs under one scale, for weights of one scale a channel


@dataclass(frozen=True)
class _Operator:
    """One operator of the domain com.microsoft: its constants by name, its inputs in order ("": left out)."""

    name: str
    constants: dict[str, Tensor]
    inputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


class OnnxRuntime(FillingContender):
    """``DynamicQuantizeMatMul``, what ONNX Runtime's own dynamic quantization fuses a Linear into.

    All sessions share one thread pool: pools of their own would spin against each other.
    """

    name = "onnxruntime"
    scheme = holds = Scheme.resolve("w8a8")

    def operator(self, weight: Tensor) -> _Operator:
        """What multiplies by ``weight`` [N, K] and adds the constant "bias" to the product of "x"."""
        codes, scale = signed_codes(weight, self.scheme)
        zero = torch.zeros(len(weight), dtype=torch.int8)
        constants = {"b": codes.flatten(1).T.contiguous(), "scale": scale.flatten(), "zero": zero}
        return _Operator("DynamicQuantizeMatMul", constants, ["x", "b", "scale", "zero", "bias"])

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        import onnx
        import onnxruntime

        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        n, k = weight.shape
        operator = self.operator(weight)
        node = helper.make_node(operator.name, operator.inputs, ["y"], domain="com.microsoft", **operator.attributes)
        constants = {**operator.constants, "bias": bias}
        kind = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", kind, ["m", k])],
            [helper.make_tensor_value_info("y", kind, ["m", n])],
            [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        _share_threads(torch.get_num_threads())
        options.use_per_session_threads = False
        self.sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(copies)
        ]
        self.outputs = n

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        rows = x.float().contiguous()
        self.x, self.y = rows, torch.empty(rows.shape[0], self.outputs)
        self.calls = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, "float32", tuple(rows.shape), rows.data_ptr())
            binding.bind_output("y", "cpu", 0, "float32", tuple(self.y.shape), self.y.data_ptr())
            self.calls.append(functools.partial(session.run_with_iobinding, binding))


class MatMulNBits(OnnxRuntime):
    """``MatMulNBits``, what ONNX Runtime's weight-only quantizers and its generative models are made of.

    Its accuracy level says what it may round its rows to: 4, int8 by blocks, for schemes of 8-bit inputs; 1, nothing,
    for the others. With 8-bit weights it has no kernel of the latter kind and widens the whole weight in every call.
    """

    def __init__(self, name: str, scheme: Scheme) -> None:
        self.name = name
        self.scheme = self.holds = scheme
        self.bytes_per_weight = scheme.weight_bits / 8

    def operator(self, weight: Tensor) -> _Operator:
        """See the base class."""
        n, k = weight.shape
        bits = self.scheme.weight_bits
        codes, scale = signed_codes(weight, self.scheme)
        if self.scheme.weight_granularity == "per_channel":  # which the operator calls blocks of equal scales
            blocks = -(-k // _BLOCK)
            codes = torch.nn.functional.pad(codes.flatten(1), (0, blocks * _BLOCK - k)).reshape(n, blocks, _BLOCK)
            scale = scale.expand(n, blocks).contiguous()
        attributes = {"K": k, "N": n, "bits": bits, "block_size": codes.shape[2]}
        attributes["accuracy_level"] = 1 if self.scheme.weight_only else 4
        levels = (codes.int() + 2 ** (bits - 1)).to(torch.uint8)  # the zero point where none is given
        constants = {"b": reference.pack_int4(levels) if bits == 4 else levels, "scale": scale}
        return _Operator("MatMulNBits", constants, ["x", "b", "scale", "", "", "bias"], attributes)


@functools.cache
def _share_threads(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
