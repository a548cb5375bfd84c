"""Norms and activations that hand integers to Linears on a GPU; who may, and all that needs none: test_deferred.py."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import Block, K, PlainMlp, close

import qkernels as qk
from qkernels import cuda, reference, row_ops
from qkernels.cuda_w8a8 import PreparedCudaW8A8
from qkernels.deferred import QuantizedInput


@pytest.fixture
def gpu_model() -> tuple[nn.Module, nn.Module]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a torch built without CUDA")
    if cuda._cuda is None:
        pytest.skip("this installation was built without the CUDA module")
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(nn.LayerNorm, PlainMlp(nn.GELU()))).eval()
    plain = copy.deepcopy(model)
    report = qk.quantize_(model.cuda().to(torch.bfloat16), "w8a8", exclude=())
    qk.quantize_(plain.cuda().to(torch.bfloat16), "w8a8", exclude=(), fuse=False)
    notes = {layer.name: layer.reason or "" for layer in report.layers}
    assert "reads first as integers" in notes["0.attention.q"]
    assert "reads act as integers" in notes["0.mlp.down"]
    return model, plain


@pytest.mark.gpu
def test_gpu_integers_arrive(gpu_model: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = gpu_model
    taken = []
    original = PreparedCudaW8A8._product_of

    def counted(self, codes, out_dtype):
        taken.append(self)
        return original(self, codes, out_dtype)

    monkeypatch.setattr(PreparedCudaW8A8, "_product_of", counted)
    for rows in (1, 3, 200):
        x = seeded(rows, 4, K).to("cuda", torch.bfloat16)
        with torch.no_grad():
            taken.clear()
            y = fused(x)
            assert len(taken) == 5 + 4
            assert close(y.float(), plain(x).float())
            normed = fused[0].first(x)
            assert isinstance(normed, QuantizedInput)
            layer = fused[0].attention.q
            codes = row_ops.rms_norm_quantize(x, fused[0].first.weight, eps=1e-5)
            tensors = {name: t.cpu() for name, t in layer.canonical().items()}
            wanted = reference.linear_w8a8_prequantized(
                codes[0].cpu(),
                codes[1].cpu(),
                None,
                tensors["weight"],
                tensors["weight_scale"],
                tensors["bias"],
                torch.bfloat16,
            )
            assert_bits_equal(layer(normed), wanted)
            assert_bits_equal(normed.clone(), plain[0].first(x))


@pytest.mark.gpu
def test_gpu_graph_replays_and_streams(gpu_model: tuple[nn.Module, nn.Module]) -> None:
    fused, _ = gpu_model
    x = seeded(7, 4, K).to("cuda", torch.bfloat16)
    with torch.no_grad():
        fused(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        for seed in range(3):
            x.copy_(seeded(7, 4, K, seed=seed))
            graph.replay()
            assert_bits_equal(y, fused(x))
        wanted = fused(x)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        results = []
        for turn in range(20):
            with torch.cuda.stream(streams[turn % 2]):
                results.append(fused(x))
        torch.cuda.synchronize()
        for result in results:
            assert_bits_equal(result, wanted)


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
        qk.quantize_(model, qk.Scheme(activation_symmetric=False), exclude=())
        qk.quantize_(other, qk.Scheme(activation_symmetric=False), exclude=(), fuse=False)
        model.cuda(), other.cuda()  # converted on the CPU, run here
        assert close(model(x.float()), other(x.float()))
