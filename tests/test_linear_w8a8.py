"""W8A8 on the CPU: every tier equals the definition, bit for bit."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import helpers as H
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import _C, ops, reference
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme

ASYMMETRIC = Scheme(activation_symmetric=False)
STATIC = Scheme.from_preset("w8a8_static")
STATIC_ASYMMETRIC = STATIC.replace(activation_symmetric=False)
SCHEMES = (Scheme(), ASYMMETRIC, STATIC, STATIC_ASYMMETRIC)


def tensors(n: int, k: int, scheme: Scheme = SCHEMES[0], *, seed: int = 0, bias: bool = True) -> dict[str, Tensor]:
    """Random canonical tensors: weights over the whole range, scales of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "weight": torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(n, generator=generator) * 2.0 ** torch.randint(-20, 4, (n,), generator=generator),
    }
    if bias:
        made["bias"] = torch.randn(n, generator=generator)
    return {**made, **H.static_grid(scheme, 0.0173, 101)}


def check(x: Tensor, made: dict[str, Tensor], scheme: Scheme, isa: str) -> Tensor:
    """The layer over ``made`` equals the reference on ``x``, and the forced tier was the one that ran."""
    n, k = made["weight"].shape
    layer = QuantLinear(k, n, made, scheme)
    before = _C.last_kernel()
    y = layer(x)
    H.assert_bits_equal(y, reference.linear(x, made, scheme, k), f"x {list(x.shape)}, weight {[n, k]}")
    if x.numel():
        H.assert_ran("w8a8", isa, x.numel() // k)
        assert layer.kernel == f"w8a8.{isa}"
    else:
        assert _C.last_kernel() == before
    return y


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_linear_w8a8_hazard_rows(isa, threads, dtype, scheme):
    for n, k in ((70, 133), (5, 1), (64, 64)):
        check(H.hazard_rows(k).to(dtype), tensors(n, k, scheme), scheme, isa)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_linear_w8a8_second_implementation(isa, dtype, scheme):
    made = tensors(9, 37, scheme)
    x = H.hazard_rows(37).to(dtype)
    expected = H.oracle_linear_w8a8(
        x,
        made["weight"].numpy(),
        made["weight_scale"].numpy(),
        made["bias"].numpy(),
        symmetric=scheme.activation_symmetric,
        act_scale=None if scheme.activation_dynamic else float(made["act_scale"]),
        act_zero_point=int(made["act_zero_point"]) if "act_zero_point" in made else None,
    )
    H.assert_bits_equal(check(x, made, scheme, isa), expected)


@pytest.mark.parametrize("m", (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 17, 33, 64, 97))
def test_linear_w8a8_row_tails(isa, threads, m):
    for n, k in ((65, 70), (1, 4), (200, 257)):
        check(H.seeded(m, k, seed=m), tensors(n, k, seed=m), Scheme(), isa)


@pytest.mark.parametrize("m", (2, 3, 5, 6, 7, 13, 14, 40))
def test_linear_w8a8_row_tails_of_deep_weights(isa, threads, m):
    for n, k, scheme in ((65, 2047, Scheme()), (65, 2048, ASYMMETRIC), (20, 2571, Scheme())):
        check(H.seeded(m, k, seed=m), tensors(n, k, scheme, seed=m), scheme, isa)


def test_linear_w8a8_last_chunk_of_one_row(isa, threads):
    check(H.seeded(97, 50_000), tensors(3, 50_000), Scheme(), isa)


@pytest.mark.parametrize("k", (1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 63, 64, 65, 66, 67, 127, 128, 129, 191, 300, 1025))
def test_linear_w8a8_depth_tails(isa, k):
    for m, scheme in ((1, Scheme()), (7, ASYMMETRIC), (11, Scheme())):
        check(H.seeded(m, k, seed=k), tensors(67, k, scheme, seed=k), scheme, isa)


@pytest.mark.parametrize("n", (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 200, 321))
def test_linear_w8a8_column_tails(isa, threads, n):
    for m in (1, 2, 13):
        check(H.seeded(m, 70, seed=n), tensors(n, 70, seed=n, bias=bool(n % 2)), Scheme(), isa)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    dtype=st.sampled_from(H.DTYPES),
    scheme=st.sampled_from(SCHEMES),
    bias=st.booleans(),
    smooth=st.booleans(),
    workers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_linear_w8a8_any_shape(isa, m, n, k, dtype, scheme, bias, smooth, workers, seed):
    made = tensors(n, k, scheme, seed=seed, bias=bias)
    if smooth:
        made["inv_smooth"] = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.25
    x = (H.seeded(m, k, seed=seed) * 2.0 ** (seed % 40 - 20)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        check(x, made, scheme, isa)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", (256, 1000, 4096, 65_536))
def test_linear_w8a8_extreme_values_do_not_saturate(isa, k):
    sign = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
    x = torch.stack([torch.ones(k), -torch.ones(k), sign, -sign]).repeat(4, 1)  # enough rows for every kind of kernel
    weight = torch.stack([torch.full((k,), 127.0), torch.full((k,), -127.0), sign * 127, -sign * 127]).to(torch.int8)
    made = {"weight": weight, "weight_scale": torch.ones(4)}
    for scheme in (Scheme(), ASYMMETRIC):
        y = check(x, made, scheme, isa)
        assert abs(float(y[0, 0]) / (k * 127) - 1) < 1e-6
    made["weight"] = weight[:, torch.randperm(k, generator=torch.Generator().manual_seed(1))].contiguous()
    check(x, made, Scheme(), isa)


@pytest.mark.parametrize("scheme", (Scheme(), ASYMMETRIC), ids=lambda s: s.name)
@pytest.mark.parametrize("n, k", [(193, 600), (212, 770), (225, 640), (256, 1024), (262, 1100), (292, 2300)])
def test_linear_w8a8_operands_in_halves(isa, threads, scheme, n, k):
    """Where Strassen's products take rows, columns and K in halves: halves that are short, and that are not there."""
    made = tensors(n, k, scheme, seed=n)
    made["weight"][:, ::7] = -128
    for m in (64, 65, 67, 68, 70, 73, 76, 260, 301):
        x = H.seeded(m, k, seed=m)
        x[m // 2] = math.inf
        check(x, made, scheme, isa)


@pytest.mark.parametrize("k", (640, 8192))
def test_linear_w8a8_halves_do_not_overflow(isa, k):
    """Sums of operands, and of their sums, as large as they can be."""
    rows, columns = torch.arange(72).view(-1, 1), torch.arange(256).view(-1, 1) % 64
    later = (torch.arange(k) >= k // 2).view(1, -1)
    sign = 1 - 2 * (torch.arange(k) % 2).view(1, -1)
    for flips in (later & (rows >= 4), later ^ (rows % 8 >= 4), later & False, sign < 0):
        x = torch.where(flips, -1.0, 1.0).expand(72, k).contiguous()
        for columns_flip in (later & (columns >= 32), later ^ (columns >= 32), later & False, sign < 0):
            weight = torch.where(columns_flip, -128, 127).expand(256, k).to(torch.int8).contiguous()
            for scheme in (Scheme(), ASYMMETRIC):
                check(x, {"weight": weight, "weight_scale": torch.ones(256)}, scheme, isa)


def test_linear_w8a8_depth_limit():
    with pytest.raises(ValueError, match="65536"):
        QuantLinear(65_537, 1, tensors(1, 65_537), "w8a8")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_linear_w8a8_foreign_minus_128(isa, scheme):
    made = tensors(70, 133, scheme)
    made["weight"][3, 5] = made["weight"][69, 132] = -128
    made["weight"][10] = -128
    x = torch.cat([H.hazard_rows(133), -torch.full((2, 133), 3.0)])
    check(x, made, scheme, isa)
    for rows in (1, 3, 6):
        check(x[:rows], made, scheme, isa)
    check(x.repeat(3, 1), made, scheme, isa)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("scale", (1e-30, 2.0**-20, 1.0, 3e30))
def test_linear_w8a8_static_scales(isa, symmetric, scale):
    scheme = STATIC.replace(activation_symmetric=symmetric)
    made = tensors(33, 70, scheme)
    made["act_scale"] = torch.tensor(scale)
    for zero_point in (0, 1, 255):
        if not symmetric:
            made["act_zero_point"] = torch.tensor(zero_point, dtype=torch.int32)
        check(H.hazard_rows(70), made, scheme, isa)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_linear_w8a8_smoothing_comes_first(isa, dtype, scheme):
    made = tensors(33, 70, scheme)
    made["inv_smooth"] = 2.0 ** torch.linspace(-30, 30, 70) * 1.1
    check(H.hazard_rows(70).to(dtype), made, scheme, isa)
    check(H.seeded(1, 70).to(dtype), made, scheme, isa)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_linear_w8a8_not_finite_rows_are_nan_and_alone(isa, scheme, bad):
    x = H.seeded(9, 130)
    made = tensors(65, 130, scheme)
    layer = QuantLinear(130, 65, made, scheme)
    clean = layer(x)
    for at in (0, 63, 64, 127, 128, 129):
        broken = x.clone()
        broken[4, at] = bad
        y = layer(broken)
        assert y[4].isnan().all()
        keep = [0, 1, 2, 3, 5, 6, 7, 8]
        H.assert_bits_equal(y[keep], clean[keep])
        assert layer(broken[4]).isnan().all()


@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", H.DTYPES, ids=str)
def test_linear_w8a8_output_dtype(isa, dtype, out_dtype):
    made = tensors(70, 133)
    packed, colsum, minus = ops.pack_w8(made["weight"])
    for rows in (1, 2, 40):
        x = torch.cat([H.hazard_rows(133), H.seeded(20, 133)])[:rows].to(dtype)
        y = ops.linear_w8a8(
            x,
            packed,
            colsum,
            made["weight_scale"],
            made["bias"],
            in_features=133,
            has_minus128=minus,
            out_dtype=out_dtype,
        )
        H.assert_bits_equal(y, reference.linear(x, made, Scheme(), 133, out_dtype))
        H.assert_ran("w8a8", isa, rows)


@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_linear_w8a8_strides(isa, dtype):
    made = tensors(70, 64)
    wide = H.seeded(3, 5, 200).to(dtype)
    for x in (
        wide[..., 17:81],  # rows apart
        wide[:, 2, 17:81],
        wide[:, 2:4, 17:81],  # leading dimensions do not collapse
        wide[1:, :, 64:128],
        wide[0, :, 1:65],  # offset that breaks vector alignment
        wide[0, 0, 3:67],
        wide[..., ::3][..., :64],  # last stride 3
        wide.permute(1, 0, 2)[..., 5:69],
        wide[..., :64].transpose(0, 1),
        wide[:1, :1, :64].expand(4, 3, 64),
        wide[0, :, :64].expand(6, 5, 64),
        H.strided(wide[..., :64]),
        wide[..., 0:64].reshape(64, 15).t(),
        wide[:0, :, :64],
        wide[:, :0, :64],
        wide[..., :64].reshape(1, 3, 1, 5, 1, 64),
    ):
        check(x, made, Scheme(), isa)


def test_linear_w8a8_one_feature_with_a_stride(isa):
    x = H.seeded(6, 9)
    for view in (x[:, 3:4], x[2, ::3].unsqueeze(1), x[:, 1]):
        made = tensors(17, view.shape[-1] if view.dim() == 2 else 6)
        check(view, made, Scheme(), isa)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_linear_w8a8_flushing_denormals_changes_nothing(isa, threads, scheme):
    made = tensors(33, 70, scheme)
    x = H.hazard_rows(70)
    expected = reference.linear(x, made, scheme, 70)
    layer = QuantLinear(70, 33, made, scheme)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        y = layer(x)
        again = layer(x[:1])
    finally:
        torch.set_flush_denormal(False)
    H.assert_bits_equal(y, expected)
    H.assert_bits_equal(again, expected[:1])


def check_threads(x: Tensor, made: dict[str, Tensor], scheme: Scheme, counts: tuple[int, ...]) -> None:
    """The layer over ``made`` equals the reference on ``x``, whatever the number of threads."""
    n, k = made["weight"].shape
    layer, expected = QuantLinear(k, n, made, scheme), reference.linear(x, made, scheme, k)
    before = torch.get_num_threads()
    try:
        for workers in counts:
            torch.set_num_threads(workers)
            H.assert_bits_equal(layer(x), expected, f"{workers} threads, {len(x)} rows")
    finally:
        torch.set_num_threads(before)


def test_linear_w8a8_thread_count_does_not_matter(isa):
    for m in (1, 3, 37, 130):
        check_threads(H.seeded(m, 300), tensors(515, 300), Scheme(), (1, 2, 3, 5, 8))


@pytest.mark.parametrize("scheme", (Scheme(), ASYMMETRIC), ids=lambda s: s.name)
@pytest.mark.parametrize("n, k, rows", [(130, 200, (95, 96, 97, 191, 192, 289, 485)), (70, 20_000, (97, 200, 301))])
def test_linear_w8a8_rows_that_each_thread_has_for_itself(isa, scheme, n, k, rows):
    """Around the numbers of rows from which on that is so, with scratch for all of them and for a few."""
    for m in rows:
        x = H.seeded(m, k, seed=m).t().contiguous().t() if m % 2 else H.seeded(m, k, seed=m)
        x[m // 2] = math.nan
        check_threads(x, tensors(n, k, scheme), scheme, (1, 2, 3, 5))


def test_linear_w8a8_concurrent_callers(isa):
    made = tensors(200, 257)
    layer = QuantLinear(257, 200, made, "w8a8")
    inputs = [H.seeded(m, 257, seed=m) for m in (1, 2, 9, 33, 70)]
    expected = [reference.linear(x, made, Scheme(), 257) for x in inputs]

    def work(seed: int) -> None:
        for step in range(20):
            at = (seed + step) % len(inputs)
            H.assert_bits_equal(layer(inputs[at]), expected[at])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_linear_w8a8_callers_on_other_threads_obey_set_num_threads(one_thread):
    layer = QuantLinear(512, 512, tensors(512, 512), "w8a8")
    x = H.seeded(256, 512)
    counts: dict[int, int] = {}

    def work(workers: int) -> None:
        before = len(os.listdir("/proc/self/task"))
        layer(x)
        counts[workers] = len(os.listdir("/proc/self/task")) - before

    for workers in (1, 2):
        torch.set_num_threads(workers)
        caller = threading.Thread(target=work, args=(workers,))
        caller.start()
        caller.join()
    assert counts[1] == 0, "one thread was asked for, and more were started"
    assert counts[2] <= 1, "two threads were asked for, and more were started"


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("out_dtype", H.DTYPES, ids=str)
def test_linear_w8a8_integers_that_were_quantized_before(isa, threads, symmetric, out_dtype):
    made = tensors(70, 133)
    packed, colsum, minus = ops.pack_w8(made["weight"])
    native = _C.LinearW8A8(
        packed.data_ptr(),
        colsum.data_ptr(),
        made["weight_scale"].data_ptr(),
        made["bias"].data_ptr(),
        70,
        133,
        minus,
        symmetric,
        0.0,
        0,
        0,
    )
    for x in (H.hazard_rows(133), H.seeded(1, 133), H.seeded(2, 133)):
        q, scale, zero_point = reference.quantize_activations(x, symmetric=symmetric)
        y = torch.empty(len(x), 70, dtype=out_dtype)
        native.run_quantized(
            q.data_ptr(),
            133,
            scale.data_ptr(),
            0 if zero_point is None else zero_point.data_ptr(),
            len(x),
            y.data_ptr(),
            {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[out_dtype],
            70,
            torch.get_num_threads(),
        )
        expected = reference.linear_w8a8_prequantized(
            q, scale, zero_point, made["weight"], made["weight_scale"], made["bias"], out_dtype
        )
        H.assert_bits_equal(y, expected)


@pytest.mark.parametrize("n, k", ((1, 1), (63, 64), (64, 65), (65, 63), (130, 257), (200, 4)))
def test_pack_w8_is_lossless(n, k):
    weight = tensors(n, k)["weight"]
    packed, colsum, minus = ops.pack_w8(weight)
    assert not minus
    assert packed.numel() == _C.packed_w8_bytes(n, k) == -(-n // 64) * 64 * -(-k // 64) * 64
    assert torch.equal(ops.unpack_w8(packed, n, k), weight)
    assert torch.equal(colsum, weight.sum(1, dtype=torch.int32))
    view = packed.view(-1, -(-k // 64) * 16, 64, 4)
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 3)):
        assert view[row // 64, column // 4, row % 64, column % 4] == weight[row, column]
    weight[n - 1, k - 1] = -128
    assert ops.pack_w8(weight)[2]
