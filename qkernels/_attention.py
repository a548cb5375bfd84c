"""The reference of what stands between the Linears of an attention block: rotary embedding, a cache's new tokens, and
attention itself.

    rotary      y = x * cos + turned(x) * sin              each product and the sum rounded to the dtype of x
                turned(x) = (-x[D/2:], x[:D/2])
    append      keys[:, :, length:][:, :, :T] = key         and the values; then length += T
    attention   softmax(scale * q k^T + mask) v over the keys that a query sees, in float64, rounded once

A kernel's rotary embedding, and its cache, equal this to the bit.  The GPU's attention sums in float32 in an order of
its own and rounds ``exp(score - largest)`` to the dtype before the product with ``v``: within
``2^-7 * softmax(...) |v|`` (bfloat16) or ``2^-10`` of it (float16) of this, where scores are below 2^10.

The CPU's attention computes in float32, widens 16-bit inputs and rounds once at the end.  Let ``u`` be 2^-24
and ``A`` the largest ``scale * sum |q k| + |mask|`` of a query, masks of -2^100 and less aside.  A score of D products
and its distance to the largest are off by ``(D + 8) A u``, and so is a weight, relative to itself; its exponential, the
sums over L keys and the quotient add 2 L + 16 roundings at most: within
``(2 (D + 8) A + 2 L + 16) u * softmax(...) |v|`` of this to first order, plus the rounding to 16 bits.  Weights below
2^-126 of the largest count as zero.  A row with NaN among its scores is NaN; keys that ``causal`` hides from a query
may or may not pass on a NaN of their values, or make one of an infinity.

On AMX bfloat16 goes by tiles: both products multiply bfloat16 and sum in float32, ``q k^T`` before it is scaled, whose
sums have to stay below 2^128.  Weights have 16 bits there, which adds ``2^-15 * softmax(...) |v|``.  They are cut to 8
where the values of a head are not all finite, in stretches of up to 256 keys that hold such a value: ``2^-7`` for the
other features there.  Numbers below 2^-126 count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append", "attention", "rotary"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), the features of a head turned in pairs ``(i, i + D / 2)``.

    Args:
        x: ``[B, H, T, D]``, D even.
        cos, sin: ``[B or 1, T, D]``, in the dtype of ``x``.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``x``.
    """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def append(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    """New tokens into a cache of fixed size, in place.

    Args:
        keys: ``[B, G, L, D]``; values: ``[B, G, L, E]``.
        length: integer, without dimensions: tokens that are there.  It counts the new ones.
        key: ``[B, G, T, D]``, T at most L less the length; value: ``[B, G, T, E]``; in the dtypes of the cache.
    """
    tokens = key.shape[2]
    where = torch.arange(tokens, device=length.device) + length
    keys.index_copy_(2, where, key)
    values.index_copy_(2, where, value)
    length.add_(tokens)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """Attention where heads of queries share heads of keys (Ainslie et al. 2023).

    Args:
        q: ``[B, H, T, D]``.
        k, v: ``[B, G, L, D]``, H a multiple of G.
        mask: broadcast to ``[B, H, T, L]``; bool: True where a query sees a key; floating point: added to the scores;
            None: it sees all.
        scale: factor of the scores.
        causal: query t sees keys up to t, of those that the mask shows.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``q``; zeros for a query that sees no key, that is whose scores are all -inf.
    """
    shared = q.shape[1] // k.shape[1]
    wide = [x.to(torch.float64) for x in (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))]
    scores = wide[0] @ wide[1].transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(nothing, 0.0)
    return (weights @ wide[2]).to(q.dtype).transpose(1, 2).contiguous()
