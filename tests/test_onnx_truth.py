"""Outside truth: ONNX's own node tests and its reference evaluator, for the operators that mean the same.

QuantizeLinear divides by the scale and this package multiplies by its reciprocal: they agree on ONNX's own cases and
wherever the scale is a power of two.  DynamicQuantizeLinear forms (max - min) / 255 in one piece: scales agree within
one unit in the last place, and codes wherever x / scale is no tie to that accuracy.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_bits_equal, seeded

from qkernels import reference
from qkernels.qtensor import QTensor, dequantize, quantize

onnx = pytest.importorskip("onnx", reason="ONNX's node tests come with the package onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

OURS = {"uint8": (8, False, 0), "int8": (8, True, 0), "uint4": (4, False, 0), "int4": (4, False, 8)}
"""ONNX's dtype -> bits, signed, and what is added to its codes to get ours (int4 is stored from 0)."""


def _collect() -> dict[str, dict[str, tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]]]:
    """Operator -> name -> (attributes, inputs, outputs).

    Importing one of ONNX's case modules hands every case to ``expect``; only the four of interest are imported, because
    the package's own collector builds the cases of every operator there is.
    """
    from onnx.backend.test.case import node as cases

    found: dict[str, dict[str, tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]]] = {}

    def record(node: Any, inputs: Any, outputs: Any, name: str, **_: Any) -> None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found.setdefault(node.op_type, {})[name] = (
            attributes,
            [_array(value) for value in inputs],
            [_array(value) for value in outputs],
        )

    original, cases.expect = cases.expect, record
    try:
        for module in ("quantizelinear", "dequantizelinear", "dynamicquantizelinear", "matmulinteger"):
            importlib.import_module(f"{cases.__name__}.{module}")
    finally:
        cases.expect = original
    return found


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _where(codes: np.ndarray, scale: np.ndarray, attributes: dict[str, Any]) -> dict[str, Any]:
    """Granularity that fits ONNX's scale."""
    axis = attributes.get("axis", 1)
    if attributes.get("block_size"):
        return {"granularity": "group", "axis": axis, "group_size": attributes["block_size"]}
    if scale.size == 1:
        return {"granularity": "tensor"}
    return {"granularity": "channel", "axis": axis}


CASES = _collect()


def _matching(op: str, dtype_of: int) -> list[Any]:
    """Cases of ``op`` whose codes have a dtype of ours (``dtype_of``: 0 they are the input, 1 the output)."""
    return [
        pytest.param(attributes, inputs, outputs, id=name)
        for name, (attributes, inputs, outputs) in sorted(CASES.get(op, {}).items())
        if (inputs, outputs)[dtype_of][0].dtype.name in OURS
    ]


@pytest.mark.parametrize("attributes, inputs, outputs", _matching("QuantizeLinear", 1))
@pytest.mark.parametrize("call", ["kernels", "reference"])
def test_quantize_onnx_node_tests(call: str, attributes: dict[str, Any], inputs: list, outputs: list) -> None:
    x, scale = torch.from_numpy(inputs[0]), torch.from_numpy(np.atleast_1d(inputs[1]).copy())
    bits, signed, shift = OURS[outputs[0].dtype.name]
    where = _where(outputs[0], inputs[1], attributes)
    zero = torch.from_numpy(np.atleast_1d(inputs[2]).astype(np.int32)) + shift
    if where["granularity"] == "tensor":
        scale, zero = scale.reshape(()), zero.reshape(())
    arguments = {"bits": bits, "signed": signed, "symmetric": False, **where}
    if call == "kernels":
        q = quantize(x, **arguments, scale=scale, zero_point=zero)
    else:
        q = QTensor(*reference.quantize(x, **arguments, scale=scale, zero_point=zero), tuple(x.shape), **arguments)
    np.testing.assert_array_equal(q.codes().numpy() - shift, outputs[0].astype(np.int32))


@pytest.mark.parametrize("attributes, inputs, outputs", _matching("DequantizeLinear", 0))
def test_dequantize_onnx_node_tests(attributes: dict[str, Any], inputs: list, outputs: list) -> None:
    bits, signed, shift = OURS[inputs[0].dtype.name]
    where = _where(inputs[0], inputs[1], attributes)
    scale = torch.from_numpy(np.array(inputs[1], np.float32))
    zero = torch.from_numpy(np.array(inputs[2]).astype(np.int32)) + shift
    if where["granularity"] == "tensor":
        scale, zero = scale.reshape(()), zero.reshape(())
    codes = torch.from_numpy(inputs[0].astype(np.int32)) + shift
    data = reference.pack_int4(codes.to(torch.uint8)) if bits == 4 else codes.to(torch.int8 if signed else torch.uint8)
    q = QTensor(data, scale, zero, tuple(codes.shape), bits=bits, signed=signed, symmetric=False, **where)
    assert_bits_equal(dequantize(q), torch.from_numpy(np.array(outputs[0], np.float32)))


def _assert_same_but_for_ties(
    q: QTensor, x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> None:
    np.testing.assert_allclose(q.scale.numpy(), scale, rtol=2.0**-23)
    assert q.zero_point is not None
    assert q.zero_point.item() == int(zero)
    apart = np.abs(q.data.numpy().astype(int) - codes.astype(int))
    # One unit in the last place of the scale moves x / scale <= 255 by 255 * 2**-23 at most, the division and the
    # product round by half of 128 * 2**-23 each.
    fraction = np.abs(x.astype(np.float64) / float(scale)) % 1
    assert (apart <= (np.abs(fraction - 0.5) < 512 * 2.0**-23)).all()


@pytest.mark.parametrize("attributes, inputs, outputs", _matching("DynamicQuantizeLinear", 1))
def test_quantize_dynamic_onnx_node_tests(attributes: dict[str, Any], inputs: list, outputs: list) -> None:
    q = quantize(torch.from_numpy(inputs[0]), signed=False, symmetric=False, granularity="tensor")
    _assert_same_but_for_ties(q, inputs[0], *outputs)


@pytest.mark.parametrize("attributes, inputs, outputs", _matching("MatMulInteger", 0))
def test_linear_onnx_matmul_integer_node_tests(attributes: dict[str, Any], inputs: list, outputs: list) -> None:
    a, b, a_zero, b_zero = inputs
    assert b.max() <= 127, "as int8 weights"
    assert b_zero.item() == 0
    assert_bits_equal(_matmul_integer(a, a_zero.item(), b.astype(np.int8)), torch.from_numpy(outputs[0]).float())


def _matmul_integer(a: np.ndarray, a_zero: int, b: np.ndarray) -> torch.Tensor:
    rows, weight = torch.from_numpy(a), torch.from_numpy(b.T.copy())
    zeros = torch.full((len(rows),), a_zero, dtype=torch.int32)
    return reference.linear_w8a8_prequantized(rows, torch.ones(len(rows)), zeros, weight, torch.ones(len(weight)))


def test_onnx_node_tests_are_there() -> None:
    # A change of names or types in the package must not turn the tests above into nothing.
    counts = {op: len(_matching(op, which)) for op, which in [("QuantizeLinear", 1), ("DequantizeLinear", 0)]}
    counts |= {op: len(_matching(op, which)) for op, which in [("DynamicQuantizeLinear", 1), ("MatMulInteger", 0)]}
    assert counts["QuantizeLinear"] >= 5
    assert counts["DequantizeLinear"] >= 5
    assert counts["DynamicQuantizeLinear"] >= 3
    assert counts["MatMulInteger"] >= 1


# -- the evaluator, on inputs of our own ------------------------------------------------------------------------


def _evaluate(op: str, *inputs: np.ndarray, **attributes: Any) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    names = [f"x{i}" for i in range(len(inputs))]
    outs = ["y", "scale", "zero"] if op == "DynamicQuantizeLinear" else ["y"]
    node = onnx.helper.make_node(op, names, outs, **attributes)
    typed = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True)
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in outs]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], op, typed, ends))
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("exponent", [-7, 0, 3])
def test_quantize_onnx_evaluator_powers_of_two(dtype: Any, exponent: int) -> None:
    info = np.iinfo(dtype)
    scale, zero = np.float32(2.0**exponent), dtype(info.min + 100)
    # Halves included: ties, and values beyond both ends.
    x = (np.arange(-700, 700, dtype=np.float32) * 0.5) * scale
    (expected,) = _evaluate("QuantizeLinear", x, scale, zero)
    q = quantize(
        torch.from_numpy(x),
        signed=dtype is np.int8,
        symmetric=False,
        granularity="tensor",
        scale=float(scale),
        zero_point=int(zero),
    )
    np.testing.assert_array_equal(q.data.numpy(), expected)
    (back,) = _evaluate("DequantizeLinear", expected, scale, zero)
    assert_bits_equal(q.dequantize(), torch.from_numpy(back))


def test_dequantize_onnx_evaluator_any_scale() -> None:
    codes = seeded(6, 50, scale=60).round().clamp(-128, 127).to(torch.int8)
    scale, zero = seeded(6).abs() + 1e-3, torch.arange(6, dtype=torch.int32) * 20 - 60
    q = QTensor(codes, scale, zero, (6, 50), granularity="channel", axis=0, symmetric=False)
    (expected,) = _evaluate("DequantizeLinear", codes.numpy(), scale.numpy(), zero.numpy().astype(np.int8), axis=0)
    assert_bits_equal(q.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("seed", range(5))
def test_quantize_dynamic_onnx_evaluator(seed: int) -> None:
    x = seeded(40, 30, seed=seed, scale=10.0 ** (seed - 2))
    codes, scale, zero = _evaluate("DynamicQuantizeLinear", x.numpy())
    q = quantize(x, signed=False, symmetric=False, granularity="tensor")
    _assert_same_but_for_ties(q, x.numpy(), codes, scale, zero)


@pytest.mark.parametrize("k", [1, 33, 300])
def test_linear_onnx_evaluator_matmul_integer(k: int) -> None:
    rng = np.random.default_rng(k)
    a = rng.integers(0, 256, (5, k), dtype=np.uint8)
    b = rng.integers(-128, 128, (k, 7), dtype=np.int8)
    (expected,) = _evaluate("MatMulInteger", a, b, np.array(131, np.uint8), np.array(0, np.int8))
    assert_bits_equal(_matmul_integer(a, 131, b), torch.from_numpy(expected).float())
