"""QuantLinear and QuantEmbedding as modules: state, copies, moves, the float view, shared tables."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import helpers as H
import pytest
import torch
from layers import K, N, by_scheme, make, same
from torch import Tensor, nn

from qkernels import _C, reference
from qkernels.nn import QuantLinear

# -- calls ------------------------------------------------------------------------------------------------------------


@by_scheme
def test_linear_from_linear_and_back(scheme):
    linear = nn.Linear(K, N).eval()
    layer = QuantLinear.from_linear(linear, scheme, **H.static_grid(scheme, 0.02, 9))
    assert not layer.training
    assert (layer.in_features, layer.out_features, layer.scheme) == (K, N, scheme)
    assert torch.equal(layer.bias, linear.bias)
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert not back.training
    assert isinstance(back.weight, nn.Parameter)
    H.assert_bits_equal(back.weight.detach(), layer.weight.clone())
    tolerance = 0.6 / (2 ** (scheme.weight_bits - 1) - 1)  # half a step of the largest weight, with room
    assert (back.weight - linear.weight).abs().max() <= tolerance * linear.weight.abs().max()
    x = H.seeded(3, K)
    expected = reference.linear(x, layer.canonical(), scheme, K)
    if scheme.weight_only:  # fp32 sums in another order; their own tests derive the bound
        torch.testing.assert_close(layer(input=x), expected, rtol=1e-5, atol=1e-5)
    else:
        H.assert_bits_equal(layer(input=x), expected)


def test_linear_from_float_errors():
    for weight, error, word in (
        (torch.full((2, 3), float("nan")), ValueError, "finite"),
        (torch.full((2, 3), float("inf")), ValueError, "finite"),
        (torch.empty(2, 3, device="meta"), ValueError, "meta"),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(6), ValueError, "two|dimension|2"),
    ):
        with pytest.raises(error, match=word):
            QuantLinear.from_float(weight)
    with pytest.raises(ValueError, match="act_scale"):
        QuantLinear.from_float(torch.zeros(2, 3), None, "w8a8_static")
    with pytest.raises(ValueError, match="out_features"):
        QuantLinear(K, N + 1, make().canonical(), "w8a8")
    with pytest.raises(TypeError, match="dtype"):
        QuantLinear(K, N, make().canonical(), "w8a8", dtype=torch.int8)


def test_linear_repr_names_scheme_and_kernel(isa):
    text = repr(make())
    assert f"in_features={K}, out_features={N}, bias=True, scheme=w8a8, kernel=w8a8.{isa}" in text


def test_linear_hooks_and_wrappers():
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.a = nn.Linear(K, 4, bias=False)
            self.b = nn.Linear(4, N, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(nn.Linear(K, K), Adapter(make()))
    seen = []
    model[1].base.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    x = H.seeded(5, K)
    model(x).square().sum().backward()
    assert seen == [(5, N)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p is not model[1].b.weight)
    assert not list(model[1].base.parameters())


# -- the float view ---------------------------------------------------------------------------------------------------


@by_scheme
def test_weight_is_a_cheap_read_only_view(scheme, monkeypatch):
    layer = make(scheme, smooth=True)
    expected = reference.dequantize_weight(layer.canonical(), scheme, K) * torch.linspace(0.5, 2.0, K)
    H.assert_bits_equal(layer.weight.clone(), expected)
    H.assert_bits_equal(layer.weight[3:5, ::2], expected[3:5, ::2])
    assert torch.equal(torch.from_numpy(layer.weight.numpy()), expected)
    assert type(layer.weight.data) is Tensor
    assert type(layer.weight + 1) is Tensor
    assert layer.weight.float().equal(expected)
    torch.testing.assert_close(nn.functional.linear(H.seeded(2, K), layer.weight), H.seeded(2, K) @ expected.T)
    H.assert_bits_equal(torch.load(_saved(layer.weight)), expected)
    H.assert_bits_equal(copy.deepcopy(layer.weight), expected)

    built = []
    monkeypatch.setattr(layer, "_build_weight", lambda dtype: built.append(dtype), raising=False)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.float32, (N, K), "cpu")
    assert (weight.ndim, weight.numel(), weight.size(0), len(weight), weight.dim()) == (2, N * K, N, N, 2)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert not weight.is_cuda
    assert not built, "metadata built the weight"


def test_weight_cannot_be_written():
    layer = make()
    before = layer(H.seeded(3, K))
    for value in (torch.zeros(N, K), nn.Parameter(torch.zeros(N, K)), None):
        with pytest.raises(AttributeError, match="weight: read-only"):
            layer.weight = value
    for write in (
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(N, K)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1.0),
        lambda w: nn.init.normal_(w),
        lambda w: setattr(w, "data", torch.zeros(N, K)),
        lambda w: w.requires_grad_(True),
    ):
        with pytest.raises(RuntimeError, match="weight: read-only"), torch.no_grad():
            write(layer.weight)
    assert layer.weight.requires_grad_(False) is not None
    H.assert_bits_equal(layer(H.seeded(3, K)), before)


def test_bias_is_a_tensor_that_can_be_replaced():
    layer = make()
    x = H.seeded(3, K)
    layer(x)
    layer.bias = nn.Parameter(torch.ones(N, dtype=torch.bfloat16))
    H.assert_bits_equal(layer.bias, torch.ones(N))
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    layer.bias.fill_(3.0)
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    layer.bias = None
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    layer.bias = torch.zeros(N)
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    with pytest.raises(ValueError, match="bias: expected shape"):
        layer.bias = torch.zeros(N + 1)
    assert make(bias=False).bias is None


# -- state dict -------------------------------------------------------------------------------------------------------


@by_scheme
def test_state_dict_is_canonical(scheme):
    layer = make(scheme, smooth=True)
    state = layer.state_dict(prefix="model.fc.")
    made = reference.quantize_weight(H.seeded(N, K), scheme)
    for name, tensor in made.items():
        H.assert_bits_equal(state[f"model.fc.{name}"], tensor)
    assert all(name.startswith("model.fc.") for name in state)
    assert "model.fc.packed" not in state
    assert not any(t.requires_grad for t in state.values())


def test_only_the_packed_form_is_resident():
    layer = make()
    names = dict(layer.named_buffers())
    assert set(names) == {"packed", "colsum", "weight_scale", "bias"}
    assert names["packed"].numel() == _C.packed_w8_bytes(N, K)
    assert not list(layer.parameters())


@by_scheme
@pytest.mark.parametrize("assign", (False, True))
def test_load_state_dict_round_trip(scheme, assign):
    source, target = make(scheme, seed=3, smooth=True), make(scheme, smooth=True)
    x = H.seeded(3, K)
    target(x)
    packed = dict(target.named_buffers())
    result = nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    same(target, source)
    if not assign:
        assert all(tensor is packed[name] for name, tensor in target.named_buffers()), "loading moved the memory"


@by_scheme
def test_load_state_dict_into_an_empty_layer(scheme):
    source = make(scheme, seed=3, bias=False)
    own = source.canonical()["weight_scale"].dtype
    empty = QuantLinear.empty(K, N, scheme, bias=False, group_scale_dtype=own)
    assert all(t.device.type == "meta" for t in empty.buffers())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        empty.load_state_dict(source.state_dict())
    assert any("assign=True" in str(w.message) for w in caught)
    assert empty.weight.device.type == "meta"
    empty.load_state_dict(source.state_dict(), assign=True)
    same(empty, source)
    other = QuantLinear.empty(K, N, scheme, bias=False, group_scale_dtype=own).to_empty(device="cpu")
    other.load_state_dict(source.state_dict())
    same(other, source)


@pytest.mark.parametrize(
    "change, word",
    (
        ({"weight": torch.zeros(N, K + 1, dtype=torch.int8)}, r"fc\.weight: expected shape"),
        ({"weight": torch.zeros(N, K)}, r"fc\.weight: expected dtype torch.int8, got torch.float32"),
        ({"weight_scale": torch.ones(N, dtype=torch.float16)}, r"fc\.weight_scale: expected dtype"),
        ({"weight": None}, r'Missing key.*"fc\.weight"'),
        ({"bias": None}, r'Missing key.*"fc\.bias"'),
        ({"inv_smooth": torch.ones(K)}, r'Unexpected key.*"fc\.inv_smooth"'),
        ({"nonsense": torch.ones(K)}, r'Unexpected key.*"fc\.nonsense"'),
    ),
)
@pytest.mark.parametrize("assign", (False, True))
def test_load_state_dict_errors_leave_the_layer_alone(change, word, assign):
    model = nn.ModuleDict({"fc": make()})
    before = copy.deepcopy(model)
    state = {**make(seed=3).state_dict(prefix="fc."), **{f"fc.{name}": value for name, value in change.items()}}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(RuntimeError, match=word):
        model.load_state_dict(state, assign=assign)
    if word.startswith("fc"):  # torch reports the others after loading what it can
        same(model["fc"], before["fc"])


def test_load_state_dict_partly_and_leniently():
    target, source = make(), make(seed=3)
    target.load_state_dict({"bias": source.bias, "other": torch.ones(1)}, strict=False)
    H.assert_bits_equal(target.bias, source.bias)
    H.assert_bits_equal(target.state_dict()["weight"], make().state_dict()["weight"])
    target.load_state_dict({"weight": source.state_dict()["weight"]}, strict=False, assign=True)
    H.assert_bits_equal(target.state_dict()["weight"], source.state_dict()["weight"])
    with pytest.raises(RuntimeError, match="act_scale"):
        make("w8a8_static").load_state_dict({"act_scale": torch.tensor(-1.0)}, strict=False, assign=True)


def test_load_state_dict_minus_128_is_noticed(isa):
    target = make()
    x = -torch.ones(2, K)
    target(x)
    state = target.state_dict()
    state["weight"] = torch.full((N, K), -128, dtype=torch.int8)
    target.load_state_dict(state)
    H.assert_bits_equal(target(x), reference.linear(x, state, target.scheme, K))


def test_load_state_dict_hooks_may_rename_keys():
    target, source = make(), make(seed=3)

    def rename(module, state, prefix, *rest):
        state[prefix + "weight"] = state.pop(prefix + "old")

    target.register_load_state_dict_pre_hook(rename)
    state = source.state_dict()
    state["old"] = state.pop("weight")
    target.load_state_dict(state)
    same(target, source)


def test_extra_buffers_and_parameters_travel_too():
    layer, target = make(), make(seed=3)
    for each in (layer, target):
        each.register_buffer("steps", torch.zeros(2))
        each.gate = nn.Parameter(torch.zeros(3))
    layer.steps += 1
    target.load_state_dict(layer.state_dict())
    assert torch.equal(target.steps, torch.ones(2))
    assert layer.half().gate.dtype == torch.float16
    same(pickle.loads(pickle.dumps(layer)), layer)


# -- copies -----------------------------------------------------------------------------------------------------------


def _saved(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@by_scheme
@pytest.mark.parametrize("way", ("deepcopy", "pickle", "torch.save", "copy"))
def test_copies_are_equal(scheme, way):
    layer = make(scheme, smooth=True)
    layer(H.seeded(3, K))
    twin = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "torch.save": lambda: torch.load(_saved(layer), weights_only=False),
        "copy": lambda: copy.copy(layer),
    }[way]()
    assert type(twin) is QuantLinear
    same(twin, layer)
    shared = any(a is b for a, b in zip(layer.buffers(), twin.buffers(), strict=True))
    assert shared == (way == "copy")
    if way != "copy":
        del layer
        same(twin, make(scheme, smooth=True))
        twin.load_state_dict(make(scheme, smooth=True, seed=5).state_dict())
        same(twin, make(scheme, smooth=True, seed=5))


def test_state_dict_loads_with_weights_only():
    layer = make()
    twin = make(seed=3)
    twin.load_state_dict(torch.load(_saved(layer.state_dict()), weights_only=True))
    same(twin, layer)


def test_deepcopy_does_not_unpack(monkeypatch):
    layer = make()
    monkeypatch.setattr(type(layer._prepared), "canonical", None)
    copy.deepcopy(layer)
