"""Sums that wait for the norm behind them: which Linear gives a term, what everybody sees, copies and the way back.

As in test_deferred.py, layers over the reference stand for those of a GPU; there, such models run in
test_cuda_deferred.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_bits_equal, seeded
from test_deferred import Integers, adopt, converted, quantize_activation, quantize_norm
from torch import Tensor, nn
from toys import Block, K, close

import qkernels as qk
from qkernels import deferred, norms
from qkernels.deferred import Deferred, PendingSum
from qkernels.fuse import fuse_, unfuse_
from qkernels.nn import QuantLinear
from qkernels.sums import linear_added_before

X = seeded(2, 5, K)


class Nested(Block):
    def forward(self, hidden):
        hidden = hidden + self.attention(self.first(hidden))[0]
        return self.mlp(self.second(hidden)) + hidden


class Named(Block):
    def forward(self, hidden):
        normed = self.first(hidden)
        given, _ = self.attention(normed)
        total = given + hidden
        stream = total
        given = self.mlp(self.second(stream))
        out = stream + given
        return out, None


class Scaled(Block):
    def forward(self, hidden):
        hidden = hidden + self.attention(self.first(hidden))[0] * 0.5
        return hidden + self.mlp(self.second(hidden)) * 0.5


class NormsBehind(Block):
    """As Gemma's: what is added went through a norm."""

    def forward(self, hidden):
        hidden = hidden + self.second(self.attention(hidden)[0])
        return hidden + self.mlp(self.first(hidden))


class Sometimes(Block):
    def forward(self, hidden, flag=False):
        given = self.attention(self.first(hidden))[0]
        if flag:
            given = given * 2
        hidden = hidden + given
        return hidden + self.mlp(self.second(hidden))


class Early(Block):
    def forward(self, hidden, flag=False):
        if flag:
            return hidden
        hidden = hidden + self.attention(self.first(hidden))[0]
        return hidden + self.mlp(self.second(hidden))


class Writes(Block):
    """To a term, after the sum."""

    def forward(self, hidden):
        total = hidden + self.attention(self.first(hidden))[0]
        hidden.zero_()
        return total + self.mlp(self.second(total))


class WritesSometimes(Block):
    def forward(self, hidden):
        total = hidden + self.attention(self.first(hidden))[0]
        if total.shape[0] > 100:
            hidden.zero_()
        return total + self.mlp(self.second(total))


class Augmented(Block):
    def forward(self, hidden):
        given = self.attention(self.first(hidden))[0]
        given += hidden
        return given + self.mlp(self.second(given))


@pytest.mark.parametrize(
    ("kind", "second", "first"),
    [
        (Block, "attention.o", "mlp.down"),
        (Nested, "attention.o", "mlp.down"),
        (Named, "attention.o", "mlp.down"),
        (Scaled, None, None),
        (NormsBehind, None, "mlp.down"),
        (Sometimes, None, "mlp.down"),
        (Early, "attention.o", None),
        (Writes, None, "mlp.down"),
        (WritesSometimes, None, "mlp.down"),
        (Augmented, None, "mlp.down"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_terms_are_found_in_the_source(kind: type, second: str | None, first: str | None) -> None:
    one, two = kind(), Block()

    def linear(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    assert linear_added_before(one, "second", None, linear) is (None if second is None else one.get_submodule(second))
    assert linear_added_before(two, "first", one, linear) is (None if first is None else one.get_submodule(first))
    assert linear_added_before(two, "first", None, linear) is None


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_terms_are_found_in_transformers(name: str, scheme: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(name, **sizes, num_key_value_heads=2, vocab_size=40)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    qk.quantize_(model, scheme)
    one, two = model.model.layers
    assert one.mlp.gate_proj._feeds == (one.mlp.down_proj._reads, True)
    assert one.self_attn.o_proj._adds is one.post_attention_layernorm.forward._handoff
    assert one.mlp.down_proj._adds is two.input_layernorm.forward._handoff
    assert two.mlp.down_proj._adds is None


# -- what comes out ---------------------------------------------------------------------------------------------------


class Counts:
    """The stand-in for the fused norm; what it was given to add."""

    def __init__(self) -> None:
        self.totals: list[Tensor | None] = []

    def __call__(self, *args, **kwargs):
        codes, total = quantize_norm(*args, **kwargs)
        self.totals.append(total)
        return codes, total


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    counts = Counts()
    monkeypatch.setattr(norms, "quantize_norm", counts)
    monkeypatch.setattr(deferred, "quantize_activation", quantize_activation)
    monkeypatch.setattr(Integers, "taken", 0)
    return counts


def blocks(kind: type = Block) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return converted(nn.Sequential(kind(), kind()))


@pytest.mark.parametrize("kind", [Block, Nested])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("inference", [False, True])
def test_norms_form_the_sums(counts: Counts, kind: type, norm: type | None, inference: bool) -> None:
    torch.manual_seed(0)
    fused, plain = converted(nn.Sequential(*(kind() if norm is None else kind(norm) for _ in range(2))))
    with torch.inference_mode() if inference else torch.no_grad():
        y = fused(X)
        assert close(y, plain(X))
    assert [total is not None for total in counts.totals] == [False, True, True, True]
    assert Integers.taken == 10
    assert type(y) is Tensor


def test_sums_are_torch_s_to_the_bit(counts: Counts) -> None:
    fused, _ = blocks()
    one = fused[0]
    with torch.no_grad():
        given = one.attention(one.first(X))[0]
        assert isinstance(given, Deferred)
        assert given.shape == X.shape
        wanted = X + given.value()
        waiting = X + given
        assert isinstance(waiting, PendingSum)
        assert waiting._value is None
        assert_bits_equal(waiting.clone(), wanted)
        for other in (given + X, torch.add(X, given), given.add(X)):
            assert isinstance(other, PendingSum)
            one.second(other)
            assert other._value is counts.totals[-1]
            assert_bits_equal(other + 0.0, wanted + 0.0)
        before = len(counts.totals)
        one.second(waiting)  # whose values are there
        assert counts.totals[before:] == [None]
        assert_bits_equal(given * 2.0, (wanted - X).mul(0) + given.value() * 2.0)


def test_everybody_sees_the_sum(counts: Counts) -> None:
    """A hook on a block, one on the Linear, a reader between."""
    fused, plain = blocks()
    seen: list[Tensor] = []
    handle = fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        fused(X)
        assert isinstance(seen[0], PendingSum)
        assert_bits_equal(seen[0].clone(), counts.totals[2])
        for other in (pickle.loads(pickle.dumps(seen[0])), copy.deepcopy(seen[0]), seen[0].to("cpu", copy=True)):
            assert type(other) is Tensor
            assert_bits_equal(other, counts.totals[2])
        assert_bits_equal(torch.from_numpy(seen[0].numpy()), counts.totals[2])
        handle.remove()
        stream = fused[0](X)
        assert close(stream, plain[0](X))
        stream.mul_(2.0)
        assert close(fused[1](stream), plain[1](plain[0](X) * 2.0))
        inner: list[Tensor] = []
        fused[0].mlp.down.register_forward_hook(lambda module, args, output: inner.append(output))
        fused(X)
        assert type(inner[0]) is Tensor


def test_terms_changed_in_place(counts: Counts) -> None:
    fused, _ = blocks()
    one = fused[0]
    with torch.no_grad():
        x = X.clone()
        given = one.attention(one.first(X))[0]
        values = given.value().clone()
        given.mul_(2.0)
        assert_bits_equal(x + given, X + values * 2.0)
        given = one.attention(one.first(X))[0]
        given += x
        assert_bits_equal(given.clone(), values + X)
        waiting = x + one.attention(one.first(X))[0]
        x.zero_()
        with pytest.raises(RuntimeError, match="changed in place"):
            waiting.sum()
        assert waiting.terms() is None
        assert type(one.attention(one.first(X))[0] + 1.0) is Tensor
        assert type(one.attention(one.first(X))[0] + X.double()) is Tensor


def test_gradients_autocast_and_compilation_go_the_old_way(counts: Counts) -> None:
    fused, plain = blocks()
    x, wanted = X.clone().requires_grad_(), X.clone().requires_grad_()
    fused(x).sum().backward()
    plain(wanted).sum().backward()
    assert close(x.grad, wanted.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        assert close(torch.compile(fused, backend="eager", fullgraph=True)(X), plain(X))
        assert close(torch.func.vmap(fused)(X), plain(X))
        with torch.autocast("cpu", torch.bfloat16):
            fused(X)
    assert not counts.totals


def test_no_sum_waits_where_no_kernel_takes_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    report = qk.quantize_(model, "w8a8", exclude=())
    assert model[0].attention.o._adds is not None
    assert "added" not in (report["0.attention.o"].reason or "")
    with torch.no_grad():
        assert type(model[0].attention(X)[0]) is Tensor
    other = nn.Sequential(Block(), Block()).eval()
    qk.quantize_(other, qk.Scheme(3), exclude=())
    assert other[0].attention.o._adds is None


# -- copies, and the way back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_add_among_themselves(counts: Counts, how: str) -> None:
    fused, plain = blocks()
    clone = copy.deepcopy(fused) if how == "deepcopy" else adopt(pickle.loads(pickle.dumps(fused)))
    assert clone[0].mlp.down._adds is clone[1].attention.q._reads is not fused[1].attention.q._reads
    with torch.no_grad():
        assert close(clone(X), plain(X))
    assert sum(total is not None for total in counts.totals) == 3


def test_unfuse_and_a_failed_fusion(counts: Counts) -> None:
    fused, plain = blocks()
    undo = []
    unfuse_(fused, on_failure=undo.append)
    assert all(layer._adds is None for layer in fused.modules() if isinstance(layer, QuantLinear))
    with torch.no_grad():
        assert close(fused(X), plain(X))
        assert not counts.totals
        undo[0]()
        assert fused[0].mlp.down._adds is fused[1].attention.q._reads
        fused(X)
        assert sum(total is not None for total in counts.totals) == 3
    unfuse_(fused)
    fuse_(fused, on_failure=undo.append)
    assert fused[0].attention.o._adds is not None
    undo[1]()
    assert all(layer._adds is None for layer in fused.modules() if isinstance(layer, QuantLinear))
