"""Norms and gated activations that one kernel computes for weight-only Linears: who may, and what comes out.

A stand-in for the CUDA layers says that its inputs may be computed so, over the reference; on a GPU, such models run in
test_cuda_deferred.py.  What Linears of 8-bit inputs read: test_deferred.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, seeded
from test_deferred import Integers, handing, quantize_activation, quantize_norm
from test_row_ops import norm_slack, within
from torch import Tensor, nn
from toys import Block, K, Mlp, PlainMlp, close

import qkernels as qk
from qkernels import backends, deferred, norms, reference
from qkernels.backends import PreparedReference
from qkernels.deferred import Deferred, HandsOn, PendingSum
from qkernels.eager import is_plain
from qkernels.fuse import fuse_, unfuse_
from qkernels.nn import QuantLinear

X = seeded(2, 5, K)
CODEBOOK = qk.Scheme.from_preset("w4a16").replace(codebook=qk.NF4)
SCHEMES = {
    "w4a16": "w4a16",
    "w8a16": "w8a16",
    "codebook": CODEBOOK,
    "w4a16 per channel": qk.Scheme(4, activation_bits=None),
}
Calls = list[tuple[str, bool]]


class Floats(HandsOn, PreparedReference):
    """Weight-only, and its input may come from one kernel, as with the CUDA layers."""

    @classmethod
    def objection(cls, scheme: qk.Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        return "" if scheme.weight_only else "not weight-only"

    def takes_floats(self) -> bool:
        return True

    def run(self, x: Tensor) -> Tensor:
        x = x.value() if isinstance(x, Deferred) else x
        return self.finished(self.product(x, self.tensors, None)) if is_plain(x) else self.around(x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernels' calls by the definition, and whether they were given a second tensor."""
    made: Calls = []

    @torch.no_grad()
    def normalize(x, weight, bias, eps, *, layer, residual=None, for_gemm=False):
        made.append(("layer" if layer else "rms", residual is not None))
        total = reference.add_residual(x, residual)
        y = reference.layer_norm(total, weight, bias, eps) if layer else reference.rms_norm(total, weight, eps)
        return y.to(x.dtype), None if residual is None else total

    @torch.no_grad()
    def activate(x, activation, up, *, for_gemm=False):
        made.append((activation, up is not None))
        return reference.activated(x, activation, up).to(x.dtype)

    monkeypatch.setattr(backends, "CANDIDATES", [Floats, *backends.CANDIDATES])
    monkeypatch.setattr(norms, "normalize", normalize)
    monkeypatch.setattr(deferred, "activate", activate)
    return made


def pair(model: nn.Module, scheme: str | qk.Scheme = "w4a16", **options) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Fused, not fused, and what the report says of each layer."""
    torch.manual_seed(0)
    fused, plain = model.eval(), copy.deepcopy(model).eval()
    report = qk.quantize_(fused, scheme, exclude=(), **options)
    qk.quantize_(plain, scheme, exclude=(), fuse=False, **options)
    return fused, plain, {layer.name: layer.reason or "" for layer in report.layers}


def blocks(norm: type | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() if norm is None else Block(norm) for _ in range(2)))


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weight_only_readers_are_served_and_reported(calls: Calls, scheme: str | qk.Scheme) -> None:
    fused, _, notes = pair(blocks(), scheme)
    assert handing(fused) == ["0.first", "0.second", "1.first", "1.second"]
    assert "first in one pass" in notes["0.attention.q"]
    assert "first and residual in one pass" in notes["1.attention.k"]
    assert "second and residual in one pass" in notes["0.mlp.gate"]
    assert "act and product in one pass" in notes["0.mlp.down"]
    assert "added by 0.second" in notes["0.attention.o"]
    assert "added by 1.first" in notes["0.mlp.down"]
    assert not any("integers" in words for words in notes.values())


def test_nothing_is_reported_where_no_kernel_computes_it() -> None:
    fused, plain, notes = pair(blocks())
    assert handing(fused) == ["0.first", "0.second", "1.first", "1.second"]  # in case the model moves
    assert not any("one pass" in words or "added by" in words for words in notes.values())
    with torch.no_grad():
        assert close(fused(X), plain(X))


def test_activations_alone_are_one_kernel_already(calls: Calls) -> None:
    fused, _, notes = pair(Block(mlp=PlainMlp()))
    assert fused.mlp.up._feeds is None
    assert "pass" not in notes["mlp.down"]


def test_weights_of_both_kinds_read_one_norm(calls: Calls) -> None:
    fused, plain, _ = pair(Block(), overrides={"attention.k": "w8a16", "mlp.gate": "w8a16"})
    assert handing(fused) == ["first", "second"]
    with torch.no_grad():
        assert close(fused(X), plain(X))
    assert calls == [("rms", False), ("rms", True), ("silu", True)]


def test_readers_of_integers_and_floats_keep_the_module(calls: Calls) -> None:
    overrides = {"attention.k": "w8a8", "mlp.up": "w4a8"}
    fused, plain, notes = pair(Block(), overrides=overrides)
    assert handing(fused) == []
    assert not any("first" in words or "second" in words for words in notes.values())
    with torch.no_grad():
        assert close(fused(X), plain(X))
    assert calls == [("silu", True)]


def test_layers_that_keep_their_float_weight_keep_the_norm(calls: Calls) -> None:
    assert handing(pair(Block(), overrides={"attention.q": None})[0]) == ["second"]


@pytest.mark.parametrize("integers_first", [True, False])
def test_activations_between_kinds(calls: Calls, monkeypatch: pytest.MonkeyPatch, integers_first: bool) -> None:
    """What the reader takes decides, whatever multiplies before."""
    monkeypatch.setattr(norms, "quantize_norm", quantize_norm)
    monkeypatch.setattr(deferred, "quantize_activation", quantize_activation)
    monkeypatch.setattr(Integers, "taken", 0)
    monkeypatch.setattr(Integers, "objection", classmethod(lambda cls, s, *_: "" if s.activation_bits else "floats"))
    monkeypatch.setattr(backends, "CANDIDATES", [Floats, Integers, *backends.CANDIDATES])
    first, last = ("w8a8", "w4a16") if integers_first else ("w4a16", "w8a8")
    fused, plain, _ = pair(Block(), first, overrides={"mlp.down": last})
    with torch.no_grad():
        assert close(fused(X), plain(X))
    assert (("silu", True) in calls) == integers_first
    assert Integers.taken == (4 if integers_first else 1)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("mlp", [Mlp(), Mlp(nn.GELU()), Mlp(nn.GELU("tanh")), Mlp(nn.ReLU()), PlainMlp()], ids=repr)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_one_kernel_each(calls: Calls, scheme: str | qk.Scheme, mlp: nn.Module, norm: type | None) -> None:
    model = Block(mlp=copy.deepcopy(mlp)) if norm is None else Block(norm, copy.deepcopy(mlp))
    fused, plain, _ = pair(model, scheme)
    with torch.no_grad():
        y, wanted = fused(X), plain(X)
    assert type(y) is Tensor
    assert float((y - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    kind = "rms" if norm is None else "layer"
    products = [(fused.mlp.gate.epilogue, True)] if type(mlp) is Mlp else []
    assert calls == [(kind, False), (kind, True), *products]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inference", [False, True])
def test_values_are_those_of_the_definition(calls: Calls, dtype: torch.dtype, inference: bool) -> None:
    fused, plain, _ = pair(Block().to(dtype))
    x = X.to(dtype)
    with torch.inference_mode() if inference else torch.no_grad():
        normed = fused.first(x)
        assert type(normed) is Tensor
        assert_bits_equal(normed, reference.rms_norm(x, fused.first.weight, 1e-5).to(dtype))
        given = fused.attention(normed)[0]
        waiting = x + given
        assert isinstance(waiting, PendingSum)
        normed = fused.second(waiting)
        total = x + given.clone()
        assert waiting._value is not None  # the kernel's
        assert_bits_equal(waiting._value, total)
        assert_bits_equal(waiting + 0.0, total + 0.0)
        assert_bits_equal(normed, reference.rms_norm(total, fused.second.weight, 1e-5).to(dtype))
        wanted = reference.activated(plain.mlp.gate(normed), "silu", plain.mlp.up(normed)).to(dtype)
        assert_bits_equal(fused.mlp.act(fused.mlp.gate(normed)) * fused.mlp.up(normed), wanted)
    assert calls == [("rms", False), ("rms", True), ("silu", True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_definition_is_torchs_rounded_once(dtype: torch.dtype) -> None:
    """Within the roundings of float32 before the one to the dtype."""
    x, up, weight, bias = (
        seeded(*shape, seed=seed).to(dtype) for seed, shape in enumerate(((7, 96), (7, 96), (96,), (96,)))
    )
    wide, beside, none = x.double(), up.double(), torch.zeros_like(weight)
    exact = nn.functional.rms_norm(wide, (96,), weight.double(), 1e-5)
    within(reference.rms_norm(x, weight, 1e-5).to(dtype), exact, norm_slack(x, weight.float(), none.float(), False))
    exact = nn.functional.layer_norm(wide, (96,), weight.double(), bias.double(), 1e-5)
    slack = norm_slack(x, weight.float(), bias.float(), True)
    within(reference.layer_norm(x, weight, bias, 1e-5).to(dtype), exact, slack)
    for name, function in (("silu", nn.functional.silu), ("gelu", nn.functional.gelu), ("relu", nn.functional.relu)):
        exact = function(wide) * beside
        within(reference.activated(x, name, up).to(dtype), exact, exact.abs() * 2.0**-22)


def test_held_activations_serve_other_uses(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    with torch.no_grad():
        held, wanted = fused.mlp.gate(X), torch.nn.functional.silu(plain.mlp.gate(X))
        assert isinstance(held, Deferred)
        assert_bits_equal(held + 1.0, wanted + 1.0)
        assert_bits_equal(fused.mlp.gate(X) * 2.0, wanted * 2.0)
        assert_bits_equal(fused.mlp.gate(X) * seeded(48), wanted * seeded(48))
    assert calls == []


def test_other_dtypes_no_rows_and_keywords_go_the_old_way(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    with torch.no_grad():
        assert_bits_equal(fused.first(X.half()), plain.first(X.half()))  # a float32 weight
        assert fused.first(X[:0]).shape == (0, 5, K)
        assert fused.mlp(X[:0]).shape == (0, 5, K)
        assert_bits_equal(fused.first(hidden=X), plain.first(X))
        with pytest.raises(RuntimeError):
            fused.first(X[..., :7])
    assert calls == []


def test_gradients_hooks_and_transforms_go_the_old_way(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    x, wanted = X.clone().requires_grad_(), X.clone().requires_grad_()
    fused(x).sum().backward()
    plain(wanted).sum().backward()
    assert close(x.grad, wanted.grad)  # type: ignore[arg-type]
    fused(X).sum().backward()  # parameters alone
    assert fused.first.weight.grad is not None
    with torch.no_grad():
        assert close(torch.func.vmap(fused)(X), plain(X))
        with torch.autocast("cpu", torch.bfloat16):
            fused(X)
        assert close(torch.compile(fused, backend="eager", fullgraph=True)(X), plain(X))
        assert calls == []
        seen: list[Tensor] = []
        handle = fused.first.register_forward_hook(lambda m, i, o: seen.append(o))
        fused(X)
        handle.remove()
        assert_bits_equal(seen[0], plain.first(X))
        assert calls == [("rms", True), ("silu", True)]


def test_layers_that_moved_where_no_kernel_is_go_the_old_way(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    for layer in (m for m in fused.modules() if isinstance(m, QuantLinear)):
        layer._adopt(PreparedReference.from_canonical(layer.canonical(), layer.scheme, layer.in_features))
    with torch.no_grad():
        assert type(fused.first(X)) is Tensor
        assert close(fused.first(X), plain.first(X))
        assert close(fused(X), plain(X))
    assert calls == []


# -- copies, and the way back -----------------------------------------------------------------------------------------


def test_copies_hand_over_among_themselves(calls: Calls) -> None:
    fused, _, _ = pair(Block())
    clone = copy.deepcopy(fused)
    assert clone.first.forward._handoff._reader() is clone.attention.q
    assert clone.mlp.gate._prepared.feeds[0]._reader() is clone.mlp.down
    with torch.no_grad():
        assert_bits_equal(clone(X), fused(X))
    assert calls == 2 * [("rms", False), ("rms", True), ("silu", True)]


def test_unfuse_and_dequantize_take_it_apart(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    with torch.no_grad():
        before = fused(X)
        calls.clear()
        unfuse_(fused)
        assert handing(fused) == []
        for layer in (m for m in fused.modules() if isinstance(m, QuantLinear)):
            assert layer._reads is layer._feeds is layer._adds is layer._prepared.feeds is None
        assert_bits_equal(fused(X), plain(X))
        assert calls == []
        words = fuse_(fused)
        assert words["attention.q"].startswith("first in one pass")
        assert_bits_equal(fused(X), before)
        qk.dequantize_(fused)
    assert handing(fused) == []


def test_a_failed_fusion_is_taken_back(calls: Calls) -> None:
    fused, plain, _ = pair(Block())
    undo: list = []
    unfuse_(fused)
    fuse_(fused, on_failure=undo.append)
    undo[0]()
    assert handing(fused) == []
    with torch.no_grad():
        assert_bits_equal(fused(X), plain(X))
    assert calls == []
