"""Weights side by side in one memory: what runs as one product, what every layer keeps for itself, and the way back.

The logic is the same wherever a kernel serves joined weights.  Here a stand-in for the CUDA layers does, over the
reference; on a GPU, such models run in test_cuda_joint.py.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from helpers import assert_bits_equal, seeded
from test_deferred import Integers, quantize_activation, quantize_norm
from torch import Tensor, nn
from toys import Block, K, Mlp, close

import qkernels as qk
from qkernels import backends, deferred, norms
from qkernels.fuse import fuse_, unfuse_
from qkernels.joint import Joinable, Rows
from qkernels.nn import QuantLinear

FEATURES = 64


class Beside(Joinable, Integers):
    """Served by the reference, joined as the CUDA layers are."""

    runs = 0

    @classmethod
    def objection(cls, scheme, in_features, out_features, device):
        return "" if device.type == "cpu" else "elsewhere"

    def rows_of(self, name: str, tensor: Tensor) -> Rows | None:
        return Rows(tensor, 0) if name.startswith(("q_weight", "weight_", "bias")) else None

    def input_grid(self):
        return None if self.scheme.weight_only else super().input_grid()

    def run(self, x: Tensor) -> Tensor:
        Beside.runs += 1
        return super().run(x)


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self, n=(48, 16, 130)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(FEATURES, width, bias=width != 16) for width in n)

    def forward(self, x):
        q = self.q(x).relu()
        k = self.k(x)
        return torch.cat([q, k, self.v(x)], dim=-1)


SCHEMES = {
    "w8a8": qk.Scheme(),
    "asymmetric": qk.Scheme(activation_symmetric=False),
    "w4a8": qk.Scheme.from_preset("w4a8"),
    "w4a8 zero points": qk.Scheme.from_preset("w4a8").replace(weight_symmetric=False, activation_symmetric=False),
    "w4a16": qk.Scheme.from_preset("w4a16"),
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CANDIDATES", [Beside, *backends.CANDIDATES])
    monkeypatch.setattr(norms, "quantize_norm", quantize_norm)
    monkeypatch.setattr(deferred, "quantize_activation", quantize_activation)
    monkeypatch.setattr(Beside, "runs", 0)
    monkeypatch.setattr(Integers, "taken", 0)


def pair(model: nn.Module | None = None, scheme: str | qk.Scheme = "w8a8", **options) -> tuple[nn.Module, nn.Module]:
    """The model with joined weights, and without."""
    torch.manual_seed(0)
    model = (Attention() if model is None else model).eval()
    alone = copy.deepcopy(model)
    qk.quantize_(alone, scheme, exclude=(), fuse=False, **options)
    qk.quantize_(model, scheme, exclude=(), **options)
    return model, alone


def layers(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def storages(model: nn.Module) -> set[int]:
    return {layer._buffers["q_weight"].untyped_storage().data_ptr() for layer in layers(model)}


def assert_joined(model: nn.Module, joined: bool = True) -> None:
    found = layers(model)
    assert all((layer._group is not None and layer._group[0].joined) == joined for layer in found)
    assert len(storages(model)) == (1 if joined else len(found))
    if not joined:
        for layer in found:
            for tensor in layer._prepared.resident().values():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def assert_same(model: nn.Module, alone: nn.Module, x: Tensor | None = None) -> None:
    x = seeded(5, FEATURES) if x is None else x
    with torch.no_grad():
        assert_bits_equal(model(x), alone(x))


# -- what runs as one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_layers_are_one_product_of_the_same_bits(scheme: qk.Scheme, dtype: torch.dtype) -> None:
    model, alone = pair(scheme=scheme)
    assert_joined(model)
    for shape in ((1, FEATURES), (7, FEATURES), (2, 3, FEATURES), (0, FEATURES)):
        x = (seeded(*shape) + 0.3).to(dtype)
        if x.numel():
            x.view(-1)[0] = float("nan")
        Beside.runs = 0
        with torch.inference_mode():
            y = model(x)
        assert Beside.runs == 1
        assert_same(model, alone, x)
        assert y.dtype == dtype


def test_outputs_are_slices_that_do_not_know_of_each_other() -> None:
    model, alone = pair()
    x = seeded(2, 5, FEATURES)
    with torch.no_grad():
        q, k, v = model.q(x), model.k(x), model.v(x)
        wanted = alone.q(x), alone.k(x), alone.v(x)
        assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        before = k._version
        q.mul_(0.0)
        v.add_(1.0)
        assert k._version == before
        assert not k._is_view()
        assert_bits_equal(k, wanted[1])
        assert_bits_equal(v.view(2, 5, 13, 10), (wanted[2] + 1.0).view(2, 5, 13, 10))
        assert_bits_equal(v.view(-1, 130), (wanted[2] + 1.0).view(-1, 130))


def test_report_names_the_others_and_counts_every_byte_once() -> None:
    torch.manual_seed(0)
    model = Attention()
    other = copy.deepcopy(model)
    report, plain = qk.quantize_(model, exclude=()), qk.quantize_(other, exclude=(), fuse=False)
    assert report["k"].reason == "runs with q and v"
    for name in "qkv":
        assert report[name].bytes_after == plain[name].bytes_after


@pytest.mark.parametrize("smooth", [False, True])
def test_static_and_smoothed_layers_join(smooth: bool) -> None:
    batches = [seeded(16, FEATURES, seed=s) for s in range(3)]
    options = {"scheme": "w8a8", "smooth": 0.5} if smooth else {"scheme": "w8a8_static"}
    model, alone = pair(calibration=batches, **options)
    assert_joined(model)
    assert_same(model, alone)


def test_layers_that_do_not_fit_together_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beside, "granule", 16)
    assert_joined(pair(Attention((48, 16, 7)))[0])  # the last one may end anywhere
    model, alone = pair(Attention((48, 24, 130)))
    assert_joined(model, False)
    assert_same(model, alone)
    report = qk.quantize_(Attention((40, 16, 16)), exclude=())
    assert report["q"].reason is None
    scheme = qk.Scheme.from_preset("w4a16")
    torch.manual_seed(0)
    mixed = Attention()
    with torch.no_grad():
        mixed.k.weight.mul_(2.0**24)  # scales that fp16 cannot hold
    model, alone = pair(mixed, scheme)
    assert_joined(model, False)
    assert_same(model, alone)


def test_other_calls_run_alone() -> None:
    model, alone = pair()
    x, other = seeded(4, FEATURES), seeded(4, FEATURES, seed=9)
    with torch.inference_mode():
        model.q(x)
        assert_bits_equal(model.k(other), alone.k(other))
        assert_bits_equal(model.v(x), alone.v(x))
        assert_bits_equal(model.k(x), alone.k(x))
        for _ in range(2):
            model.q(x)
            model.k(x).zero_()
            assert_bits_equal(model.k(x), alone.k(x))
    x = seeded(4, FEATURES)
    model.q(x)
    x.mul_(3)
    assert_bits_equal(model.k(x), alone.k(x))
    with pytest.raises(ValueError, match="expected"):
        model(seeded(4, FEATURES + 1))


def test_gradients_autocast_transforms_and_compilation() -> None:
    model, alone = pair()
    one, two = (seeded(4, FEATURES).requires_grad_() for _ in range(2))
    model(one).sum().backward()
    alone(two).sum().backward()
    assert_bits_equal(one.grad, two.grad)
    x = seeded(4, FEATURES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bits_equal(model(x), alone(x))
    assert_bits_equal(torch.func.vmap(model)(x), alone(x))
    assert_bits_equal(torch.compile(model, backend="eager", fullgraph=True)(x), alone(x))


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", SCHEMES["asymmetric"]], ids=["w8a8", "w4a8", "asymmetric"])
@pytest.mark.parametrize("mlp", [Mlp(), Mlp(nn.GELU())], ids=repr)
def test_integers_of_a_norm_are_multiplied_once(scheme: str | qk.Scheme, mlp: nn.Module) -> None:
    model, alone = pair(Block(mlp=copy.deepcopy(mlp)), scheme)
    x = seeded(2, 5, K)
    with torch.no_grad():
        y = model(x)
        assert close(y, alone(x))
    assert Integers.taken == 3  # q and k, gate and up, down
    assert Beside.runs - 6 == 4  # and o; the other model's six


def test_integers_whose_values_were_written_to_do_not_count() -> None:
    model, alone = pair(Block())
    x = seeded(2, 5, K)
    with torch.no_grad():
        normed, wanted = model.first(x), alone.first(x)
        model.attention.q(normed)
        normed += 1.0
        assert_bits_equal(model.attention.k(normed), alone.attention.k(wanted + 1.0))


# -- what every layer keeps for itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_state_is_each_layer_s_own(scheme: qk.Scheme) -> None:
    model, alone = pair(scheme=scheme)
    state, wanted = model.state_dict(), alone.state_dict()
    assert list(state) == list(wanted)
    for name in wanted:
        assert_bits_equal(state[name], wanted[name], name)
    for assign in (False, True):
        torch.manual_seed(1 + assign)
        new = {name: tensor.clone() for name, tensor in pair(Attention(), scheme)[1].state_dict().items()}
        new = {name: tensor.flip(0) for name, tensor in new.items()}
        for each in (model, alone):
            each.load_state_dict(copy.deepcopy(new), assign=assign)
        assert_joined(model)
        assert_same(model, alone)


def test_weights_and_biases_changed_in_between_are_used() -> None:
    model, alone = pair()
    x = seeded(4, FEATURES)
    state = {name: tensor.flip(0).clone() for name, tensor in alone.state_dict().items()}
    with torch.inference_mode():
        model.q(x)
        model.load_state_dict(state)
        alone.load_state_dict(state)
        assert_bits_equal(model.k(x), alone.k(x))
        model.q(x)
        model.v.bias = alone.v.bias = None
        assert_bits_equal(model.v(x), alone.v(x))
        assert_joined(model)
        assert_same(model, alone)
        model.k.bias = alone.k.bias = torch.ones(16)
        assert_same(model, alone)
        model.q._buffers["weight_scale"] = alone.q._buffers["weight_scale"] = torch.full((48,), 2.0)
        assert_same(model, alone)  # behind everybody's back


def test_loaded_grids_that_differ_part_the_layers_and_the_same_ones_join_them() -> None:
    model, alone = pair(scheme="w8a8_static", calibration=[seeded(16, FEATURES, seed=s) for s in range(3)])
    state = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    for scales in ((0.5, 0.02, 0.125), (0.25, 0.25, 0.25)):
        for name, scale in zip("qkv", scales, strict=True):
            state[f"{name}.act_scale"].fill_(scale)
        model.load_state_dict(state)
        alone.load_state_dict(state)
        assert_joined(model, joined=len(set(scales)) == 1)
        assert_same(model, alone)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_join_among_themselves(way: str) -> None:
    model, alone = pair()
    clone = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_joined(clone)
    assert not storages(clone) & storages(model)
    for layer in layers(model):
        layer._buffers["weight_scale"].zero_()
    assert_same(clone, alone)
    one = copy.deepcopy(clone.k) if way == "deepcopy" else pickle.loads(pickle.dumps(clone.k))
    assert one._buffers["q_weight"].untyped_storage().nbytes() == one._buffers["q_weight"].nbytes
    assert_bits_equal(one(seeded(4, FEATURES)), alone.k(seeded(4, FEATURES)))


def test_moves_join_again() -> None:
    model, alone = pair()
    before = storages(model)
    model.to(torch.bfloat16)  # nothing moves
    assert storages(model) == before
    assert_joined(model)
    held = [layer._buffers["q_weight"] for layer in layers(model)]  # or what moves may get the same memory again
    model._apply(torch.clone)
    assert_joined(model)
    assert storages(model).isdisjoint(tensor.untyped_storage().data_ptr() for tensor in held)
    model.k._apply(torch.clone)
    assert_joined(model)
    assert_same(model, alone)
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(alone.state_dict())
    assert_same(model, alone)


def test_one_that_left_for_another_kernel_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alone = pair()
    monkeypatch.setattr(Beside, "objection", classmethod(lambda *_: "not today"))
    model.k._install(model.k.canonical())
    assert model.k.kernel != "reference"
    assert not model.q._group[0].joined
    assert_same(model, alone)


def test_one_that_is_gone_leaves_the_others_working() -> None:
    model, alone = pair()
    x = seeded(4, FEATURES)
    model.v = None
    gc.collect()
    assert_bits_equal(model.q(x), alone.q(x))
    assert_bits_equal(model.k(x), alone.k(x))


# -- the way back -----------------------------------------------------------------------------------------------------


def test_unfuse_and_dequantize_give_each_its_memory_back() -> None:
    model, alone = pair()
    unfuse_(model)
    assert_joined(model, False)
    assert_same(model, alone)
    assert fuse_(model)["q"] == "runs with k and v"
    assert_joined(model)
    assert_same(model, alone)
    qk.dequantize_(model)
    qk.dequantize_(alone)
    assert_same(model, alone)


def test_a_failed_fusion_is_taken_back() -> None:
    model, alone = pair()
    undo = []
    unfuse_(model, on_failure=undo.append)
    assert_joined(model, False)
    undo[0]()
    assert_joined(model)
    assert_same(model, alone)
    unfuse_(model)
    fuse_(model, on_failure=undo.append)
    assert_joined(model)
    undo[1]()
    assert_joined(model, False)
    assert_same(model, alone)


def test_layers_on_the_cpu_are_ready_for_a_gpu_and_say_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beside, "objection", classmethod(lambda *_: "not here"))
    torch.manual_seed(0)
    model = Attention()
    report = qk.quantize_(model, "w4a16", exclude=())
    assert report["q"].reason is None
    monkeypatch.undo()
    monkeypatch.setattr(backends, "CANDIDATES", [Beside, *backends.CANDIDATES])
    for layer in layers(model):
        layer._install(layer.canonical())  # as a move does
    assert_joined(model)
