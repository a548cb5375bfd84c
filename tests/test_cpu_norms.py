"""Norms on the CPU: every tier against the definition, and models whose norms the kernel computes."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from helpers import assert_bits_equal, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map_only

import qkernels as qk
from qkernels import _C, cpu_norms, reference
from qkernels.norms import NormForward, NormHandoff

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a last place, relative
KINDS = [(False, None), (False, "weight"), (True, None), (True, "weight"), (True, "bias")]


def factors(features: int, dtype: torch.dtype, affine: str | None) -> tuple[Tensor | None, Tensor | None]:
    weight = None if affine is None else seeded(features, seed=7).to(dtype)
    return weight, seeded(features, seed=8).to(dtype) if affine == "bias" else None


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool) -> Tensor:
    """The kernel's result, which must be the definition's within what qkernels/_fused.py grants its statistics, and one
    rounding."""
    y = cpu_norms.normalize(x, weight, bias, eps, layer=layer)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.is_contiguous()
    exact = reference.layer_norm(x, weight, bias, eps) if layer else reference.rms_norm(x, weight, eps)
    assert torch.equal(y.isnan(), exact.isnan())
    wide, w = x.double(), 1.0 if weight is None else weight.double().abs()
    mean = wide.mean(-1, keepdim=True) if layer else torch.zeros_like(wide[..., :1])
    rstd = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    off = 2.0**-18 * (wide - mean).abs() * rstd * w  # the deviation
    if layer:
        off = off + 2.0**-17 * wide.abs().mean(-1, keepdim=True) * rstd * w  # the mean
    terms = (wide - mean).abs() * rstd * w + (0.0 if bias is None else bias.double().abs())
    bound = off + 2.0**-22 * terms + 1.01 * UNITS[x.dtype] * exact.double().abs() + 2.0**-25
    wrong = ((y.double() - exact.double()).abs() > bound) & ~exact.isnan()
    assert not wrong.any(), wrong.nonzero()[0]
    return y


FEATURES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 130, 384, 576, 1000, 1024, 1025, 4096, 4097, 9000)


@pytest.mark.parametrize("features", FEATURES)
def test_norm_of_any_width(isa: str, features: int) -> None:
    for dtype, (layer, affine) in itertools.product(DTYPES, KINDS):
        x = (seeded(5, features, seed=features) * 3 + 1).to(dtype)
        check(x, *factors(features, dtype, affine), 1e-5, layer)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 100])
def test_norm_of_any_number_of_rows(isa: str, threads: int, rows: int) -> None:
    for dtype, layer in itertools.product(DTYPES, (False, True)):
        x = seeded(rows, 384, seed=rows).to(dtype)
        check(x, *factors(384, dtype, "bias" if layer else "weight"), 1e-6, layer)
    assert _C.last_kernel() == f"norm.{isa}"


def test_norm_is_the_same_on_every_tier_and_any_number_of_threads() -> None:
    info, before = _C.info(), torch.get_num_threads()
    try:
        for features, dtype, layer in itertools.product((1, 40, 129, 768, 5000), DTYPES, (False, True)):
            x = (seeded(130, features, seed=3) * 2 - 1).to(dtype)
            weight, bias = factors(features, dtype, "bias" if layer else "weight")
            results = []
            for tier, count in itertools.product(info["usable"], (1, 2, 3)):
                _C.set_isa(tier)
                torch.set_num_threads(count)
                results.append(cpu_norms.normalize(x, weight, bias, 1e-5, layer=layer))
            for other in results[1:]:
                assert_bits_equal(other, results[0])
            alone = [cpu_norms.normalize(row, weight, bias, 1e-5, layer=layer) for row in x[:9]]
            assert_bits_equal(torch.stack(alone), results[0][:9])  # whatever rows stand beside it
    finally:
        _C.set_isa(info["isa"])
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [33, 384])
def test_norm_of_rows_of_zeros_nan_infinity_and_any_size(isa: str, dtype: torch.dtype, features: int) -> None:
    x = seeded(12, features, seed=1).to(dtype)
    x[0] = 0
    x[1, features // 2] = torch.nan
    x[2, -1] = torch.inf
    x[3, 0] = -torch.inf
    x[4] = 7.0
    x[5] *= 1e-6
    x[6] = x[6] * 1e4
    x[7] = x[7] * 0.01 + 100.0
    x[8, 1:] = 0
    x[9] = -0.0
    if dtype != torch.float16:
        x[10] = 3e38  # its sum and its squares leave float32
        x[11] = 1e-40
    for layer, affine in KINDS:
        weight, bias = factors(features, dtype, affine)
        if not (layer and dtype != torch.float16):
            y = check(x, weight, bias, 1e-5, layer)
        else:  # equal huge numbers have no deviation, but no mean either
            y = check(x[:10], weight, bias, 1e-5, layer)
            y = cpu_norms.normalize(x, weight, bias, 1e-5, layer=layer)
            assert y[10].isnan().all()
        assert y[1].isnan().all()
        assert not y[[0, 4, 5, 6, 7, 8, 9, 11]].isnan().any()
    hostile = torch.full((features,), 2.0).to(dtype)
    hostile[5], hostile[6] = torch.nan, torch.inf
    y = cpu_norms.normalize(x[4:6], hostile, None, 1e-5, layer=False)
    assert y.isnan().sum() == 2
    assert y.isinf().sum() == 2


def test_norm_of_bits_that_are_nan_in_bfloat16(isa: str) -> None:
    patterns = torch.tensor([0x7F81, 0x7FC0, 0x7FFF, -0x7F, -1, -0x40], dtype=torch.int16).view(torch.bfloat16)
    x = torch.ones(len(patterns) * 4, 64, dtype=torch.bfloat16)
    weight = torch.ones(64, dtype=torch.bfloat16)
    weight[: len(patterns)] = patterns
    y = cpu_norms.normalize(x, weight, None, 1e-5, layer=False)
    assert y[:, : len(patterns)].isnan().all()
    assert not y[:, len(patterns) :].isnan().any()
    x[: len(patterns), 3] = patterns
    assert cpu_norms.normalize(x, None, None, 1e-5, layer=True)[: len(patterns)].isnan().all()


def test_norm_of_rows_that_lie_apart() -> None:
    wide = seeded(6, 4, 100)
    for x in (wide[:, :, :64], wide[:, 1, :64], wide[::2], wide.transpose(0, 1), wide[..., ::2], wide[0, 0], wide[:1]):
        for layer in (False, True):
            weight, bias = factors(x.shape[-1], x.dtype, "bias" if layer else "weight")
            assert_bits_equal(
                check(x, weight, bias, 1e-5, layer),
                cpu_norms.normalize(x.clone(memory_format=torch.contiguous_format), weight, bias, 1e-5, layer=layer),
            )
    negative = torch._neg_view(wide)
    assert_bits_equal(check(negative, None, None, 1e-5, False), check(-wide, None, None, 1e-5, False))
    for empty in (wide[:0], wide[..., :0]):
        assert cpu_norms.normalize(empty, None, None, 1e-5, layer=True).shape == empty.shape


def test_norm_refuses_nonsense() -> None:
    for rows, features, count in ((-1, 4, 1), (1, 0, 1), (1, 4, 0)):
        with pytest.raises(ValueError, match="expected"):
            _C.norm(0, 0, rows, features, features, True, 1e-5, 0, 0, 0, count)


# -- in models --------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Norms of every kind around a Linear."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.first = nn.LayerNorm(features)
        self.linear = nn.Linear(features, features)
        self.second = nn.RMSNorm(features, eps=1e-6)
        self.third = nn.LayerNorm(features, elementwise_affine=False)
        for norm in (self.first, self.second):
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, so that no norm is read by the Linear alone."""
        y = self.first(x)
        return self.third(self.second(y + self.linear(y)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of the kernel: whether each was a layer norm."""
    seen: list[bool] = []
    given = cpu_norms._norm

    def norm(*args: object) -> None:
        seen.append(bool(args[5]))
        given(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_norms, "_norm", norm)
    return seen


def converted(model: nn.Module, **options: object) -> tuple[nn.Module, nn.Module, qk.report.Report]:
    """With norms by kernels, and without."""
    plain = copy.deepcopy(model)
    qk.quantize_(plain, "w8a16", fuse=False)
    return model, plain, qk.quantize_(model, "w8a16", **options)  # type: ignore[arg-type]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_norms_of_a_model_go_by_the_kernel_and_say_so(calls: list[bool]) -> None:
    model, plain, report = converted(Rows())
    x = seeded(3, 64)
    with torch.no_grad():
        assert close(model(x), plain(x))
    assert calls == [True, False, True]
    assert [report[name].reason for name in ("first", "second")] == ["a norm, by a kernel"] * 2
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    qk.unfuse_(model)
    with torch.no_grad():
        assert_bits_equal(model(x), plain(x))
    assert len(calls) == 3


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "opt", "phi3", "qwen2", "t5"])
def test_norms_of_families(calls: list[bool], family: str) -> None:
    model, plain, _ = converted(build(family))
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))}
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        ours, theirs = model(**inputs)[0], plain(**inputs)[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    norms = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), NormForward)]
    assert len(calls) == len(norms) > 2


def test_nobody_else_is_served(calls: list[bool]) -> None:
    model, plain, _ = converted(Rows())
    x = seeded(3, 64)
    norm = model.first
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(seeded(3, 63))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(seeded(3, 65))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model.third(seeded(3, 65))
        norm(x)
        assert calls == [True]
        with pytest.raises(RuntimeError):
            norm(x.double())
        assert norm(input=x).shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            norm(x)
        torch.func.vmap(norm)(x)
        norm(x.clone().requires_grad_())
        norm(nn.Parameter(x))
    assert calls == [True]
    inside = x.clone().requires_grad_()
    beside = x.clone().requires_grad_()
    model(inside).sum().backward()
    plain(beside).sum().backward()
    assert inside.grad is not None
    assert_bits_equal(inside.grad, beside.grad)
    assert_bits_equal(norm.weight.grad, plain.first.weight.grad)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norm(x)
    assert calls == [True, True]


def test_weights_of_another_dtype_go_the_old_way(calls: list[bool]) -> None:
    model, plain, _ = converted(Rows())
    x = seeded(3, 64).bfloat16()
    with torch.no_grad():
        assert_bits_equal(model.first(x), plain.first(x))
        assert calls == []
        model.first.bfloat16()
        assert model.first(x).dtype == torch.bfloat16
    assert calls == [True]


def test_what_is_no_parameter_of_its_own_any_more_goes_the_old_way(calls: list[bool]) -> None:
    """Behind parametrizations, pruning, FSDP: the name is the module's, the parameter another one or none."""
    x = seeded(3, 64)

    def parametrized(norm: nn.Module) -> None:
        parametrize.register_parametrization(norm, "weight", nn.Softplus())

    def pruned(norm: nn.Module) -> None:
        prune.l1_unstructured(norm, "weight", 0.5)

    def attribute(norm: nn.Module) -> None:
        weight = norm.weight.detach()
        del norm.weight
        norm.weight = weight * 2.0

    def buffer(norm: nn.Module) -> None:
        del norm.bias
        norm.register_buffer("bias", torch.ones(64))

    def negative(norm: nn.Module) -> None:
        norm.weight = nn.Parameter(torch._neg_view(norm.weight.detach()))

    def other_eps(norm: nn.Module) -> None:
        norm.eps = 1.0

    def wrapped(norm: nn.Module) -> None:
        norm.weight = nn.Parameter(Wrapped(norm.weight.detach()))

    for change in (parametrized, pruned, attribute, buffer, negative, other_eps, wrapped):
        model, plain, _ = converted(Rows())
        change(model.first)
        change(plain.first)
        with torch.no_grad():
            assert_bits_equal(model.first(x), plain.first(x), change.__name__)
    assert calls == []


class Wrapped(Tensor):
    """A tensor around another one, without memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        """Of the shape of the other."""
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Over what it wraps; what only looks at it gives another one."""
        result = func(*tree_map_only(Wrapped, lambda t: t.inner, args), **(kwargs or {}))
        return Wrapped(result) if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else result


class ChannelsFirst(nn.Module):
    """Calls itself an RMS norm, of another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """Over dimension 1."""
        weight = self.weight.view(-1, *[1] * (x.dim() - 2))
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * weight


class WidensRMSNorm(nn.Module):
    """Returns float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """In float32."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()


def test_norms_that_compute_something_else_are_left_alone() -> None:
    ChannelsFirst.__name__ = "ChannelsFirstRMSNorm"
    odd = (ChannelsFirst(), WidensRMSNorm(), nn.RMSNorm(64), nn.LayerNorm((8, 8)))
    model = nn.ModuleList([nn.Linear(64, 64), *odd])
    qk.quantize_(model, "w8a16")
    assert all("forward" not in module.__dict__ for module in odd)
    gemma = build("gemma")
    qk.quantize_(gemma, "w8a16")
    assert not [m for m in gemma.modules() if isinstance(m.__dict__.get("forward"), NormForward)]


def test_nested_and_sparse_inputs_go_the_old_way(calls: list[bool]) -> None:
    model, _, _ = converted(Rows())
    with torch.no_grad():
        parts = model.first(torch.nested.nested_tensor([seeded(2, 64), seeded(5, 64)])).unbind()
        handing, _, _ = converted(build("llama"))
        norm = handing.model.layers[0].input_layernorm
        assert isinstance(norm.__dict__["forward"], NormHandoff)
        assert_bits_equal(norm(torch.tensor(1.0)), type(norm).forward(norm, torch.tensor(1.0)))
        nested = torch.nested.nested_tensor([seeded(2, 32)])
        with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
            type(norm).forward(norm, nested)
        with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
            norm(nested)
    assert [len(part) for part in parts] == [2, 5]
    assert calls == []


def test_two_conversions_are_one(calls: list[bool]) -> None:
    def kinds(model: nn.Module) -> dict[str, type]:
        return {n: type(m.__dict__["forward"]) for n, m in model.named_modules() if "forward" in m.__dict__}

    once, twice = build("llama"), build("llama")
    qk.quantize_(once, "w8a16")
    qk.quantize_(twice, "w8a16", include=["*mlp*"])
    assert set(kinds(twice).values()) >= {NormForward, NormHandoff}
    qk.quantize_(twice, "w8a16")
    assert kinds(twice) == kinds(once)
    qk.dequantize_(twice)
    assert kinds(twice) == {}


def test_smoothing_still_folds_into_norms_that_a_kernel_computes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.l1, self.n2, self.l2 = (
                nn.LayerNorm(32),
                nn.Linear(32, 32),
                nn.LayerNorm(32),
                nn.Linear(32, 32),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.l1(self.n1(x))
            return x + self.l2(self.n2(x))

    model = Two()
    batches = [seeded(8, 32, seed=i) for i in range(3)]
    qk.quantize_(model, "w8a8", include=["l1"])
    qk.quantize_(model, "w8a8", smooth=0.5, calibration=batches)
    assert "inv_smooth" not in model.l2.state_dict()
    assert not torch.equal(model.n2.weight, torch.ones(32))


def test_hooks_see_norms(calls: list[bool]) -> None:
    model, _, _ = converted(Rows())
    seen: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        y = model.first(seeded(3, 64))
    assert seen[0] is y
    assert calls == [True]


def test_copies_compute_their_own_norms(calls: list[bool]) -> None:
    model, _, _ = converted(Rows())
    x = seeded(3, 64)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.first.__dict__["forward"]._module is other.first
            assert_bits_equal(other(x), expected)
            other.first.weight.mul_(2.0)
            assert not close(other.first(x), model.first(x))
    assert len(calls) == 3 * 3 + 2 * 2


def test_failed_conversions_leave_norms_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    model = Rows()
    monkeypatch.setattr(qk.convert, "account", fails)
    with pytest.raises(RuntimeError, match="no"):
        qk.quantize_(model, "w8a16")
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_models_without_quantized_linears_keep_their_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.ReLU())
    assert qk.fuse_(model) == {}
    assert "forward" not in model[0].__dict__


def test_norms_that_linears_alone_read_are_one_kernel_too(calls: list[bool]) -> None:
    model, _, _ = converted(build("llama"))
    norm = model.model.layers[0].input_layernorm
    assert isinstance(norm.__dict__["forward"], NormHandoff)
    with torch.no_grad():
        assert type(norm(seeded(2, 3, 32))) is Tensor
    assert calls == [False]
    wrapped = norm.forward
    norm.forward = lambda x: wrapped(x)  # as accelerate's hooks do
    qk.unfuse_(model)
    with torch.no_grad():
        norm(seeded(2, 3, 32))
    assert calls == [False]


def test_compiled_norms_are_those_of_the_class(calls: list[bool]) -> None:
    model, plain, _ = converted(Rows())
    x = seeded(3, 64)
    with torch.no_grad():
        assert close(torch.compile(model, backend="eager", fullgraph=True)(x), plain(x))
    assert calls == []
