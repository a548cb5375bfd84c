"""W8A16 and W4A16 kernels on every tier, against the reference.

Tolerance.  The reference multiplies x by float32 weights in float32 (some order of summation).  The kernels sum in
float32 too, in another order, with a group's scale applied before or after its sum.  Per output, with u = 2**-24:

    |kernel - reference| <= (2 * K + 64) * u * sum_k |x_k| * B_k  +  (K + 64) * 2**-126 * (largest scale)
                            + one rounding of the output dtype on either side

where B_k is half of all magnitudes that enter the sums for weight k on both sides: 256 * |scale| for 8 bits, which some
kernels split into (q + 128) - 128: 127 + 255 + 128 < 2 * 256; |scale| * (16 + zero_point) for 4 bits, split into
(q - 8) + (8 - zero_point) or q - zero_point; 16 * |scale| + |min| with a minimum; 16 * |scale| with a codebook (of
magnitudes below 2 here).  Each of K products and additions rounds once on either side (2 * K); 64 covers the scale, the
offset, the group sums and the bias.  The second term is what vdpbf16ps may flush to zero, and what an activation below
2**-114 may lose where kernels keep it times 2**-12.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, seeded
from torch import Tensor

from qkernels import _C, reference
from qkernels.scheme import Scheme

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOOK = tuple((i - 7.3) * abs(i - 7.3) / 60 for i in range(16))
"""Uneven, both signs, no zero."""
GRIDS = ("symmetric", "zero_point", "minimum", "codebook")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference's own products are tiny; the kernels' thread counts are arguments here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized, on a 64-byte boundary."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.empty(count * size + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + count * size].view(dtype)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class W8:
    """A native W8A16 layer, its reference, and B_k of the tolerance."""

    def __init__(self, n: int, k: int, *, bias: bool = True, seed: int = 0, smooth: bool = False) -> None:
        self.n, self.k = n, k
        self.scheme = Scheme(activation_bits=None)
        self.tensors = reference.quantize_weight(seeded(n, k, seed=seed, scale=0.3), self.scheme)
        if bias:
            self.tensors["bias"] = seeded(n, seed=seed + 1)
        if smooth:
            self.tensors["inv_smooth"] = seeded(k, seed=seed + 2).exp()
        self.build()

    def build(self) -> None:
        t = self.tensors
        self.packed = aligned(_C.packed_w8_bytes(self.n, self.k), torch.int8)
        colsum = torch.empty(self.n, dtype=torch.int32)
        _C.pack_w8(pointer(t["weight"]), self.n, self.k, pointer(self.packed), pointer(colsum), 1)
        self.layer = _C.LinearW8A16(
            pointer(self.packed),
            pointer(t["weight_scale"]),
            pointer(t.get("bias")),
            self.n,
            self.k,
            pointer(t.get("inv_smooth")),
        )
        self.bound = (t["weight_scale"].double() * 256)[:, None].expand(self.n, self.k)
        self.scale = float(t["weight_scale"].max()) if self.n else 0.0

    def reference(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        return reference.linear(x, self.tensors, self.scheme, self.k, out_dtype)

    def run(self, x: Tensor, *, out_dtype: torch.dtype | None = None, threads: int = 1, y_pad: int = 0) -> Tensor:
        """x [M, K] with any row stride; the output gets a row stride of N + y_pad, and the padding must survive."""
        m = x.shape[0]
        assert x.stride(-1) == 1 or x.shape[1] <= 1
        y = torch.full((m, self.n + y_pad), 7.0, dtype=out_dtype or x.dtype)
        self.layer.run(pointer(x), CODES[x.dtype], m, x.stride(0), pointer(y), CODES[y.dtype], y.stride(0), threads)
        assert y_pad == 0 or bool((y[:, self.n :] == 7.0).all()), "wrote past the row"
        return y[:, : self.n]

    def check(self, x: Tensor, *, out_dtype: torch.dtype | None = None, threads: int = 1, y_pad: int = 0) -> Tensor:
        actual = self.run(x, out_dtype=out_dtype, threads=threads, y_pad=y_pad)
        expected = self.reference(x, torch.float32)
        wide = x.double()
        if "inv_smooth" in self.tensors:
            wide = wide * self.tensors["inv_smooth"].double()
        reach = wide.abs() @ self.bound.T
        allowed = (2 * self.k + 64) * 2.0**-24 * reach + (self.k + 64) * 2.0**-126 * self.scale
        allowed = allowed + (expected.abs().double() + allowed) * ROUNDING[actual.dtype] * 1.01
        allowed = allowed + 2.0**-24 * (actual.dtype == torch.float16)  # subnormal outputs
        if "bias" in self.tensors:
            allowed = allowed + self.tensors["bias"].abs().double() * 2.0**-22
        wrong = ((actual.double() - expected.double()).abs() > allowed).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{len(wrong)} of {actual.numel()} beyond the bound, first {at}: {actual[at].item()} expected "
                f"{expected[at].item()} allowed {allowed[at].item()}; {_C.last_kernel()}"
            )
        assert bool(actual.isfinite().all())
        return actual


class W4(W8):
    """A native W4A16 layer."""

    def __init__(
        self,
        n: int,
        k: int,
        *,
        group: int | None = 32,
        grid: str = "symmetric",
        bias: bool = True,
        seed: int = 0,
        scale_dtype: torch.dtype | None = None,
        smooth: bool = False,
    ) -> None:
        self.n, self.k, self.group = n, k, group
        kind = {
            "symmetric": {},
            "zero_point": {"weight_symmetric": False, "weight_zero": "int"},
            "minimum": {"weight_symmetric": False, "weight_zero": "float"},
            "codebook": {"codebook": BOOK},
        }[grid]
        groups: dict[str, object] = {"weight_granularity": "per_channel"}
        if group is not None:
            groups = {"weight_granularity": "per_group", "group_size": group}
        self.scheme = Scheme(weight_bits=4, activation_bits=None, scale_dtype=scale_dtype, **groups, **kind)
        self.tensors = reference.quantize_weight(seeded(n, k, seed=seed, scale=0.3) + 0.1, self.scheme)
        if bias:
            self.tensors["bias"] = seeded(n, seed=seed + 1)
        if smooth:
            self.tensors["inv_smooth"] = seeded(k, seed=seed + 2).exp()
        self.build()

    def build(self) -> None:
        t, n, k = self.tensors, self.n, self.k
        self.packed = aligned(_C.packed_w4_bytes(n, k), torch.uint8)
        _C.pack_w4(pointer(t["weight"]), n, k, pointer(self.packed), 1)
        group = self.group or max(k, 1)
        groups = math.ceil(k / group)

        def pack(name: str) -> Tensor | None:
            if name not in t:
                return None
            source = t[name].contiguous()
            packed = aligned(_C.packed_group_elements(n, groups), source.dtype)
            _C.pack_groups(pointer(source), source.element_size(), n, groups, pointer(packed))
            return packed

        self.scales, self.zeros, self.mins = pack("weight_scale"), pack("weight_zero_point"), pack("weight_min")
        self.codebook = None if self.scheme.codebook is None else torch.tensor(self.scheme.codebook)
        self.layer = _C.LinearW4A16(
            pointer(self.packed),
            pointer(self.scales),
            pointer(self.zeros),
            pointer(self.mins),
            CODES[t["weight_scale"].dtype],
            pointer(self.codebook),
            pointer(t.get("bias")),
            n,
            k,
            group,
            pointer(t.get("inv_smooth")),
        )
        scale = t["weight_scale"].double().reshape(n, groups)
        reach = scale * 16
        if "weight_zero_point" in t:
            reach = scale * (16 + t["weight_zero_point"].double().reshape(n, groups))
        if "weight_min" in t:
            reach = scale * 16 + t["weight_min"].double().abs().reshape(n, groups)
        self.bound = reach.repeat_interleave(group, dim=1)[:, :k] if k else reach.new_zeros(n, 0)
        self.scale = float(scale.max()) if scale.numel() else 0.0


@functools.cache
def layer(bits: int, n: int, k: int, **options: object) -> W8:
    """Shared between the tests: they leave it as it is."""
    return W8(n, k, **options) if bits == 8 else W4(n, k, **options)  # type: ignore[arg-type]


# -- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 13, 25, 28, 31, 35, 67])
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_rows(isa: str, bits: int, m: int, dtype: torch.dtype) -> None:
    subject = layer(bits, 130, 200)
    subject.check(seeded(m, 200, seed=m).to(dtype), threads=2)
    suffix = "+bf16" if dtype == torch.bfloat16 and _C.last_kernel().endswith("+bf16") else ""
    assert _C.last_kernel() == f"w{bits}a16.{isa}{suffix}"
    assert suffix == "" or isa in ("avx512vnni", "amx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (63, 7), (64, 8), (65, 9), (3, 64), (17, 65), (127, 257), (129, 520), (64, 1031)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_tails(isa: str, bits: int, n: int, k: int, dtype: torch.dtype) -> None:
    subject = layer(bits, n, k)
    for m in (1, 3, 9, 67):
        subject.check(seeded(m, k, seed=m).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [8, 32, 40, 128, 200, 512, None])
def test_w4a16_groups(isa: str, group: int | None, grid: str, dtype: torch.dtype) -> None:
    for k in (300, 515):  # both end in a short group, or lie in one
        subject = layer(4, 70, k, group=group, grid=grid)
        for m in (1, 2, 4, 67):
            subject.check(seeded(m, k, seed=m).to(dtype))


@pytest.mark.parametrize("grid", ["symmetric", "zero_point", "minimum"])
def test_w4a16_fp32_scales(isa: str, grid: str) -> None:
    subject = W4(66, 160, group=64, grid=grid, scale_dtype=torch.float32)
    assert subject.tensors["weight_scale"].dtype == torch.float32
    for dtype in DTYPES:
        for m in (1, 7, 67):
            subject.check(seeded(m, 160).to(dtype))


def test_w4a16_zero_points_of_foreign_files(isa: str) -> None:
    """A stored zero point may be any uint8."""
    subject = W4(64, 64, group=32, grid="zero_point")
    subject.tensors["weight_zero_point"] = torch.arange(128, dtype=torch.uint8).reshape(64, 2) * 2
    subject.build()
    for dtype in DTYPES:
        for m in (1, 8, 67):
            subject.check(seeded(m, 64).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_every_code(isa: str, bits: int) -> None:
    """Unit vectors read the weights back one at a time: every code, at every place of a line, decodes exactly."""
    n, k = 64, 256
    subject = W8(n, k, bias=False) if bits == 8 else W4(n, k, group=256, bias=False)
    codes = torch.arange(n * k) * 7 % 256
    if bits == 8:
        subject.tensors["weight"] = (codes - 128).to(torch.int8).reshape(n, k)  # -128 too
        subject.tensors["weight_scale"] = torch.ones(n)
    else:
        subject.tensors["weight"] = codes.to(torch.uint8).reshape(n, k)[:, : k // 2].contiguous()
        subject.tensors["weight_scale"] = torch.ones(n, 1, dtype=torch.float16)
    subject.build()
    expected = reference.dequantize_weight(subject.tensors, subject.scheme, k).T
    for dtype in DTYPES:
        x = torch.eye(k, dtype=dtype)
        assert_bits_equal(subject.run(x, out_dtype=torch.float32) + 0.0, expected + 0.0, f"{dtype}, panel")
        for rows in (1, 2, 4, 6):
            parts = [subject.run(x[i : i + rows], out_dtype=torch.float32) for i in range(0, k, rows)]
            assert_bits_equal(torch.cat(parts) + 0.0, expected + 0.0, f"{dtype}, {rows} rows")


# -- hazards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_same_bits_for_any_number_of_threads(isa: str, bits: int, dtype: torch.dtype) -> None:
    options = {} if bits == 8 else {"grid": "minimum"}
    subject = layer(bits, 64 * 5 + 5, 1100, **options)
    for m in (1, 5, 35, 203):
        x = seeded(m, 1100, seed=m).to(dtype)
        one = subject.run(x, threads=1)
        for threads in (2, 3):
            assert_bits_equal(subject.run(x, threads=threads), one, f"M={m}, {threads} threads")


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_row_does_not_depend_on_its_neighbours(isa: str, bits: int) -> None:
    """Rows of one large product: where a row stands, and in which tile, makes no difference."""
    subject = layer(bits, 70, 300)
    for dtype in DTYPES:
        x = seeded(90, 300).to(dtype)
        whole = subject.run(x)
        assert_bits_equal(subject.run(x.flip(0)).flip(0), whole)
        assert_bits_equal(subject.run(x[3:77]), whole[3:77])


def test_weight_only_many_rows_and_long_k(isa: str) -> None:
    """More rows than are copied at once (1368 here), so that a tile has any number of them; K of several slices."""
    for bits in (8, 4):
        subject = layer(bits, 67, 3000, **({} if bits == 8 else {"group": 128, "grid": "zero_point"}))
        for dtype in (torch.float32, torch.bfloat16):
            for m in (1369, 1375, 1400):
                subject.check(seeded(m, 3000).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_strides(isa: str, bits: int) -> None:
    subject = layer(bits, 70, 90)
    for dtype in DTYPES:
        for m in (1, 3, 67):
            wide = torch.full((m, 101), math.nan, dtype=dtype)  # what lies between the rows must not be read into sums
            wide[:, :90] = seeded(m, 90).to(dtype)
            for out_dtype in DTYPES:
                subject.check(wide[:, :90], out_dtype=out_dtype, y_pad=9)


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_row_stride_zero(isa: str, bits: int) -> None:
    subject = layer(bits, 70, 90)
    subject.check(seeded(1, 90).expand(9, 90))


def test_weight_only_zero_rows_and_no_bias(isa: str) -> None:
    for bits in (8, 4):
        for grid in ("symmetric",) if bits == 8 else GRIDS:
            options = {} if bits == 8 else {"grid": grid}
            x = torch.zeros(67, 100)
            plain = layer(bits, 70, 100, bias=False, **options)
            for rows in (1, 8, 67):
                assert bool((plain.check(x[:rows]) == 0).all())
            biased = layer(bits, 70, 100, **options)
            for rows in (1, 8, 67):
                assert bool((biased.check(x[:rows]) == biased.tensors["bias"]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_nan_stays_in_its_row(isa: str, bits: int, dtype: torch.dtype) -> None:
    for grid in ("symmetric",) if bits == 8 else GRIDS:
        subject = layer(bits, 70, 100, **({} if bits == 8 else {"grid": grid}))
        for m in (3, 9, 67):
            x = seeded(m, 100).to(dtype)
            clean = subject.run(x)
            for bad in (math.nan, math.inf, -math.inf):
                x[1, 57] = bad
                y = subject.run(x)
                assert not bool(y[1][subject.reference(x, dtype)[1].isnan()].isfinite().any())
                assert not math.isnan(bad) or bool(y[1].isnan().all())
                assert_bits_equal(y[0], clean[0])
                assert_bits_equal(y[2:], clean[2:])


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_magnitudes(isa: str, bits: int) -> None:
    """Rows near the ends of the range, subnormal ones too; far from overflow of an unscaled sum."""
    subject = layer(bits, 70, 96, bias=False)
    for dtype in (torch.float32, torch.bfloat16):
        for exponent in (-149, -133, -126, -100, 60, 100):
            x = (seeded(67, 96).sign() * 2.0**exponent).to(dtype)
            for m in (1, 8, 67):
                subject.check(x[:m])


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_ignores_flush_denormal(isa: str, bits: int) -> None:
    subject = layer(bits, 70, 96, bias=False)
    x = seeded(8, 96) * 2.0**-130
    expected = subject.run(x)
    torch.set_flush_denormal(True)
    try:
        actual = subject.run(x)
    finally:
        torch.set_flush_denormal(False)
    assert_bits_equal(actual, expected)


@pytest.mark.parametrize("grid", ["symmetric", "minimum"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_smoothing(isa: str, bits: int, grid: str) -> None:
    subject = layer(bits, 70, 203, smooth=True, **({} if bits == 8 else {"grid": grid}))
    for dtype in DTYPES:
        for m in (1, 7, 67):
            subject.check(seeded(m, 203).to(dtype))
            assert not _C.last_kernel().endswith("+bf16")


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_empty(isa: str, bits: int) -> None:
    subject = layer(bits, 70, 40)
    assert subject.run(torch.empty(0, 40)).shape == (0, 70)
    nothing = layer(bits, 70, 0)
    for m in (1, 9):
        assert_bits_equal(nothing.run(torch.empty(m, 0)), nothing.tensors["bias"].expand(m, 70).contiguous())
    assert layer(bits, 0, 40).run(torch.empty(3, 40)).shape == (3, 0)


def test_weight_only_refuses_nonsense() -> None:
    subject = W4(64, 64)
    packed, scale = pointer(subject.packed), pointer(subject.scales)
    for arguments in (
        (packed + 1, scale, 0, 0, 2, 0, 0, 64, 64, 32),  # alignment
        (packed, scale, 0, 0, 1, 0, 0, 64, 64, 32),  # bf16 scales
        (packed, scale, 0, 0, 2, 0, 0, 64, 64, 12),  # group of 12
        (packed, scale, 0, 0, 2, 0, 0, 64, 64, 0),
        (packed, scale, scale, scale, 2, 0, 0, 64, 64, 32),  # zero point and minimum
        (packed, scale, 0, 0, 2, 0, 0, -1, 64, 32),
    ):
        with pytest.raises(ValueError, match="expected"):
            _C.LinearW4A16(*arguments)
    y, x = torch.empty(1, 64), torch.empty(1, 64)
    for dtype, rows, threads in ((3, 1, 1), (0, -1, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            subject.layer.run(pointer(x), dtype, rows, 64, pointer(y), 0, 64, threads)
