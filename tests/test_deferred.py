"""Norms and activations that hand integers to Linears: who may, what the others see, copies and the way back.

The hand-over itself runs wherever a layer says how it quantizes its input.  Here a stand-in for the CUDA layers does,
over the reference; on a GPU, such models run in test_cuda_deferred.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import Tensor, nn
from torch.nn import functional
from toys import Block, K, Mlp, PlainMlp, RMSNorm, close

import qkernels as qk
from qkernels import deferred, norms, reference, row_ops
from qkernels.backends import PreparedReference
from qkernels.cuda_rows import Codes, RowGrid
from qkernels.deferred import Deferred, QuantizedInput, TakesIntegers
from qkernels.eager import is_plain
from qkernels.fuse import fuse_, unfuse_
from qkernels.nn import QuantLinear
from qkernels.norms import NormHandoff, norm_of


class OnePlusRMSNorm(RMSNorm):
    """As in Gemma."""

    def forward(self, hidden):
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (1.0 + self.weight) * hidden


class Nested(Block):
    def forward(self, hidden):
        hidden = hidden + self.attention(self.first(hidden))[0]
        return hidden + self.mlp(self.second(hidden))


class Straight(Block):
    """The norm's output goes to a Linear of the same parent."""

    def forward(self, hidden):
        return self.mlp.down(hidden) if hidden is None else self.attention.o(self.first(hidden))


class KeepsIt(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        return self.attention(normed)[0] + normed


class ReturnsIt(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        return self.attention(normed)[0], normed


class Changes(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        normed += 1.0
        return self.attention(normed)[0]


class ChangesLater(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        out = self.attention(normed)[0]
        normed += 1.0
        return out + normed


class Sometimes(Block):
    def forward(self, hidden, flag=False):
        normed = self.first(hidden)
        if flag:
            return normed
        return self.attention(normed)[0]


class Twice(Block):
    def forward(self, hidden):
        return self.attention(self.first(hidden))[0] + self.attention(self.first(-hidden))[0]


class Captures(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        later = lambda: normed  # noqa: E731
        return self.attention(normed)[0] + later()


class Integers(TakesIntegers, PreparedReference):
    """Takes integers as the CUDA layers do, over the reference, and counts them."""

    taken = 0

    def input_grid(self) -> RowGrid:
        get = self.tensors.get
        return RowGrid(self.scheme.activation_symmetric, get("act_scale"), get("act_zero_point"), get("inv_smooth"))

    def run(self, x: Tensor) -> Tensor:
        if isinstance(x, Deferred):
            taken = self.over_codes(x)
            if taken is not None:
                return taken
            x = x.value()
        return self.finished(self.product(x, self.tensors, None)) if is_plain(x) else self.around(x)

    def product_of(self, codes: Codes, out_dtype: torch.dtype) -> Tensor:
        Integers.taken += 1
        return prequantized(codes, self.canonical(), self.scheme, self.in_features, out_dtype)


def prequantized(
    codes: tuple[Tensor, Tensor, Tensor | None],
    tensors: dict[str, Tensor],
    scheme: qk.Scheme,
    features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition of a layer over integers."""
    weight = (tensors["weight"], tensors["weight_scale"], tensors.get("bias"), out_dtype)
    if scheme.weight_bits == 8:
        return reference.linear_w8a8_prequantized(*codes, *weight)
    return reference.linear_w4a8_prequantized(
        *codes,
        *weight,
        in_features=features,
        group_size=scheme.resolve_group_size(features),
        weight_zero_point=tensors.get("weight_zero_point"),
        weight_min=tensors.get("weight_min"),
    )


@torch.no_grad()
def quantize_norm(x, weight, bias, eps, grid, *, layer, residual=None, for_gemm=False):
    options = {"symmetric": grid.symmetric, "scale": grid.scale, "zero_point": grid.zero_point}
    total = None if residual is None else reference.add_residual(x, residual)
    x = x if total is None else total
    rows = x.reshape(-1, x.shape[-1])
    if layer:
        got = row_ops.layer_norm_quantize(rows, weight, bias, eps=eps, inv_smooth=grid.inv_smooth, **options)
    else:
        got = row_ops.rms_norm_quantize(rows, weight, eps=eps, inv_smooth=grid.inv_smooth, **options)
    return Codes(*got[:3]), total


@torch.no_grad()
def quantize_activation(x, activation, up, grid, *, for_gemm=False):
    rows = x.reshape(-1, x.shape[-1])
    up = None if up is None else up.reshape(rows.shape)
    options = {"scale": grid.scale, "zero_point": grid.zero_point, "inv_smooth": grid.inv_smooth}
    return Codes(*row_ops.activation_quantize(rows, activation, up, symmetric=grid.symmetric, **options))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "quantize_norm", quantize_norm)
    monkeypatch.setattr(deferred, "quantize_activation", quantize_activation)
    monkeypatch.setattr(Integers, "taken", 0)


def adopt(model: nn.Module) -> nn.Module:
    """Every quantized Linear served by the stand-in."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer._adopt(Integers.from_canonical(layer.canonical(), layer.scheme, layer.in_features))
    return model


def converted(model: nn.Module, scheme: str | qk.Scheme = "w8a8") -> tuple[nn.Module, nn.Module]:
    """Fused over the stand-in, and not fused."""
    torch.manual_seed(0)
    fused, plain = model.eval(), copy.deepcopy(model).eval()
    qk.quantize_(fused, scheme, exclude=())
    qk.quantize_(plain, scheme, exclude=(), fuse=False)
    return adopt(fused), plain


def handing(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m.__dict__.get("forward"), NormHandoff)]


X = seeded(2, 5, K)
ASYMMETRIC = qk.Scheme(activation_symmetric=False)
W4A8 = qk.Scheme.from_preset("w4a8")
SCHEMES = {
    "w8a8": qk.Scheme(),
    "asymmetric": ASYMMETRIC,
    "w4a8": W4A8,
    "w4a8 asymmetric": W4A8.replace(activation_symmetric=False, weight_symmetric=False),
    "w4a8 per channel": qk.Scheme(4),
}


# -- who may ----------------------------------------------------------------------------------------------------------


def test_norms_are_known_by_what_they_compute() -> None:
    assert norm_of(RMSNorm()) == (False, 1e-5)
    assert norm_of(nn.RMSNorm(K, eps=1e-4)) == (False, 1e-4)
    assert norm_of(nn.LayerNorm(K)) == (True, 1e-5)
    assert norm_of(nn.LayerNorm(K, bias=False)) == (True, 1e-5)
    for other in (OnePlusRMSNorm(), nn.LayerNorm((2, K)), nn.RMSNorm(K), nn.Linear(K, K), nn.BatchNorm1d(K)):
        assert norm_of(other) is None
    wrapped = RMSNorm()
    wrapped.forward = lambda x: x  # type: ignore[method-assign]
    assert norm_of(wrapped) is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Block(), ["first", "second"]),
        (Block(nn.LayerNorm), ["first", "second"]),
        (Nested(), ["first", "second"]),
        (nn.Sequential(Block(), Nested()), ["0.first", "0.second", "1.first", "1.second"]),
        (Block(OnePlusRMSNorm), []),
        (KeepsIt(), []),
        (ReturnsIt(), []),
        (Changes(), []),
        (ChangesLater(), []),
        (Sometimes(), []),
        (Twice(), []),
        (Captures(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_linears_read_the_norm(model: nn.Module, expected: list[str]) -> None:
    fused, _ = converted(model)
    assert handing(fused) == expected


def test_readers_have_to_quantize_alike() -> None:
    model = Block().eval()
    qk.quantize_(model, "w8a8", exclude=(), overrides={"attention.k": ASYMMETRIC, "mlp.up": "w8a16"})
    assert handing(model) == []


def test_readers_with_weights_of_several_kinds_quantize_alike(stand_in: None) -> None:
    fused, plain = (Block().eval() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    for model, fuse in ((fused, True), (plain, False)):
        qk.quantize_(model, "w8a8", exclude=(), overrides={"attention.k": "w4a8", "mlp.gate": "w4a8"}, fuse=fuse)
    assert handing(fused) == ["first", "second"]
    with torch.no_grad():
        assert close(adopt(fused)(X), plain(X))
    assert Integers.taken == 5


def test_layers_that_these_kernels_do_not_serve_read_none() -> None:
    groups = qk.Scheme(weight_granularity="per_group", group_size=16)
    for scheme in (groups, groups.replace(activation_bits=None), qk.Scheme(3), qk.Scheme(3, activation_bits=None)):
        model = Block().eval()
        qk.quantize_(model, scheme, exclude=())
        assert handing(model) == []


def test_norms_with_hooks_are_left_alone() -> None:
    model = Block().eval()
    model.first.register_forward_hook(lambda *_: None)
    qk.quantize_(model, "w8a8", exclude=())
    assert handing(model) == ["second"]


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("mlp", [Mlp(), Mlp(nn.GELU()), PlainMlp(nn.GELU("tanh")), PlainMlp(nn.ReLU())], ids=repr)
@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
def test_integers_arrive(stand_in: None, scheme: str | qk.Scheme, mlp: nn.Module, norm: type) -> None:
    fused, plain = converted(Block(norm, copy.deepcopy(mlp)), scheme)
    with torch.no_grad():
        assert close(fused(X), plain(X))
    readers = 2 + (2 if type(mlp) is Mlp else 1) + 1  # q and k, gate and up (or up), down
    assert Integers.taken == readers
    assert not isinstance(fused(X), Deferred)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_integers_are_those_of_the_definition(stand_in: None, scheme: qk.Scheme) -> None:
    fused, _ = converted(Block(), scheme)
    layer = fused.attention.q
    with torch.no_grad():
        normed = fused.first(X)
        assert isinstance(normed, QuantizedInput)
        y = layer(normed)
    normed = reference.rms_norm(X, fused.first.weight, 1e-5)
    codes = reference.quantize_activations(normed, symmetric=scheme.activation_symmetric)
    assert_bits_equal(y, prequantized(codes, layer.canonical(), scheme, K, torch.float32))
    assert_bits_equal(y, reference.linear(normed, layer.canonical(), scheme, K))


@pytest.mark.parametrize("inference", [False, True])
def test_everybody_else_sees_the_module_s_own_output(stand_in: None, inference: bool) -> None:
    fused, plain = converted(Block())
    with torch.inference_mode() if inference else torch.no_grad():
        normed, wanted = fused.first(X), plain.first(X)
        assert isinstance(normed, QuantizedInput)
        assert normed.shape == X.shape
        assert normed.dtype == X.dtype
        assert normed._value is None
        assert_bits_equal(normed + 0.0, wanted + 0.0)
        assert_bits_equal(torch.cat([normed[:, :2], normed[:, 2:]], 1), wanted)
        assert_bits_equal(functional.linear(normed, torch.eye(K)), functional.linear(wanted, torch.eye(K)))
        assert "tensor" in repr(normed)
        assert close(fused.attention(normed)[0], plain.attention(wanted)[0])


def test_writing_to_it_makes_the_values_count(stand_in: None) -> None:
    fused, plain = converted(Block())
    with torch.no_grad():
        normed, wanted = fused.first(X), plain.first(X)
        alias = normed
        normed += 1.0
        normed[0, 0] = 3.0
        normed.view(-1)[5] = -2.0
        wanted += 1.0
        wanted[0, 0] = 3.0
        wanted.view(-1)[5] = -2.0
        assert alias is normed
        assert_bits_equal(normed.clone(), wanted)
        assert_bits_equal(fused.attention.q(normed), plain.attention.q(wanted))
    assert Integers.taken == 0


def test_input_changed_before_the_values_were_read_is_an_error(stand_in: None) -> None:
    fused, _ = converted(Block())
    x = X.clone()
    with torch.no_grad():
        normed = fused.first(x)
        x.add_(1.0)
        fused.attention.q(normed)  # the integers were there already
        with pytest.raises(RuntimeError, match="changed in place"):
            normed.sum()


def test_other_readers_take_the_values(stand_in: None) -> None:
    """A layer that quantizes another way, or was changed since, gets what the norm computes."""
    fused, plain = converted(Block())
    smooth = torch.linspace(0.5, 2.0, K)
    fused.attention.k._buffers["inv_smooth"] = smooth
    plain.attention.k._buffers["inv_smooth"] = smooth
    plain.attention.k._prepared.moved()
    with torch.no_grad():
        normed = fused.first(X)
        fused.attention.q(normed)
        assert Integers.taken == 1
        assert close(fused.attention.k(normed), plain.attention.k(plain.first(X)))
        assert Integers.taken == 1
        fused.attention.q._buffers["inv_smooth"] = smooth.clone()  # equal again, on the norm's side too
        fused.attention.k(fused.first(X))
        assert Integers.taken == 2
        fused.attention.k._buffers["inv_smooth"].mul_(2.0)
        fused.attention.k(fused.first(X))
        assert Integers.taken == 2


def test_gradients_hooks_and_transforms_go_the_old_way(stand_in: None) -> None:
    fused, plain = converted(Block())
    x = X.clone().requires_grad_()
    fused(x).sum().backward()
    wanted = X.clone().requires_grad_()
    plain(wanted).sum().backward()
    assert close(x.grad, wanted.grad)  # type: ignore[arg-type]
    assert fused.first.weight.grad is not None
    assert Integers.taken == 0
    fused.zero_grad()
    fused(X).sum().backward()  # parameters alone
    assert fused.first.weight.grad.abs().sum() > 0
    assert Integers.taken == 0
    seen = []
    handle = fused.first.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        fused(X)
    assert type(seen[0]) is Tensor
    handle.remove()
    with torch.no_grad():
        assert close(torch.func.vmap(fused)(X), plain(X))
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.attention.q(fused.first(X)).dtype == torch.bfloat16
        normed = fused.first(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.attention.q(normed).dtype == torch.bfloat16


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_go_the_old_way(stand_in: None, whole: bool) -> None:
    fused, plain = converted(Block())
    compiled = torch.compile(fused, backend="eager", fullgraph=True) if whole else fused
    if not whole:
        fused.mlp.compile(backend="eager")
    with torch.no_grad():
        assert close(compiled(X), plain(X))


# -- copies, and the way back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_hand_over_among_themselves(stand_in: None, how: str) -> None:
    fused, plain = converted(Block())
    clone = copy.deepcopy(fused) if how == "deepcopy" else adopt(pickle.loads(pickle.dumps(fused)))
    assert clone.first.forward._module is clone.first
    assert clone.first.forward._handoff._reader() is clone.attention.q
    assert clone.mlp.gate._feeds[0]._reader() is clone.mlp.down
    assert clone.mlp.gate._prepared.feeds is clone.mlp.gate._feeds
    for layer in fused.modules():
        if isinstance(layer, QuantLinear):
            layer._prepared.tensors["weight_scale"].zero_()
    with torch.no_grad():
        assert close(clone(X), plain(X))
    assert Integers.taken == 5


def test_a_layer_is_stored_alone() -> None:
    fused, _ = converted(Block())
    alone = len(pickle.dumps(fused.mlp.gate))
    assert alone < 2 * (48 * K + 48 * 8) + 4000  # its weight, not that of the next layer


def test_unfuse_and_dequantize_take_it_apart(stand_in: None) -> None:
    fused, plain = converted(Block())
    names = list(fused.state_dict())
    assert names == list(plain.state_dict())
    with torch.no_grad():
        before = fused(X)
        unfuse_(fused)
        assert handing(fused) == []
        assert all(m._reads is None and m._feeds is None for m in fused.modules() if isinstance(m, QuantLinear))
        Integers.taken = 0
        assert close(fused(X), before)
        assert Integers.taken == 0
        fuse_(fused)
        assert handing(fused) == ["first", "second"]
        assert_bits_equal(fused(X), before)
        qk.dequantize_(fused)
    assert handing(fused) == []
    assert type(fused.first(X)) is Tensor


def test_unfuse_reaches_a_forward_that_was_wrapped(stand_in: None) -> None:
    """As accelerate's hooks do."""
    fused, plain = converted(Block())
    wrapped = fused.first.forward
    fused.first.forward = lambda x: wrapped(x)
    with torch.no_grad():
        assert isinstance(fused.first(X), QuantizedInput)
        unfuse_(fused)
        assert type(fused.first(X)) is Tensor
        assert_bits_equal(fused.first(X), plain.first(X))


def test_a_failed_fusion_is_taken_back(stand_in: None) -> None:
    fused, _ = converted(Block())
    undo = []
    unfuse_(fused, on_failure=undo.append)
    undo[0]()
    assert handing(fused) == ["first", "second"]
    with torch.no_grad():
        fused(X)
    assert Integers.taken == 5
    unfuse_(fused)
    fuse_(fused, on_failure=undo.append)
    undo[1]()
    assert handing(fused) == []
    assert all(m._reads is None and m._feeds is None for m in fused.modules() if isinstance(m, QuantLinear))
