"""Kernels in Triton: the portable GPU path, where the CUDA module is not built or has no kernel for the architecture.

Imported on demand: :mod:`triton` is no dependency of the package.  Results of W8A8 and W4A8 equal
:mod:`qkernels.reference` bit for bit; W4A16 and W8A16 sum in float32.
"""

from __future__ import annotations

from ..scheme import Scheme

__all__ = ["GROUP_STEP", "available", "unfit"]

GROUP_STEP = 32
"""Groups of 4-bit weights are a multiple of it, or the whole row: what a block of a kernel covers."""


def available() -> str:
    """Why the Triton kernels cannot be used; "" where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


def unfit(scheme: Scheme, in_features: int, out_features: int) -> str:
    """What keeps every Triton kernel from a layer of these sizes; "" if nothing does."""
    if in_features == 0 or out_features == 0:
        return f"no Triton kernel for an empty weight [{out_features}, {in_features}]"
    group = scheme.resolve_group_size(in_features)
    if scheme.weight_granularity == "per_group" and group % GROUP_STEP and group < in_features:
        return f"no Triton kernel for groups of {group} (multiples of {GROUP_STEP})"
    return ""
