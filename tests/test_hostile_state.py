"""load_state_dict and values that no layer has: refused by name as load refuses them, and the layer stays as it was."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_bits_equal, seeded
from layers import STATIC_ASYMMETRIC, make
from torch import nn

from qkernels.nn import QuantEmbedding
from qkernels.scheme import Scheme

W4A16 = Scheme.resolve("w4a16")
W4A8 = Scheme.resolve("w4a8")
INT = Scheme.resolve("w4a8_intscale")
W3 = Scheme(3, "per_group", 8, activation_bits=None, weight_symmetric=False)
NO_SCALES = (math.nan, math.inf, -math.inf, 0.0, -1.0)
NOT_FINITE = (math.nan, math.inf, -math.inf)

BAD = [
    *(("w8a8", "weight_scale", value, "positive finite values") for value in NO_SCALES),
    *((W4A16, "weight_scale", value, "positive finite values") for value in NO_SCALES),
    (INT, "weight_scale", -1.0, "positive finite values"),
    *((W4A8.replace(weight_symmetric=False, weight_zero="float"), "weight_min", v, "finite") for v in NOT_FINITE),
    *(("w8a8", "inv_smooth", value, "finite values") for value in NOT_FINITE),
    *((W4A16.replace(weight_symmetric=False), "weight_zero_point", v, "values from 0 to 15") for v in (16, 255)),
    *((W4A8.replace(weight_symmetric=False), "weight_zero_point", v, "values from 0 to 15") for v in (16, 255)),
    (W3, "weight_zero_point", 8, "values from 0 to 7"),
    (INT.replace(weight_symmetric=False), "weight_zero_point", 16, "values from 0 to 15"),
    *((INT, "weight_multiplier", value, "values from 1 to 15") for value in (0, 16)),
    *((STATIC_ASYMMETRIC, "act_scale", v, "finite values > 0 whose reciprocal is finite") for v in (*NO_SCALES, 1e-40)),
    *((STATIC_ASYMMETRIC, "act_zero_point", value, "values from 0 to 255") for value in (-1, 256)),
]
by_bad_value = pytest.mark.parametrize(
    "scheme, name, value, words", BAD, ids=[f"{Scheme.resolve(s).name}-{name}-{v}" for s, name, v, _ in BAD]
)
by_assign = pytest.mark.parametrize("assign", (False, True))


def poked(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy whose last element is that value."""
    poked = tensor.clone()
    poked.view(-1)[-1] = value
    return poked


def refuses(model: nn.Module, state: dict[str, torch.Tensor], match: str, assign: bool) -> None:
    """Loading fails with that message, and no value and no memory of the model changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resident = {name: (tensor, tensor.clone()) for name, tensor in model.named_buffers()}
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, assign=assign)
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name], name)
    for name, tensor in model.named_buffers():
        assert tensor is resident[name][0], name
        assert_bits_equal(tensor, resident[name][1], name)


@by_assign
@by_bad_value
def test_linear_load_of_a_bad_value(scheme: Scheme | str, name: str, value: float, words: str, assign: bool) -> None:
    """All the other tensors are good, and others than the layer's."""
    model, source = (nn.ModuleDict({"fc": make(scheme, seed=seed, smooth=True)}) for seed in (0, 3))
    state = source.state_dict()
    state[f"fc.{name}"] = poked(state[f"fc.{name}"], value)
    refuses(model, state, rf"fc\.{name}: expected {words}.*, got", assign)
    model.load_state_dict(source.state_dict(), assign=assign)


@by_assign
@pytest.mark.parametrize("dtype", (torch.float32, torch.int32, torch.int8))
def test_linear_load_of_zero_points_that_are_no_bytes(dtype: torch.dtype, assign: bool) -> None:
    model = make(W4A8.replace(weight_symmetric=False))
    state = make(model.scheme, seed=3).state_dict()
    state["weight_zero_point"] = state["weight_zero_point"].to(dtype)
    refuses(model, state, f"weight_zero_point: expected dtype torch.uint8, got {dtype}", assign)


@by_assign
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("value", NO_SCALES)
def test_embedding_load_of_a_bad_scale(value: float, shared: bool, assign: bool) -> None:
    """Alone, and under a head that reads the same table."""
    table, source = (QuantEmbedding.from_embedding(nn.Embedding.from_pretrained(seeded(9, 70, seed=s))) for s in (0, 3))
    model = nn.ModuleDict({"table": table, **({"head": table.shared_head()} if shared else {})})
    state = {f"{name}.{key}": tensor for name in model for key, tensor in source.state_dict().items()}
    bad = {name: poked(tensor, value) if name.endswith("weight_scale") else tensor for name, tensor in state.items()}
    refuses(model, bad, r"table\.weight_scale: expected positive finite values, got", assign)
    model.load_state_dict(state, assign=assign)


@by_assign
def test_load_of_tensors_that_are_not_dense(assign: bool) -> None:
    layer = make()
    state = make(seed=3).state_dict()
    state["weight_scale"] = state["weight_scale"].to_sparse()
    refuses(layer, state, r"weight_scale: expected a dense \(strided\) tensor, got layout torch.sparse_coo", assign)


@pytest.mark.parametrize("name", ("weight", "weight_scale"))
def test_load_of_one_meta_tensor_changes_nothing(name: str) -> None:
    layer = make()
    state = make(seed=3).state_dict()
    state[name] = state[name].to("meta")
    refuses(layer, state, f"{name}: expected values, got a meta tensor", assign=False)


def test_load_takes_values_at_the_edges() -> None:
    smallest, largest = torch.finfo(torch.float32).smallest_normal / 4, torch.finfo(torch.float32).max
    for scheme, name, values in (
        ("w8a8", "weight_scale", (smallest, largest)),
        ("w8a8", "inv_smooth", (-largest, 0.0)),
        (W4A8.replace(weight_symmetric=False), "weight_zero_point", (0, 15)),
        (W4A16.replace(weight_symmetric=False, weight_zero="float"), "weight_min", (-60000.0, 60000.0)),
        (INT, "weight_multiplier", (1, 15)),
        (STATIC_ASYMMETRIC, "act_zero_point", (0, 255)),
    ):
        layer = make(scheme, smooth=True)
        for value in values:
            state = layer.state_dict()
            state[name] = poked(state[name], value)
            layer.load_state_dict(state)
            assert_bits_equal(layer.state_dict()[name], state[name], name)
