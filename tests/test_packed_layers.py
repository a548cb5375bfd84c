"""Layers on the packed 4-bit and weight-only kernels, as modules and operators; numerics have their own files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn

from qkernels import _C
from qkernels.nn import QuantLinear
from qkernels.prepared import scheme_key
from qkernels.scheme import Scheme

BOOK = tuple(float(i) - 7.5 for i in range(16))
SCHEMES = {
    "w4a8": Scheme.from_preset("w4a8"),
    "w4a8 integer": Scheme.from_preset("w4a8_intscale"),
    "w4a16": Scheme.from_preset("w4a16"),
    "w8a16": Scheme.from_preset("w8a16"),
    "w4a16 codebook": Scheme.from_preset("w4a16").replace(codebook=BOOK),
    "w4a8 minimum": Scheme.from_preset("w4a8").replace(weight_symmetric=False, weight_zero="float"),
    "w4a16 zero point": Scheme.from_preset("w4a16").replace(weight_symmetric=False, group_size=32),
}


@pytest.fixture(params=SCHEMES)
def layer(request: pytest.FixtureRequest) -> QuantLinear:
    return QuantLinear.from_float(seeded(70, 201), seeded(70), SCHEMES[request.param], inv_smooth=seeded(201).exp())


@pytest.fixture
def x() -> torch.Tensor:
    return seeded(5, 201, seed=3)


def test_packed_layer_names_its_kernel_and_keeps_only_the_packed_form(layer: QuantLinear, x: torch.Tensor) -> None:
    assert layer.kernel.endswith(_C.info()["isa"])
    assert layer.reason == ""
    layer(torch.cat([x] * 4))  # AMX leaves fewer than 16 rows to VNNI
    assert _C.last_kernel().startswith(layer.kernel)
    names = {name for name, tensor in layer._buffers.items() if tensor is not None}
    parts = {"packed", "packed_scale", "packed_zero_point", "packed_min", "packed_multiplier"}
    assert names <= parts | {"bias", "inv_smooth"}


def test_packed_layer_state_dict_is_canonical_and_lossless(layer: QuantLinear, x: torch.Tensor) -> None:
    state = layer.state_dict()
    width = 201 if layer.scheme.weight_bits == 8 else 101
    assert state["weight"].shape == (70, width)
    dtype = torch.float32 if layer.scheme.group_scales == "int" else torch.float16
    other = QuantLinear.empty(201, 70, layer.scheme, inv_smooth=True, group_scale_dtype=dtype)
    other.load_state_dict(state, assign=True)
    assert_bits_equal(other(x), layer(x))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), state[name].reshape(-1).view(torch.uint8)), name


def test_packed_layer_load_overwrites_in_place(layer: QuantLinear, x: torch.Tensor) -> None:
    other = QuantLinear.from_float(
        seeded(70, 201, seed=9), seeded(70, seed=9), layer.scheme, inv_smooth=torch.ones(201)
    )
    before = other(x)
    where = other._buffers["packed"].data_ptr()
    other.load_state_dict(layer.state_dict())
    assert other._buffers["packed"].data_ptr() == where
    assert_bits_equal(other(x), layer(x))
    assert not torch.equal(before, other(x))


def test_packed_layer_copies_pickles_and_moves(layer: QuantLinear, x: torch.Tensor) -> None:
    expected = layer(x)
    assert_bits_equal(copy.deepcopy(layer)(x), expected)
    assert_bits_equal(pickle.loads(pickle.dumps(layer))(x), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert_bits_equal(layer.half()(x), expected)  # scales are never narrowed
    empty = copy.deepcopy(layer).to("meta")
    assert empty(x.to("meta")).shape == (5, 70)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_bits_equal(empty(x), expected)


def test_packed_layer_notices_replaced_tensors(layer: QuantLinear, x: torch.Tensor) -> None:
    layer(x)
    layer.bias = torch.zeros(70)
    without = layer(x)
    layer.bias = None
    assert_bits_equal(layer(x), without + 0.0)
    layer._buffers["packed"] = layer._buffers["packed"].clone()
    assert_bits_equal(layer(x), without + 0.0)


def test_packed_layer_compiles_whole_with_gradient(layer: QuantLinear, x: torch.Tensor) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        assert_bits_equal(compiled(x[:rows]), model(x[:rows]))
    ours = x.clone().requires_grad_()
    layer(ours).sum().backward()
    assert ours.grad is not None
    weight = layer._prepared.weight(torch.float32)
    torch.testing.assert_close(ours.grad, torch.ones(5, 70) @ weight, rtol=1e-5, atol=1e-4)


def test_linear_packed_opcheck(layer: QuantLinear, x: torch.Tensor) -> None:
    tensors = [layer._buffers.get(name) for name in layer._prepared.names]
    torch.library.opcheck(
        torch.ops.qkernels.linear_packed.default, (x, *tensors, scheme_key(layer.scheme), 70, 201, None)
    )


def test_linear_packed_refuses_tensors_of_another_layer(layer: QuantLinear, x: torch.Tensor) -> None:
    tensors = [layer._buffers.get(name) for name in layer._prepared.names]
    with pytest.raises(ValueError, match=r"packed: expected tensors of a \[710, 201\] layer"):
        torch.ops.qkernels.linear_packed(x, *tensors, scheme_key(layer.scheme), 710, 201, None)
    with pytest.raises(ValueError, match="features"):
        layer(x[:, :200])
