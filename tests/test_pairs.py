"""W8A8 over weights of which few pairs are so large that a sum of two products leaves 16 bits: AVX2 multiplies most of
them by saturating instructions (csrc/cpu/linear_w8a8_pairs.h) and must lose nothing.

Every tier equals the definition."""

from __future__ import annotations

import helpers as H
import pytest
import torch
from torch import Tensor

from qkernels import _C, ops, reference
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme

SYMMETRIC, ASYMMETRIC = Scheme(), Scheme(activation_symmetric=False)
STATIC = Scheme.from_preset("w8a8_static").replace(activation_symmetric=False)
LARGE = torch.tensor(
    [[127, 127], [127, 2], [2, 127], [-127, -127], [-127, -2], [-2, -127], [-128, -128], [-128, -1], [-1, -128],
     [127, 1], [1, 127], [-128, 0], [0, -128], [127, -128], [-128, 127]], dtype=torch.int8,
)  # fmt: skip
"""Pairs on either side of what 16 bits hold with activations of 255."""


def weights(n: int, k: int, share: float, seed: int = 0) -> Tensor:
    """Small ones, of whose aligned pairs along K so large a share is of LARGE."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(-20, 21, (n, (k + 1) // 2, 2), generator=generator, dtype=torch.int8)
    where = torch.rand(made.shape[:2], generator=generator) < share
    kinds = torch.randint(len(LARGE), made.shape[:2], generator=generator)
    return torch.where(where[..., None], LARGE[kinds], made).flatten(1)[:, :k].contiguous()


def rows_of(m: int, k: int) -> Tensor:
    """Rows 0 and 1 all at one end of the range, 2 at either in turn, 3 zero, 4 with a NaN; the rest normal."""
    x = H.seeded(m, k, seed=m)
    x[0], x[1] = 3.0, -3.0
    x[2, ::2], x[2, 1::2] = 2.0, -2.0
    x[3] = 0.0
    x[4, k // 2] = float("nan")
    return x


def check(m: int, weight: Tensor, scheme: Scheme, isa: str, **options: torch.dtype) -> None:
    n, k = weight.shape
    made = {"weight": weight, "weight_scale": torch.rand(n) + 0.01, "bias": H.seeded(n)}
    made |= H.static_grid(scheme, 0.0173, 101)
    layer, x = QuantLinear(k, n, made, scheme), rows_of(m, k).to(options.get("dtype", torch.float32))
    H.assert_bits_equal(layer(x), reference.linear(x, made, scheme, k), f"{m} rows, weight {[n, k]}")
    H.assert_ran("w8a8", isa, m)


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, STATIC], ids=lambda s: s.name)
@pytest.mark.parametrize("share", [0.0, 0.004, 0.03])
def test_large_pairs_lose_nothing(isa: str, threads: int, scheme: Scheme, share: float) -> None:
    for m in (9, 12, 13, 18, 31):
        check(m, weights(130, 300, share), scheme, isa)


@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (64, 64), (65, 63), (15, 66), (17, 1024), (200, 1030), (70, 5000)])
def test_large_pairs_at_the_ends_of_rows_and_columns(isa: str, n: int, k: int, dtype: torch.dtype) -> None:
    for m in (16, 25):
        check(m, weights(n, k, 0.01), SYMMETRIC, isa, dtype=dtype)


def test_large_pairs_of_many_rows(isa: str, threads: int) -> None:
    """Blocks of rows, and rows that each thread has for itself."""
    for m in (95, 193, 400, 601):
        check(m, weights(200, 260, 0.01), SYMMETRIC, isa)


def test_large_pairs_all_in_one_place(isa: str) -> None:
    """Few in the whole weight, all of one slice of one superblock."""
    weight = weights(640, 2048, 0.0)
    weight[64:96, 1024:1500] = 127
    weight[100:120, 1600:2048] = -128
    for scheme in (SYMMETRIC, ASYMMETRIC):
        check(40, weight, scheme, isa)


def test_weights_of_which_no_sample_is_enough(isa: str) -> None:
    """All as large as they get, and any bytes."""
    for value in (127, -127, -128):
        check(20, torch.full((70, 300), value, dtype=torch.int8), SYMMETRIC, isa)
    check(20, torch.randint(-128, 128, (70, 300), dtype=torch.int8), ASYMMETRIC, isa)


@pytest.mark.parametrize("symmetric", (True, False))
def test_large_pairs_meet_integers_that_were_quantized_before(isa: str, symmetric: bool) -> None:
    weight, scale = weights(130, 300, 0.01), torch.rand(130) + 0.1
    packed, colsum, minus = ops.pack_w8(weight)
    q, row_scale, zero_point = reference.quantize_activations(rows_of(40, 300), symmetric=symmetric)
    addresses = (packed.data_ptr(), colsum.data_ptr(), scale.data_ptr(), 0)
    layer = _C.LinearW8A8(*addresses, 130, 300, minus, symmetric, 0.0, 0, 0)
    y, zero_points = torch.empty(40, 130), 0 if zero_point is None else zero_point.data_ptr()
    layer.run_quantized(q.data_ptr(), 300, row_scale.data_ptr(), zero_points, 40, y.data_ptr(), 0, 130, 1)
    expected = reference.linear_w8a8_prequantized(q, row_scale, zero_point, weight, scale, None, torch.float32)
    H.assert_bits_equal(y, expected)
