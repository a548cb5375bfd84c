"""GemLite as a rival on a GPU, where ``gemlite`` is installed: Triton kernels over the codes and scales of our layers.

Its layers take floating-point activations (bf16 and fp16) and quantize them to int8 for ``w8a8`` themselves; for
``w4a8`` it has no int8 activations.  At the first call of a number of rows it tunes itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.scheme import Scheme

__all__ = ["gemlite_contender"]

Call = Callable[[int], object]


def gemlite_contender(
    scheme: Scheme, canonical: Sequence[Mapping[str, Tensor]], x: Tensor
) -> Iterator[tuple[str, bool, Call]]:
    """(name, False, call) of GemLite over each weight, or nothing where it is not installed or has no such kernel.

    Args:
        scheme: ``w8a8``, ``w8a16`` or ``w4a16``, symmetric.
        canonical: of each weight, ``weight`` and ``weight_scale`` as a layer's canonical state holds them.
        x: the activations ``[M, K]``.
    """
    known = scheme.weight_bits == 8 or scheme.weight_only
    if importlib.util.find_spec("gemlite") is None or x.dtype == torch.float32 or not known:
        return
    layers = [_layer(scheme, tensors["weight"], tensors["weight_scale"], x.dtype) for tensors in canonical]
    yield "gemlite", False, lambda index: layers[index % len(layers)](x)


def _layer(scheme: Scheme, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
    from gemlite import helper

    options = {"device": str(weight.device), "dtype": dtype}
    if scheme.weight_bits == 8:
        of_floats = helper.A16W8_INT8 if scheme.weight_only else helper.A8W8_int8_dynamic
        kept = dtype if scheme.weight_only else torch.float32
        return of_floats(**options).from_weights(weight, None, scale.unsqueeze(1).to(kept))
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(1)
    scales = scale.to(dtype).reshape(-1, 1)
    return helper.A16W4_HQQ_INT(**options).from_weights(codes, scales, torch.full_like(scales, 8.0), None)
