"""What the tests of 4-bit weights on a GPU share."""

from __future__ import annotations

import pytest
import torch
from helpers import W4_KINDS, seeded
from torch import Tensor

from qkernels import cuda, ops, reference
from qkernels.cuda_w4 import MULTIPLIER_TILES, PHASED_TILES, TILES, TILES_OF_HALVES
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.scheme import Scheme

__all__ = [
    "MMA_TILES",
    "MULTIPLIER_TILES",
    "PHASED_TILES",
    "TILES",
    "TILES_OF_HALVES",
    "canonical",
    "gpu",
    "on_gpu",
    "scheme_of",
]

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
    pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module"),
]
MMA_TILES = [(tokens, 0) for tokens in (8, 16, 64, 128)]
"""Of 8-bit activations by mma.sync."""


def scheme_of(
    kind: str, group: int | None, *, activation_bits: int | None = None, fp32: bool = False, symmetric: bool = True
) -> Scheme:
    """``symmetric``: the activations."""
    options = dict(W4_KINDS[kind])
    if not symmetric:
        options["activation_symmetric"] = False
    if group is not None:
        options |= {"weight_granularity": "per_group", "group_size": group}
        if fp32:
            options["scale_dtype"] = torch.float32
    return Scheme(4, activation_bits=activation_bits, **options)  # type: ignore[arg-type]


def canonical(scheme: Scheme, n: int, k: int, *, bias: bool = True, smooth: bool = False) -> dict[str, Tensor]:
    tensors = reference.quantize_weight(seeded(n, k, seed=n + k), scheme)
    if bias:
        tensors["bias"] = seeded(n, seed=1)
    if smooth:
        tensors["inv_smooth"] = seeded(k, seed=2).abs() + 0.5
    return tensors


def on_gpu(tensors: dict[str, Tensor], scheme: Scheme, k: int) -> PreparedCudaW4:
    prepared = ops.prepare(tensors, scheme, k, device="cuda")
    assert isinstance(prepared, PreparedCudaW4), prepared.reason
    return prepared
