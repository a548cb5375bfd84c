"""W8A8 in Triton: the portable GPU path, where the CUDA module is not built or has no kernel for the architecture.

Imported on demand: :mod:`triton` is no dependency of the package.  Results equal :mod:`qkernels.reference` bit for bit.
"""

from __future__ import annotations

__all__ = ["available"]


def available() -> str:
    """Why the Triton kernels cannot be used; "" where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""
