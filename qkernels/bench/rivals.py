"""Other implementations, each used as its own documentation says; those that are not installed are left out.

All of them get fp32 rows (``bf16`` bf16 ones) and quantize them inside the timed call, as ours do.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.bench.contenders import Contender, LocalContender
from qkernels.bench.timing import Sampler


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


class OnnxRuntime(LocalContender):
    """``DynamicQuantizeMatMul``, what ONNX Runtime's own dynamic quantization fuses a Linear into.

    All sessions share one thread pool: pools of their own would spin against each other.
    """

    name = "onnxruntime"

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        import onnx
        import onnxruntime

        scale = weight.abs().amax(1) / 127
        levels = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        n, k = weight.shape
        constants = {"b": levels.T.contiguous(), "scale": scale, "zero": torch.zeros(n, dtype=torch.int8), "bias": bias}
        node = helper.make_node(
            "DynamicQuantizeMatMul", ["x", "b", "scale", "zero", "bias"], ["y"], domain="com.microsoft"
        )
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
        _share_onnxruntime_threads(torch.get_num_threads())
        options.use_per_session_threads = False
        self.sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(copies)
        ]
        self.shape = (n, k)

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        rows = x.float().contiguous()
        self.x, self.y = rows, torch.empty(rows.shape[0], self.shape[0])
        self.calls = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, "float32", tuple(rows.shape), rows.data_ptr())
            binding.bind_output("y", "cpu", 0, "float32", tuple(self.y.shape), self.y.data_ptr())
            self.calls.append(functools.partial(session.run_with_iobinding, binding))

    def output(self) -> Tensor:
        """See the base class."""
        self.calls[0]()
        return self.y


@functools.cache
def _share_onnxruntime_threads(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


class OpenVino(LocalContender):
    """A compressed int8 MatMul; the CPU plug-in quantizes the activations dynamically, one scale a row."""

    name = "openvino"
    most_copies = 128  # compiling one takes tens of milliseconds

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        import numpy
        import openvino
        from openvino import opset13 as ops

        scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        levels = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
        n, k = weight.shape
        x = ops.parameter([-1, k], numpy.float32, name="x")
        widened = ops.convert(ops.constant(levels.numpy()), "f32")
        scaled = ops.multiply(widened, ops.constant(scale[:, None].numpy()))
        y = ops.add(ops.matmul(x, scaled, False, True), ops.constant(bias[None].numpy()))
        model = openvino.Model([y], [x], "linear")
        options = {
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(2**64 - 1),
            "ENABLE_CPU_PINNING": "NO",
        }
        core = openvino.Core()
        self.requests = [core.compile_model(model, "CPU", options).create_infer_request() for _ in range(copies)]
        self.outputs = n

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        import openvino

        self.x = x.float().contiguous()
        self.y = torch.empty(x.shape[0], self.outputs)
        for request in self.requests:
            request.set_input_tensor(openvino.Tensor(self.x.numpy(), shared_memory=True))
            request.set_output_tensor(openvino.Tensor(self.y.numpy(), shared_memory=True))
        self.calls = [request.infer for request in self.requests]

    def output(self) -> Tensor:
        """See the base class."""
        self.calls[0]()
        return self.y


class Zentorch(Contender):
    """zentorch's dynamic int8 Linear, in a process of another interpreter: it changes the torch it is loaded into.

    Args:
        python: the interpreter of an environment that has it.
    """

    name = "zentorch"

    def __init__(self, python: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        worker = Path(__file__).with_name("zentorch_worker.py")
        self.process = subprocess.Popen(
            [str(python), str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask(command="start", threads=torch.get_num_threads())

    def _ask(self, **request: Any) -> Any:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("zentorch: the worker has no pipes")
        _signal(self.process, "SIGCONT")
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("zentorch: the worker ended; its message is above")
        result = json.loads(answer)
        if "error" in result:
            raise RuntimeError(f"zentorch: {result['error']}")
        return result.get("result")

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        path = Path(self.folder.name) / "weight.pt"
        torch.save({"weight": weight, "bias": bias}, path)
        self._ask(command="build", path=str(path), copies=copies)

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        path = Path(self.folder.name) / "x.pt"
        torch.save(x.float(), path)
        self._ask(command="bind", path=str(path))

    def output(self) -> Tensor:
        """See the base class."""
        path = Path(self.folder.name) / "y.pt"
        self._ask(command="output", path=str(path))
        return torch.load(path, weights_only=True)

    def sampler(self, *, cold: bool) -> Sampler:
        """See the base class."""
        return _Remote(self.process, functools.partial(self._ask, command="sample", cold=cold))

    def close(self) -> None:
        """End the worker."""
        _signal(self.process, "SIGCONT")
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.cleanup()


class _Remote:
    """A sampler whose clock is in the worker, which is held still between its turns: its threads spin for 200 ms."""

    def __init__(self, process: subprocess.Popen[str], ask: Callable[..., Any]) -> None:
        self.process = process
        self.ask = ask

    def sample(self, count: int) -> float:
        """Seconds of ``count`` calls."""
        try:
            return float(self.ask(count=count))
        finally:
            _signal(self.process, "SIGSTOP")


def _signal(process: subprocess.Popen[str], name: str) -> None:
    number = getattr(signal, name, None)  # not on every system
    if number is not None and process.poll() is None:
        process.send_signal(number)


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def rivals(wanted: Sequence[str] | None, zentorch_python: Path | None) -> tuple[list[Contender], dict[str, str]]:
    """The rivals wanted (None: all that are installed), and why each of the others is left out."""
    engines = torch.backends.quantized.supported_engines
    makers: dict[str, tuple[bool, str, Callable[[], Contender]]] = {
        "fp32": (True, "", lambda: TorchLinear("fp32", torch.float32)),
        "bf16": (True, "", lambda: TorchLinear("bf16", torch.bfloat16)),
        "onnxruntime": (_has("onnx", "onnxruntime"), "not installed", OnnxRuntime),
        "openvino": (_has("openvino"), "not installed", OpenVino),
    }
    for engine in ("x86", "onednn"):
        name = f"quantize_dynamic-{engine}"
        maker = functools.partial(QuantizeDynamic, name, engine)
        makers[name] = (engine in engines, "this torch lacks the engine", maker)
    chosen: list[Contender] = []
    missing: dict[str, str] = {}
    for name, (there, reason, make) in makers.items():
        if wanted is not None and name not in wanted:
            continue
        if there:
            chosen.append(make())
        else:
            missing[name] = reason
    if wanted is None or "zentorch" in wanted:
        if zentorch_python is not None:
            chosen.append(Zentorch(zentorch_python))
        else:
            missing["zentorch"] = "no --zentorch-python"
    return chosen, missing
