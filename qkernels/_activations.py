"""The activation half of the reference: the rows that enter a product, to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _rounding as rounding
from qkernels._granules import check_positive
from qkernels.checks import check_vector


@torch.no_grad()
def quantize_activations(
    x: Tensor,
    *,
    symmetric: bool = True,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    inv_smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Activations to 8 bits, one grid per row (dynamic) or one given for all (static).

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``; ``[M, K]`` for most callers.
        symmetric: int8 around zero; False: uint8 with a zero point.
        scale: static: a number or a one-element tensor, finite and > 0.
        zero_point: static and asymmetric: 0..255.
        inv_smooth: float32 ``[K]``; ``x * inv_smooth`` (one rounding) comes before everything else.

    Returns:
        Codes int8 or uint8 ``[..., K]``, scales float32 ``[...]``, zero points int32 ``[...]`` or None.  A row with
        a NaN or Inf (after smoothing) has codes 0, scale NaN, zero point 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    wide = rounding.widen(x, "x")
    if not wide.dim():
        raise ValueError("x: expected at least one dimension, got none")
    if inv_smooth is not None:
        check_vector("inv_smooth", inv_smooth, wide.shape[-1])
        wide = wide * inv_smooth.to(torch.float32)
    rows = wide.shape[:-1]
    given = _check_given_scale(scale, wide.device)
    if given is not None:
        given = given.expand(rows)
    if symmetric:
        if zero_point is not None:
            raise ValueError("zero_point: expected None with symmetric=True, got a value")
        grid = rounding.symmetric_grid(wide, bits=8, scale=given)
        return rounding.to_integers(wide, grid, low=-127, high=127).to(torch.int8), grid.scale, None
    if (given is None) != (zero_point is None):
        raise ValueError("zero_point: expected to be given together with scale, got only one of them")
    zeros = None
    if zero_point is not None:
        if _on_host(zero_point) and not 0 <= int(zero_point) <= 255:
            raise ValueError(f"zero_point: expected 0..255, got {int(zero_point)}")
        zeros = torch.as_tensor(zero_point, device=wide.device).to(torch.int32).reshape(()).expand(rows)
    grid = rounding.asymmetric_grid(wide, bits=8, scale=given, zero_point=zeros)
    return rounding.to_integers(wide, grid, low=0, high=255).to(torch.uint8), grid.scale, grid.zero_point


def _check_given_scale(scale: Tensor | float | None, device: torch.device) -> Tensor | None:
    if scale is None:
        return None
    given = torch.as_tensor(scale, device=device).detach().to(torch.float32)
    if given.numel() != 1:
        raise ValueError(f"scale: expected one element, got shape {list(given.shape)}")
    if _on_host(scale):
        check_positive("scale", given)
    return given.reshape(())


def _on_host(value: object) -> bool:
    """Values on an accelerator are not read back in every call: whoever put them there has checked them."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"
