"""Norms and activations that kernels compute for Linears on a GPU; who may, and all that needs none: test_deferred.py,
test_deferred_floats.py."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, assert_steady_on_gpu, seeded
from torch import nn
from toys import Block, K, PlainMlp, close

import qkernels as qk
from qkernels import cuda, deferred, norms, reference, row_ops
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.cuda_w8a8 import PreparedCudaW8A8
from qkernels.deferred import PendingSum, QuantizedInput

SHIFTED = qk.Scheme.from_preset("w4a8").replace(activation_symmetric=False)


def on_gpu(scheme: str | qk.Scheme) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Two blocks fused, not fused, and what the report says of each layer."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a torch built without CUDA")
    if cuda._cuda is None:
        pytest.skip("this installation was built without the CUDA module")
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(nn.LayerNorm, PlainMlp(nn.GELU()))).eval()
    plain = copy.deepcopy(model)
    report = qk.quantize_(model.cuda().to(torch.bfloat16), scheme, exclude=())
    qk.quantize_(plain.cuda().to(torch.bfloat16), scheme, exclude=(), fuse=False)
    notes = {layer.name: layer.reason or "" for layer in report.layers}
    return model, plain, notes


@pytest.fixture(params=["w8a8", "w4a8", SHIFTED], ids=["w8a8", "w4a8", "w4a8 asymmetric"])
def gpu_model(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    model, plain, notes = on_gpu(request.param)
    assert "reads first as integers" in notes["0.attention.q"]
    assert "reads act as integers" in notes["0.mlp.down"]
    assert "added by 0.second" in notes["0.attention.o"]
    assert "added by 1.first" in notes["0.mlp.down"]
    return model, plain


@pytest.mark.gpu
def test_gpu_integers_arrive(gpu_model: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = gpu_model
    taken = []

    def count(kind: type) -> None:
        original = kind.product_of

        def counted(self, codes, out_dtype):
            taken.append(self)
            return original(self, codes, out_dtype)

        monkeypatch.setattr(kind, "product_of", counted)

    count(PreparedCudaW8A8)
    count(PreparedCudaW4)
    scheme = fused[0].attention.q.scheme
    symmetric = scheme.activation_symmetric
    for rows in (1, 3, 200):
        x = seeded(rows, 4, K).to("cuda", torch.bfloat16)
        with torch.no_grad():
            taken.clear()
            y = fused(x)
            assert len(taken) == 3 + 3  # query and key together, gate and up, down; up by itself, down
            assert close(y.float(), plain(x).float())
            normed = fused[0].first(x)
            assert isinstance(normed, QuantizedInput)
            layer = fused[0].attention.q
            given = fused[0].attention(normed)[0]
            waiting = x + given
            assert isinstance(waiting, PendingSum)
            fused[0].second(waiting)
            total, wanted_total = waiting._value, x + given.clone()
            assert total is not None
            assert_bits_equal(total, wanted_total)
            assert_bits_equal(waiting + 0.0, wanted_total + 0.0)
            codes = row_ops.rms_norm_quantize(x, fused[0].first.weight, eps=1e-5, symmetric=symmetric)
            on_cpu = [None if t is None else t.cpu() for t in codes[:3]]
            tensors = {name: t.cpu() for name, t in layer.canonical().items()}
            weight = (tensors["weight"], tensors["weight_scale"], tensors["bias"], torch.bfloat16)
            if scheme.weight_bits == 8:
                wanted = reference.linear_w8a8_prequantized(*on_cpu, *weight)
            else:
                group = scheme.resolve_group_size(K)
                wanted = reference.linear_w4a8_prequantized(*on_cpu, *weight, in_features=K, group_size=group)
            assert_bits_equal(layer(normed), wanted)
            assert_bits_equal(normed.clone(), plain[0].first(x))


@pytest.mark.gpu
def test_gpu_graph_replays_and_streams(gpu_model: tuple[nn.Module, nn.Module]) -> None:
    fused, _ = gpu_model
    x = seeded(7, 4, K).to("cuda", torch.bfloat16)
    with torch.no_grad():
        assert_steady_on_gpu(lambda: (fused(x),), lambda seed: x.copy_(seeded(7, 4, K, seed=seed)), 20)


@pytest.mark.gpu
def test_gpu_compiled_asymmetric_and_moved(gpu_model: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = gpu_model
    x = seeded(6, 4, K).to("cuda", torch.bfloat16)
    with torch.no_grad():
        assert close(torch.compile(fused, fullgraph=True)(x).float(), plain(x).float())
        there_and_back = copy.deepcopy(fused).cpu().cuda()
        assert_bits_equal(there_and_back(x), fused(x))
        model = Block().eval()
        other = copy.deepcopy(model)
        scheme = fused[0].attention.q.scheme.replace(activation_symmetric=False)
        qk.quantize_(model, scheme, exclude=())
        qk.quantize_(other, scheme, exclude=(), fuse=False)
        model.cuda(), other.cuda()  # converted on the CPU, run here
        assert close(model(x.float()), other(x.float()))


# -- weight-only readers ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["w4a16", "w8a16", qk.Scheme(4, activation_bits=None)], ids=["w4a16", "w8a16", "w4a16 per row"])
def float_model(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, nn.Module, list[str]]:
    """Fused, not fused, and the kernels that are called from here on."""
    model, plain, notes = on_gpu(request.param)
    assert "first in one pass" in notes["0.attention.q"]
    assert "second and residual in one pass" in notes["0.mlp.gate"]
    assert "act and product in one pass" in notes["0.mlp.down"]
    assert "one pass" not in notes["1.mlp.down"]
    assert "added by 0.second" in notes["0.attention.o"]
    assert "added by 1.first" in notes["0.mlp.down"]
    called: list[str] = []
    for module, name in ((norms, "normalize"), (deferred, "activate")):
        original = getattr(module, name)

        def counted(*args, original=original, name=name, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return model, plain, called


FUSED = ["normalize", "normalize", "activate", "normalize", "normalize"]


@pytest.mark.gpu
def test_gpu_one_kernel_each(float_model: tuple[nn.Module, nn.Module, list[str]]) -> None:
    fused, plain, called = float_model
    for rows in (1, 3, 200):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = seeded(rows, 4, K).to("cuda", dtype)
            fused, plain = fused.to(dtype), plain.to(dtype)
            with torch.no_grad():
                called.clear()
                y = fused(x)
                assert called == FUSED
                assert type(y) is torch.Tensor
                assert close(y.float(), plain(x).float())
                normed = fused[0].first(x)
                assert type(normed) is torch.Tensor
                wanted = reference.rms_norm(x, fused[0].first.weight, 1e-5)
                eps = torch.finfo(dtype).eps
                assert bool(((normed.float() - wanted).abs() <= wanted.abs() * (eps / 2 + 2.0**-18)).all())
                given = fused[0].attention(normed)[0]
                waiting = x + given
                assert isinstance(waiting, PendingSum)
                fused[0].second(waiting)
                assert waiting._value is not None
                assert_bits_equal(waiting._value, x + given.clone())


@pytest.mark.gpu
def test_gpu_floats_in_graphs_and_streams(float_model: tuple[nn.Module, nn.Module, list[str]]) -> None:
    fused, _, called = float_model
    x = seeded(7, 4, K).to("cuda", torch.bfloat16)
    with torch.no_grad():
        assert_steady_on_gpu(lambda: (fused(x),), lambda seed: x.copy_(seeded(7, 4, K, seed=seed)), 20)
    assert called == FUSED * (1 + 1 + 3 + 1 + 20)


@pytest.mark.gpu
def test_gpu_floats_compiled_taken_apart_and_moved(float_model: tuple[nn.Module, nn.Module, list[str]]) -> None:
    fused, plain, called = float_model
    x = seeded(6, 4, K).to("cuda", torch.bfloat16)
    fused(x.clone().requires_grad_()).sum().backward()
    assert called == []
    with torch.no_grad():
        assert close(torch.compile(fused, fullgraph=True)(x).float(), plain(x).float())
        assert called == []
        there = copy.deepcopy(fused).cpu()
        there(x.cpu())
        assert called == []
        assert_bits_equal(there.cuda()(x), fused(x))
        assert called == 2 * FUSED
        called.clear()
        qk.unfuse_(fused)
        assert close(fused(x).float(), plain(x).float())
        assert called == []
        model = Block().eval()
        other = copy.deepcopy(model)
        qk.quantize_(model, "w4a16", exclude=())
        qk.quantize_(other, "w4a16", exclude=(), fuse=False)
        model.cuda(), other.cuda()  # converted on the CPU, run here
        assert close(model(x.float()), other(x.float()))
        assert called == FUSED[:3]
