"""Residuals added inside a Linear: the bits on every tier, every way around the direct call, which modules do it."""

from __future__ import annotations

import copy
import pickle

import families
import helpers as H
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import reference
from qkernels.epilogues import EPILOGUES
from qkernels.fuse import fuse_, unfuse_
from qkernels.nn import QuantLinear
from qkernels.residuals import adds_inside
from qkernels.scheme import PRESETS, Scheme

STATIC = {"act_scale": torch.tensor(0.02)}
by_scheme = pytest.mark.parametrize("scheme", H.SERVED, ids=lambda s: s.name)


def layer(scheme: Scheme, n: int, k: int, epilogue: str | None = None) -> QuantLinear:
    given = {} if scheme.activation_dynamic else STATIC
    made = QuantLinear.from_float(H.seeded(n, k), H.seeded(n, seed=1), scheme, **given)
    made.epilogue = epilogue
    return made


def expected_sum(made: QuantLinear, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """From the float32 output of the same tier: one addition, one rounding."""
    y = made._prepared.product(x, made._prepared.tensors, torch.float32)
    if made.epilogue is not None:
        y = torch.ops.qkernels.epilogue(y, made.epilogue, None)
    return (y + residual.float()).to(x.dtype)


# -- the kernels ------------------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 70), (192, 513), (128, 1100)])
def test_sum_is_rounded_once(scheme, n, k, isa, threads):
    for epilogue in (None, "gelu"):
        made = layer(scheme, n, k, epilogue)
        for m in (1, 2, 7, 40):
            for dtype in H.DTYPES:
                x, residual = H.seeded(m, k, seed=m).to(dtype), 30 * H.seeded(m, n, seed=m + 1).to(dtype)
                x[0, 0] = float("nan")
                residual[-1, -1] = float("inf")
                got = made(x, residual=residual)
                H.assert_bits_equal(got, expected_sum(made, x, residual))
                if dtype == torch.float32:
                    H.assert_bits_equal(got, made(x) + residual)


@pytest.mark.parametrize("name", ["w3a16", "w2a16"])
@pytest.mark.parametrize("dtype", H.DTYPES)
def test_reference_adds_as_torch_does(name, dtype):
    made = layer(PRESETS[name], 12, 70)
    x, residual = H.seeded(5, 70).to(dtype), H.seeded(5, 12, seed=3).to(dtype)
    H.assert_bits_equal(made(x, residual=residual), made(x) + residual)


@pytest.mark.parametrize("scheme", [Scheme(), PRESETS["w4a8"]], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", H.DTYPES)
def test_integer_schemes_equal_the_reference(scheme, dtype, isa):
    made = layer(scheme, 130, 96)
    x, residual = H.seeded(9, 96).to(dtype), H.seeded(9, 130, seed=3).to(dtype)
    expected = reference.linear(x, made.canonical(), scheme, 96, residual=residual)
    H.assert_bits_equal(made(x, residual=residual), expected)


def test_residual_as_a_view(isa):
    made, x = layer(Scheme(), 70, 96), H.seeded(6, 96)
    wide = H.seeded(6, 150)
    for residual in (wide[:, 5:75], H.seeded(70, 6).T, wide[:, ::2][:, :70], H.seeded(70).expand(6, 70)):
        H.assert_bits_equal(made(x, residual=residual), made(x) + residual)
    batched = H.seeded(2, 3, 70)
    H.assert_bits_equal(made(x.view(2, 3, 96), residual=batched).view(6, 70), made(x, residual=batched.view(6, 70)))


def test_no_rows():
    assert layer(Scheme(), 5, 4)(torch.empty(0, 4), residual=torch.empty(0, 5)).shape == (0, 5)


@by_scheme
def test_wrong_residual_is_refused(scheme):
    made, x = layer(scheme, 5, 4), H.seeded(3, 4)
    for residual, error, text in (
        (H.seeded(3, 4), ValueError, r"residual: expected shape \(3, 5\), got \(3, 4\)"),
        (H.seeded(5), ValueError, r"residual: expected shape \(3, 5\), got \(5,\)"),
        (H.seeded(3, 5).bfloat16(), TypeError, "residual: expected dtype torch.float32, that of the output"),
        (1.0, TypeError, "residual: expected a torch.Tensor or None, got float"),
        (torch.empty(3, 5, device="meta"), ValueError, "residual: expected device cpu"),
    ):
        for call in (made, made.requires_grad_()):
            with pytest.raises(error, match=text):
                call(x, residual=residual)
        with pytest.raises(error, match=text):
            made(x.clone().requires_grad_(), residual=residual)


# -- around the direct call -------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.parametrize("epilogue", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_the_same_bits(scheme, epilogue, dtype):
    made = layer(scheme, 33, 72, epilogue)
    x, residual = H.seeded(4, 72).to(dtype), H.seeded(4, 33, seed=2).to(dtype)
    direct = made(x, residual=residual)
    H.assert_bits_equal(made._prepared.call(x, made._prepared.tensors, residual), direct)
    H.assert_bits_equal(made(x, residual=residual.clone().requires_grad_()).detach(), direct)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: made(a, residual=b), fullgraph=True)
    H.assert_bits_equal(compiled(x, residual), direct)


def test_autocast_gives_the_output_its_dtype():
    made, x = layer(Scheme(), 33, 72), H.seeded(4, 72)
    residual = H.seeded(4, 33).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H.assert_bits_equal(made(x, residual=residual), made(x.bfloat16(), residual=residual))


@by_scheme
def test_gradients_reach_both(scheme):
    made = layer(scheme, 33, 72, "gelu")
    x, residual = H.seeded(4, 72).requires_grad_(), H.seeded(4, 33).requires_grad_()
    a, b = x.detach().clone().requires_grad_(), residual.detach().clone().requires_grad_()
    made(x, residual=residual).square().sum().backward()
    (made(a) + b).square().sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(residual.grad, b.grad)


def test_transforms():
    made, x, residual = layer(Scheme(), 33, 72), H.seeded(4, 72), H.seeded(4, 33)
    through = torch.func.vmap(lambda a, b: made(a, residual=b))(x, residual)
    torch.testing.assert_close(through, made(x, residual=residual))
    slope = torch.func.grad(lambda b: made(x, residual=b).sum())(residual)
    assert torch.equal(slope, torch.ones_like(residual))


@pytest.mark.filterwarnings("ignore")
@by_scheme
def test_operators_take_it(scheme):
    made, x = layer(scheme, 33, 72), H.seeded(4, 72)
    residual, prepared = H.seeded(4, 33), made._prepared
    if scheme.name.startswith("w8a8"):
        get, name = prepared.tensors.get, "linear_w8a8"
        given = [get("packed"), get("colsum"), get("weight_scale"), get("bias"), 33, 72, False, True]
        given += [get("act_scale"), get("act_zero_point"), get("inv_smooth")]
    else:
        name = "linear_packed"
        given = [*(prepared.tensors.get(n) for n in prepared.names), prepared.scheme_key, 33, 72]
    op = getattr(torch.ops.qkernels, name)
    H.assert_bits_equal(op(x, *given, None, residual), made(x, residual=residual))
    x.requires_grad_()
    torch.library.opcheck(op.default, (x, *given, None, residual.clone().requires_grad_()))
    torch.library.opcheck(op.default, (x, *given, None, residual))
    torch.library.opcheck(op.default, (x, *given, None))
    with pytest.raises(TypeError, match="residual: expected dtype"):
        op(x.detach(), *given, torch.bfloat16, residual)


@pytest.mark.filterwarnings("ignore")
def test_operator_of_the_reference_takes_it():
    scheme = Scheme(weight_granularity="per_group", group_size=32)
    made, x, residual = layer(scheme, 33, 72), H.seeded(4, 72), H.seeded(4, 33)
    assert made.kernel == "reference"
    H.assert_bits_equal(made(x, residual=residual), made(x) + residual)
    get = made._prepared.tensors.get
    given = [*map(get, made._prepared.names), made._prepared.scheme_key, 72, torch.bfloat16]
    op, rounded = torch.ops.qkernels.linear_quantized, residual.bfloat16()
    H.assert_bits_equal(op(x, *given, rounded), (made(x) + rounded.float()).bfloat16())
    torch.library.opcheck(op.default, (x.requires_grad_(), *given, rounded.requires_grad_()))


def test_functional_takes_it():
    weight = torch.randint(-127, 128, (33, 72), dtype=torch.int8)
    packed, colsum, minus = qk.ops.pack_w8(weight)
    x, residual = H.seeded(4, 72), H.seeded(4, 33)
    options = {"in_features": 72, "has_minus128": minus}
    args = (x, packed, colsum, torch.rand(33))
    H.assert_bits_equal(
        qk.ops.linear_w8a8(*args, **options, residual=residual), qk.ops.linear_w8a8(*args, **options) + residual
    )


# -- modules that add -------------------------------------------------------------------------------------------------


class Output(nn.Module):
    """As in BERT."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(32, 16), nn.LayerNorm(16), nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """With a docstring."""
        hidden = self.dense(hidden)
        hidden = self.dropout(hidden)
        return self.norm(hidden + input_tensor)


class OtherSide(Output):
    def forward(self, hidden, input_tensor):
        return input_tensor + self.dense(hidden)


class AddsItsInput(Output):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)

    def forward(self, hidden, input_tensor):
        return hidden + self.dropout(self.dense(hidden))


class Branches(Output):
    def forward(self, hidden, input_tensor):
        hidden = self.dense(hidden)
        if self.training:
            hidden = self.dropout(hidden)
        return self.norm(hidden + input_tensor)


class Scales(Output):
    def forward(self, hidden, input_tensor):
        return self.norm(self.dense(hidden) * 2 + input_tensor)


class Twice(Output):
    def forward(self, hidden, input_tensor):
        y = self.dense(hidden)
        return self.norm(y + input_tensor) + y


class Unused(Output):
    def forward(self, hidden, input_tensor):
        self.dropout(hidden)
        return self.norm(self.dense(hidden) + input_tensor)


class Forgotten(Output):
    def forward(self, hidden, input_tensor):
        y = self.dropout(hidden)
        y = self.dense(hidden)
        return y + input_tensor


class NormFirst(Output):
    def forward(self, hidden, input_tensor):
        return self.norm(self.dense(hidden)) + input_tensor


class Optional(Output):
    def forward(self, hidden, input_tensor=None):
        return self.dense(hidden) + input_tensor


class Decorated(Output):
    @torch.no_grad()
    def forward(self, hidden, input_tensor):
        return self.dense(hidden) + input_tensor


class InPlace(Output):
    def forward(self, hidden, input_tensor):
        hidden = self.dense(hidden)
        hidden += input_tensor
        return hidden


class Property(Output):
    @property
    def extra(self):
        return self.dense

    def forward(self, hidden, input_tensor):
        return self.extra(hidden) + input_tensor


def converted(block: nn.Module, **options) -> tuple[nn.Module, nn.Module, qk.Report]:
    """The block in a model, quantized with fusion and without."""
    fused, plain = nn.ModuleList([block]).eval(), nn.ModuleList([copy.deepcopy(block)]).eval()
    report = qk.quantize_(fused, exclude=(), **options)
    qk.quantize_(plain, exclude=(), fuse=False, **options)
    return fused, plain, report


def inputs(dtype: torch.dtype = torch.float32, features: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return H.seeded(5, features).to(dtype), H.seeded(5, 16, seed=2).to(dtype)


class Calls:
    """Counts the calls of layers with a residual."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        forward = QuantLinear.forward

        def counted(layer, input, *, residual=None):
            self.count += residual is not None
            return forward(layer, input, residual=residual)

        monkeypatch.setattr(QuantLinear, "forward", counted)


@by_scheme
@pytest.mark.parametrize("kind", [Output, OtherSide])
def test_block_adds_inside_and_keeps_its_bits(scheme, kind, monkeypatch):
    if not scheme.activation_dynamic:
        scheme = Scheme()
    fused, plain, report = converted(kind(), scheme=scheme)
    assert adds_inside(fused[0])
    assert type(fused[0]).__name__ == kind.__name__
    assert isinstance(fused[0], kind)
    assert "adds input_tensor" in next(entry.reason for entry in report.layers if entry.name == "0.dense")
    hidden, residual = inputs()
    expected, calls = plain[0](hidden, residual), Calls(monkeypatch)
    for args, kwargs in (
        ((hidden, residual), {}),
        ((hidden,), {"input_tensor": residual}),
        ((), {"input_tensor": residual, "hidden": hidden}),
    ):
        H.assert_bits_equal(fused[0](*args, **kwargs), expected)
    assert calls.count == 3
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_block_that_adds_its_own_input():
    fused, plain, _ = converted(AddsItsInput())
    x, other = inputs(features=16)
    assert adds_inside(fused[0])
    H.assert_bits_equal(fused[0](x, other), plain[0](x, other))


def test_bfloat16_is_rounded_once():
    fused, plain, _ = converted(OtherSide().bfloat16())
    hidden, residual = inputs(torch.bfloat16)
    wide = plain[0].dense._prepared.product(hidden, plain[0].dense._prepared.tensors, torch.float32)
    H.assert_bits_equal(fused[0](hidden, residual), (wide + residual).bfloat16())


@pytest.mark.parametrize(
    "kind",
    [Branches, Scales, Twice, Unused, Forgotten, NormFirst, Optional, Decorated, InPlace, Property],
    ids=lambda kind: kind.__name__,
)
def test_other_forms_are_left_alone(kind):
    fused, plain, _ = converted(kind())
    assert not adds_inside(fused[0])
    assert type(fused[0]) is kind
    H.assert_bits_equal(fused[0](*inputs()), plain[0](*inputs()))


def test_hooks_and_shared_children_are_left_alone():
    for name in ("dense", "dropout"):
        block, seen = Output(), []
        getattr(block, name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        fused, _, _ = converted(block)
        assert not adds_inside(fused[0])
    blocks = nn.ModuleList([Output(), Output()])
    blocks[1].dense = blocks[0].dense
    qk.quantize_(blocks, exclude=())
    assert not any(adds_inside(block) for block in blocks)


def test_float_linear_is_left_alone():
    model = nn.ModuleList([Output(), nn.Linear(16, 16)])
    qk.quantize_(model, exclude=("0.dense",))
    assert not adds_inside(model[0])


def test_own_forward_runs_where_the_linear_cannot_add(monkeypatch):
    fused, plain, _ = converted(Output(0.5))
    calls = Calls(monkeypatch)
    hidden, residual = inputs()
    fused.train()
    plain.train()
    torch.manual_seed(1)
    dropped = fused[0](hidden, residual)
    torch.manual_seed(1)
    H.assert_bits_equal(dropped, plain[0](hidden, residual))
    fused.eval()
    plain.eval()
    row = residual[:1]
    H.assert_bits_equal(fused[0](hidden, row), plain[0](hidden, row))  # broadcast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H.assert_bits_equal(fused[0](hidden, residual), plain[0](hidden, residual))
    seen = []
    handle = fused[0].dense.register_forward_hook(lambda module, args, output: seen.append(output))
    H.assert_bits_equal(fused[0](hidden, residual), plain[0](hidden, residual))
    H.assert_bits_equal(seen[0], plain[0].dense(hidden))
    handle.remove()
    handle = fused[0].dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    H.assert_bits_equal(fused[0](hidden, residual), plain[0](hidden, residual))
    H.assert_bits_equal(seen[1], plain[0].dense(hidden))
    handle.remove()
    fused[0].dense = nn.Linear(32, 16)
    fused[0](hidden, residual)
    with pytest.raises(TypeError):
        fused[0](hidden)
    with pytest.raises(TypeError):
        fused[0](hidden, residual, residual)
    assert calls.count == 0


def test_gradients_through_a_block():
    fused, plain, _ = converted(Output())
    ours, theirs = ([t.requires_grad_() for t in inputs()] for _ in range(2))
    fused[0](*ours).square().sum().backward()
    plain[0](*theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_way_back_and_again():
    fused, plain, _ = converted(Output())
    unfuse_(fused)
    assert type(fused[0]) is Output
    assert fused[0].__dict__.keys() == plain[0].__dict__.keys()
    assert fuse_(fused) == {"0.dense": "adds input_tensor", "0.norm": "a norm, by a kernel"}
    assert fuse_(fused) == {}
    qk.dequantize_(fused)
    assert type(fused[0]) is Output
    assert type(fused[0].dense) is nn.Linear


def test_failure_puts_the_class_back(monkeypatch):
    model = nn.ModuleList([Output()])
    with monkeypatch.context() as patch:
        patch.setattr("qkernels.convert.account", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            qk.quantize_(model, exclude=())
    assert type(model[0]) is Output
    assert type(model[0].dense) is nn.Linear
    qk.quantize_(model, exclude=())
    monkeypatch.setattr("qkernels.convert.account", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qk.dequantize_(model)
    assert adds_inside(model[0])
    assert isinstance(model[0].dense, QuantLinear)


def test_copies_pickles_saved_and_compiled(tmp_path):
    fused, plain, _ = converted(Output())
    expected = plain[0](*inputs())
    qk.save(fused, tmp_path / "out")
    loaded = nn.ModuleList([Output()]).eval()
    qk.load(loaded, tmp_path / "out")
    torch.save(fused, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded, whole):
        assert adds_inside(other[0])
        H.assert_bits_equal(other[0](*inputs()), expected)
        qk.dequantize_(other)
        assert type(other[0]) is Output
    compiled = torch.compile(fused[0], fullgraph=True)(*inputs())
    torch.testing.assert_close(compiled, expected)


def test_encoder_of_transformers():
    model = families.build("bert")
    plain = copy.deepcopy(model)
    report = qk.quantize_(model)
    qk.quantize_(plain, fuse=False)
    assert sum("adds input_tensor" in (entry.reason or "") for entry in report.layers) == 4
    ids = torch.randint(0, families.VOCABULARY, (2, 7))
    torch.testing.assert_close(model(ids)[0], plain(ids)[0], rtol=2e-2, atol=2e-2)


def test_every_epilogue_before_the_sum(isa):
    for name in EPILOGUES:
        made, x, residual = layer(Scheme(), 64, 64, name), H.seeded(8, 64), H.seeded(8, 64)
        H.assert_bits_equal(made(x, residual=residual), made(x) + residual)
