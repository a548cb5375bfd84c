"""Operators: schemas, shape functions, gradients, checks, and every way around the direct call."""

from __future__ import annotations

import helpers as H
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from qkernels import _C, backends, ops, reference
from qkernels.backends import prepare, register
from qkernels.checks import row_stride
from qkernels.nn import QuantLinear
from qkernels.prepared import scheme_from_key, scheme_key
from qkernels.scheme import PRESETS, Scheme

N, K = 33, 70
STATIC_ASYMMETRIC = PRESETS["w8a8_static"].replace(activation_symmetric=False)
SCHEMES = [
    *PRESETS.values(),
    Scheme(activation_symmetric=False),
    STATIC_ASYMMETRIC,
    PRESETS["w4a16"].replace(weight_symmetric=False),
    PRESETS["w4a8"].replace(weight_symmetric=False, weight_zero="float"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def canonical(scheme: Scheme, *, smooth: bool = False) -> dict[str, Tensor]:
    made = reference.quantize_weight(H.seeded(N, K), scheme)
    made["bias"] = H.seeded(N, seed=1)
    made |= H.static_grid(scheme, 0.02, 99)
    if smooth:
        made["inv_smooth"] = torch.linspace(0.5, 2.0, K)
    return made


def arguments(scheme: Scheme, x: Tensor, *, smooth: bool = False) -> tuple[str, tuple]:
    """The operator a layer calls and what it calls it with."""
    prepared = prepare(canonical(scheme, smooth=smooth), scheme, K)
    seen: list[tuple[str, tuple]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "qkernels":
                seen.append((func._schema.name.split("::")[1], args))
            return func(*args, **(kwargs or {}))

    with Spy():
        prepared.run(x)
    return seen[-1]


# -- torch's own examination ------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.filterwarnings("ignore")
def test_linear_opcheck(scheme):
    name, args = arguments(scheme, H.seeded(3, K), smooth=True)
    call = getattr(torch.ops.qkernels, name).default
    torch.library.opcheck(call, (H.seeded(3, K).requires_grad_(), *args[1:]))
    if scheme == Scheme():
        for x in (H.seeded(2, 3, K).to(torch.bfloat16), H.seeded(K), H.seeded(0, K), H.strided(H.seeded(3, K))):
            torch.library.opcheck(call, (x, *args[1:]))


@pytest.mark.filterwarnings("ignore")
def test_dequantize_opcheck():
    made = canonical(Scheme())
    packed, _, _ = ops.pack_w8(made["weight"])
    args = (packed, made["weight_scale"], None, N, K, torch.float32)
    torch.library.opcheck(torch.ops.qkernels.dequantize_w8.default, args)
    four = canonical(PRESETS["w4a16"])
    args = (four["weight"], four["weight_scale"], None, None, None, None, "w4a16", K, torch.bfloat16)
    torch.library.opcheck(torch.ops.qkernels.dequantize_quantized.default, args)


# -- the same answer whichever way it goes ----------------------------------------------------------------------------


@by_scheme
def test_linear_through_dispatcher_equals_direct_call(scheme):
    prepared = prepare(canonical(scheme), scheme, K)
    for dtype in H.DTYPES:
        x = H.hazard_rows(K).to(dtype)
        direct = prepared.run(x)
        H.assert_bits_equal(prepared.call(x, prepared.tensors), direct)
        if not scheme.weight_only:  # float sums are compared with the reference within a bound, elsewhere
            H.assert_bits_equal(direct, reference.linear(x, canonical(scheme), scheme, K))


def test_linear_under_a_dispatch_mode_is_seen_by_it():
    name, args = arguments(Scheme(), H.seeded(2, K))
    assert name == "linear_w8a8"
    assert args[5:9] == (N, K, False, True)


def test_linear_make_fx_records_the_operator():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    x = H.seeded(3, K)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert any(node.target is torch.ops.qkernels.linear_w8a8.default for node in graph.graph.nodes), mode
        other = H.seeded(3, K, seed=5)
        H.assert_bits_equal(graph(other), layer(other))


@pytest.mark.filterwarnings("ignore")
def test_linear_jit_trace_records_the_operator():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8").eval()
    traced = torch.jit.trace(layer, H.seeded(3, K))
    x = H.seeded(7, K, seed=5)
    H.assert_bits_equal(traced(x), layer(x))


def test_linear_fake_tensors_stay_fake():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.empty(2, 3, K, dtype=torch.bfloat16)))
    assert isinstance(y, FakeTensor)
    assert y.shape == (2, 3, N)
    assert y.dtype == torch.bfloat16


@by_scheme
def test_linear_meta_shapes(scheme):
    layer = QuantLinear(K, N, canonical(scheme), scheme)
    assert layer(torch.empty(2, 0, 3, K, device="meta")).shape == (2, 0, 3, N)
    layer.to("meta")
    y = layer(torch.empty(5, K, device="meta", dtype=torch.float16))
    assert (y.shape, y.dtype, y.device.type) == ((5, N), torch.float16, "meta")
    with pytest.raises(ValueError, match=r"expected device meta.*load a state dict"):
        layer(torch.empty(5, K))


@by_scheme
def test_linear_vmap_is_more_rows(scheme):
    layer = QuantLinear(K, N, canonical(scheme), scheme)
    x = H.seeded(4, 3, K)
    H.assert_bits_equal(torch.vmap(layer)(x), layer(x))
    H.assert_bits_equal(torch.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    H.assert_bits_equal(torch.vmap(torch.vmap(layer))(x), layer(x))


def test_linear_default_device_and_dtype_do_not_leak():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    x = H.seeded(3, K)
    expected = layer(x)
    with torch.device("meta"):
        H.assert_bits_equal(layer(x), expected)
    torch.set_default_dtype(torch.float64)
    try:
        H.assert_bits_equal(layer(x), expected)
        assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_inference_mode():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    x = H.seeded(3, K)
    expected = layer(x)
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        made = QuantLinear(K, N, canonical(Scheme()), "w8a8")
        H.assert_bits_equal(made(x.clone()), expected)
    H.assert_bits_equal(y.clone(), expected)
    H.assert_bits_equal(made(x), expected)


def test_linear_negated_view():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    z = torch.complex(H.seeded(3, K), H.seeded(3, K, seed=1))
    view = z.conj().imag
    assert view.is_neg()
    H.assert_bits_equal(layer(view), layer(-z.imag.contiguous()))


# -- autocast ---------------------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_linear_autocast_casts_the_input(scheme, dtype):
    layer = QuantLinear(K, N, canonical(scheme), scheme)
    x = H.seeded(3, K)
    expected = layer(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        H.assert_bits_equal(layer(x), expected)
        H.assert_bits_equal(layer(x.requires_grad_()).detach(), expected)
        with torch.autocast("cpu", enabled=False):
            assert layer(x.detach()).dtype == torch.float32
    assert layer(x.detach()).dtype == torch.float32


# -- gradients --------------------------------------------------------------------------------------------------------


@by_scheme
@pytest.mark.parametrize("smooth", (False, True))
def test_linear_gradient_is_the_dequantized_weight(scheme, smooth):
    layer = QuantLinear(K, N, canonical(scheme, smooth=smooth), scheme)
    weight = layer.weight.clone()
    for shape in ((K,), (1, K), (2, 3, K), (0, K)):
        x = H.seeded(*shape).requires_grad_()
        grad = H.seeded(*shape[:-1], N, seed=2)
        y = layer(x)
        H.assert_bits_equal(y.detach(), layer(x.detach()))
        y.backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight)
    x = H.seeded(3, K).to(torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), weight.sum(0).expand(3, K), rtol=2**-8, atol=1e-6)  # one bf16 rounding


def test_linear_gradient_twice_and_functional():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    x = H.seeded(3, K).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    # d/dx of 2 y W: y itself is differentiated as x W^T.
    (second,) = torch.autograd.grad(first.sum(), x)
    weight = layer.weight.clone()
    torch.testing.assert_close(second, (2 * weight.T @ weight).sum(0).expand(3, K), rtol=1e-4, atol=1e-4)


@by_scheme
def test_linear_function_transforms(scheme):
    layer = QuantLinear(K, N, canonical(scheme), scheme)
    weight = layer.weight.clone()
    x, tangent = H.seeded(3, K), H.seeded(3, K, seed=4)
    torch.testing.assert_close(torch.func.grad(lambda v: layer(v).sum())(x), weight.sum(0).expand(3, K))
    per_row = torch.vmap(torch.func.grad(lambda v: layer(v).sum()))(x)
    torch.testing.assert_close(per_row, weight.sum(0).expand(3, K))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), weight)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), weight)
    y, moved = torch.func.jvp(layer, (x,), (tangent,))
    H.assert_bits_equal(y, layer(x))
    torch.testing.assert_close(moved, tangent @ weight.T)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent @ weight.T)


def test_linear_no_grad_and_frozen_inputs_record_nothing():
    layer = QuantLinear(K, N, canonical(Scheme()), "w8a8")
    x = H.seeded(3, K).requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad
    assert layer(x).requires_grad


# -- errors -----------------------------------------------------------------------------------------------------------


@by_scheme
def test_linear_bad_input(scheme):
    layer = QuantLinear(K, N, canonical(scheme), scheme)
    for x, error, words in (
        (torch.zeros(3, K + 1), ValueError, rf"expected {K} features.*got {K + 1}"),
        (torch.zeros(3, 0), ValueError, f"expected {K} features.*got 0"),
        (torch.zeros(()), ValueError, "at least 1 dimension"),
        (torch.zeros(3, K, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(3, K, dtype=torch.int8), TypeError, "int8"),
        (torch.zeros(3, K, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(3, K).to_sparse(), TypeError, "sparse"),
        ([[0.0] * K], TypeError, "list"),
        (None, TypeError, "NoneType"),
    ):
        with pytest.raises(error, match=f"input.*{words}"):
            layer(x)
        if isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided:
            with pytest.raises(error, match=words):
                layer(x.requires_grad_())


def test_linear_w8a8_operator_checks_what_it_is_given():
    name, args = arguments(Scheme(), H.seeded(2, K))
    call = getattr(torch.ops.qkernels, name)
    for at, value, error, word in (
        (0, H.seeded(2, K - 1), ValueError, "x: expected 70"),
        (1, torch.zeros(64, dtype=torch.int8), ValueError, "packed"),
        (1, args[1].to(torch.int32), TypeError, "packed"),
        (2, args[2][:-1], ValueError, "colsum"),
        (3, args[3].half(), TypeError, "weight_scale"),
        (3, args[3].repeat(2)[::2], ValueError, "weight_scale"),
        (4, torch.zeros(N + 1), ValueError, "bias"),
        (6, 70_000, ValueError, "70"),
        (9, torch.tensor(0.0), ValueError, "act_scale"),
        (9, torch.tensor(float("nan")), ValueError, "act_scale"),
        (11, torch.ones(K - 1), ValueError, "inv_smooth"),
        (12, torch.float64, TypeError, "out_dtype"),
    ):
        changed = [*args]
        changed[at] = value
        with pytest.raises(error, match=word):
            call(*changed)


def test_linear_w8a8_operator_takes_misaligned_memory():
    name, args = arguments(Scheme(), H.seeded(2, K))
    packed = torch.empty(args[1].numel() + 1, dtype=torch.int8)[1:]
    packed.copy_(args[1])
    y = getattr(torch.ops.qkernels, name)(args[0], packed, *args[2:])
    H.assert_bits_equal(y, getattr(torch.ops.qkernels, name)(*args))


@pytest.mark.parametrize(
    "change, error, word",
    (
        ({"weight": None}, ValueError, "weight"),
        ({"weight": torch.zeros(N, K)}, TypeError, "weight: expected dtype torch.int8"),
        ({"weight": torch.zeros(N, K + 1, dtype=torch.int8)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(N * K, dtype=torch.int8)}, ValueError, "two-dimensional"),
        ({"weight_scale": torch.ones(N, dtype=torch.float16)}, TypeError, "weight_scale"),
        ({"weight_scale": torch.ones(N, 1)}, ValueError, "weight_scale"),
        ({"weight_scale": None}, ValueError, "needs weight_scale"),
        ({"weight_zero_point": torch.ones(N)}, ValueError, "weight_zero_point not known"),
        ({"bias": torch.ones(N + 1)}, ValueError, "bias"),
        ({"bias": torch.ones(N, dtype=torch.int32)}, TypeError, "bias"),
        ({"bias": torch.ones(N, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"bias": [1.0]}, TypeError, "bias: expected a torch.Tensor"),
        ({"inv_smooth": torch.ones(K + 1)}, ValueError, "inv_smooth"),
        ({"act_scale": torch.tensor(1.0)}, ValueError, "act_scale not known"),
    ),
)
def test_prepare_bad_tensors(change, error, word):
    with pytest.raises(error, match=word):
        prepare({**canonical(Scheme()), **change}, "w8a8", K)


@pytest.mark.parametrize("value", (0.0, -1.0, float("nan"), float("inf"), 2.0**-140))
def test_prepare_bad_static_scale(value):
    made = {**canonical(STATIC_ASYMMETRIC), "act_scale": torch.tensor(value)}
    with pytest.raises(ValueError, match="act_scale"):
        prepare(made, STATIC_ASYMMETRIC, K)


def test_prepare_bad_static_zero_point():
    made = {**canonical(STATIC_ASYMMETRIC), "act_zero_point": torch.tensor(256, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"act_zero_point: expected 0\.\.255, got 256"):
        prepare(made, STATIC_ASYMMETRIC, K)


def test_prepare_bad_sizes():
    with pytest.raises(ValueError, match="in_features"):
        prepare(canonical(Scheme()), "w8a8", -1)
    with pytest.raises(ValueError, match="w8a9"):
        prepare(canonical(Scheme()), "w8a9", K)


# -- the choice of a kernel -------------------------------------------------------------------------------------------


def test_prepare_names_kernel_or_reason(isa):
    assert prepare(canonical(Scheme()), "w8a8", K).kernel == f"w8a8.{isa}"
    for name in ("w8a16", "w4a16"):
        prepared = prepare(canonical(PRESETS[name]), name, K)
        if prepared.kernel == "reference":
            assert name in prepared.reason
        else:
            assert prepared.reason == ""


@pytest.mark.parametrize("n, k", ((0, 5), (5, 0), (0, 0)))
def test_prepare_empty_weights_use_the_reference(n, k):
    made = reference.quantize_weight(torch.zeros(n, k), Scheme())
    made["bias"] = torch.arange(n, dtype=torch.float32)
    layer = QuantLinear(k, n, made, "w8a8")
    assert layer.kernel == "reference"
    assert "empty" in layer.reason
    y = layer(torch.zeros(3, k))
    assert torch.equal(y, made["bias"].expand(3, n))


@by_scheme
def test_prepare_canonical_is_lossless(scheme):
    made = canonical(scheme, smooth=True)
    prepared = prepare(made, scheme, K)
    back = prepared.canonical()
    assert list(back) == [name for name in back if name in made]
    assert set(back) == set(made)
    for name, tensor in made.items():
        H.assert_bits_equal(back[name], tensor, name)
    assert prepared.nbytes == sum(t.nbytes for t in prepared.resident().values())


def test_register_puts_a_kernel_in_front(monkeypatch):
    monkeypatch.setattr(backends, "CANDIDATES", [*backends.CANDIDATES])

    @register
    class Special(backends.PreparedW8A8):
        @classmethod
        def objection(cls, scheme, in_features, out_features, device):
            return "" if in_features == K else "special: other sizes"

        @property
        def kernel(self):
            return "special"

    assert prepare(canonical(Scheme()), "w8a8", K).kernel == "special"
    other = reference.quantize_weight(H.seeded(N, K + 1), Scheme())
    assert prepare(other, "w8a8", K + 1).kernel.startswith("w8a8.")


def test_scheme_key_round_trip():
    for scheme in SCHEMES:
        assert scheme_from_key(scheme_key(scheme)) == scheme
    assert scheme_from_key("w4a16") == PRESETS["w4a16"]
    with pytest.raises(ValueError):
        scheme_from_key("nonsense")


def test_row_stride_cases():
    x = torch.zeros(4, 3, 10)
    assert row_stride(x) == 10
    assert row_stride(x[:, :, 2:8]) == 10
    assert row_stride(x[:, 1, :]) == 30
    assert row_stride(x[:, :2]) is None
    assert row_stride(x[..., ::2]) is None
    assert row_stride(x.transpose(0, 1)) is None
    assert row_stride(x[:1, :, 2:8]) == 10
    assert row_stride(x[0, 0]) == 10
    assert row_stride(x[0, 0].expand(7, 10)) is None
    assert row_stride(x[..., 3:4]) == 10
    assert _C.last_kernel() is not None
