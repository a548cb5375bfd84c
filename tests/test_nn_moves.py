"""QuantLinear on the move: dtypes, devices, shared memory, and buffers that somebody else replaced."""

from __future__ import annotations

import copy

import helpers as H
import pytest
import torch
from layers import STATIC_ASYMMETRIC, K, N, by_scheme, make, same
from torch import Tensor, nn

from qkernels import _C, reference
from qkernels.nn import QuantLinear
from qkernels.scheme import PRESETS

# -- moves ------------------------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.parametrize(
    "move, dtype",
    (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.float16), torch.float16),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half().float(), torch.float32),
    ),
    ids=("half", "bfloat16", "to", "to2", "type", "double", "half-float"),
)
def test_dtype_moves_narrow_nothing(scheme, move, dtype):
    layer = make(scheme, smooth=True)
    state = layer.state_dict()
    expected = layer(H.seeded(3, K))
    moved = move(nn.Sequential(layer))[0]
    assert moved is layer
    for name, tensor in moved.state_dict().items():
        H.assert_bits_equal(tensor, state[name], name)
    H.assert_bits_equal(layer(H.seeded(3, K)), expected)
    assert layer.weight.dtype == dtype
    assert layer.weight.clone().dtype == dtype
    if dtype != torch.float64:
        assert layer.to_linear().weight.dtype == dtype


@by_scheme
def test_meta_and_back(scheme):
    layer = make(scheme)
    source = copy.deepcopy(layer)
    layer.to("meta")
    assert all(t.device.type == "meta" for t in layer.buffers())
    assert {name: t.shape for name, t in layer.state_dict().items()} == {
        n: t.shape for n, t in source.state_dict().items()
    }
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    same(layer, source)


def test_shared_memory_is_followed():
    layer = make()
    x = H.seeded(3, K)
    expected = layer(x)
    layer.share_memory()
    assert all(t.is_shared() for t in layer.buffers())
    H.assert_bits_equal(layer(x), expected)
    other = make()
    other(x)
    other.packed.share_memory_()  # past the module
    H.assert_bits_equal(other(x), expected)


def _child(layer: nn.Module, x: Tensor, queue: torch.multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    queue.put(layer(x).tolist())
    layer.bias.fill_(7.0)


@pytest.mark.slow
def test_shared_memory_reaches_other_processes():
    context = torch.multiprocessing.get_context("spawn")
    layer = make().share_memory()
    x = H.seeded(3, K)
    expected = layer(x)
    queue = context.Queue()
    process = context.Process(target=_child, args=(layer, x, queue))
    process.start()
    H.assert_bits_equal(torch.tensor(queue.get(timeout=120)), expected)
    process.join(120)
    assert process.exitcode == 0
    assert torch.equal(layer.bias, torch.full((N,), 7.0)), "the child had a copy"


@by_scheme
def test_replaced_buffers_are_noticed(scheme):
    layer, other = make(scheme), make(scheme, seed=3)
    x = H.seeded(3, K)
    expected, wanted = layer(x), other(x)
    swapped = torch.func.functional_call(layer, dict(other.named_buffers()), (x,))
    H.assert_bits_equal(swapped, wanted)
    H.assert_bits_equal(layer(x), expected)
    for name, tensor in other.named_buffers():
        getattr(layer, name).data = tensor.clone()
    H.assert_bits_equal(layer(x), wanted)
    for name, tensor in make(scheme).named_buffers():
        layer._buffers[name] = tensor
    H.assert_bits_equal(layer(x), expected)
    for name, tensor in other.named_buffers():
        torch.utils.swap_tensors(layer._buffers[name], tensor.clone())
    H.assert_bits_equal(layer(x), wanted)


def test_replaced_weights_with_minus_128_are_noticed(isa):
    layer = make()
    x = -torch.ones(2, K)
    layer(x)
    state = layer.state_dict()
    state["weight"] = torch.full((N, K), -128, dtype=torch.int8)
    other = QuantLinear(K, N, state, "w8a8")
    expected = reference.linear(x, state, layer.scheme, K)
    for each in (x, x.clone().requires_grad_()):
        y = torch.func.functional_call(layer, dict(other.named_buffers()), (each,))
        H.assert_bits_equal(y.detach(), expected)
        H.assert_bits_equal(layer(x), make()(x))


@pytest.mark.parametrize("scheme", ("w8a8_static", STATIC_ASYMMETRIC), ids=str)
def test_static_scales_changed_in_place_are_noticed(scheme):
    layer = make(scheme)
    x = H.seeded(3, K)
    layer(x)
    layer.act_scale.fill_(0.5)
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    if layer.scheme != PRESETS["w8a8_static"]:
        layer.act_zero_point.fill_(3)
        H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))
    layer.act_scale.data = torch.tensor(0.25)
    H.assert_bits_equal(layer(x), reference.linear(x, layer.canonical(), layer.scheme, K))


def test_buffers_of_the_wrong_size_are_refused():
    layer = make()
    x = H.seeded(3, K)
    layer(x)
    layer._buffers["packed"] = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(ValueError, match="packed"):
        layer(x)


def test_nothing_is_packed_in_forward(monkeypatch):
    layer = make()
    twin = copy.deepcopy(layer)
    for name in ("pack_w8", "unpack_w8"):
        monkeypatch.setattr(_C, name, None)
    x = H.seeded(3, K)
    H.assert_bits_equal(layer(x), twin(x))


def test_accelerate_device_maps():
    accelerate = pytest.importorskip("accelerate")
    x = H.seeded(3, K)

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(K, K), QuantLinear.from_linear(nn.Linear(K, K)), nn.Linear(K, K)).eval()

    torch.manual_seed(0)
    plain = model()
    with torch.no_grad():
        expected = plain(x)
    for options in ({"offload_buffers": False}, {"offload_buffers": True}):
        torch.manual_seed(0)
        hooked = accelerate.cpu_offload(model(), execution_device="cpu", **options)
        with torch.no_grad():
            H.assert_bits_equal(hooked(x), expected)
            H.assert_bits_equal(hooked(x), expected)
    torch.manual_seed(0)
    dispatched = accelerate.dispatch_model(model(), device_map={"": "cpu"})
    with torch.no_grad():
        H.assert_bits_equal(dispatched(x), expected)


def test_accelerate_offload_to_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(K, K), QuantLinear.from_linear(nn.Linear(K, K))).eval()
    x = H.seeded(3, K)
    with torch.no_grad():
        expected = model(x)
        hooked = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu", offload_buffers=True)
        H.assert_bits_equal(hooked(x), expected)
