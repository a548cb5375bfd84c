"""What ``qkernels bench --device cuda --schemes attention`` times: what a token costs between Linears on a GPU.

A shape KxN is K features in heads of 128, four of queries to one of keys, and N keys in a cache; M is the batch.

    attention         of a token over all N keys, behind a mask, which a static cache has
    attention, half   the same where the mask shows half of them
    rotary            of a token's queries and keys, read and written once
    torch: rotary     as transformers computes it
    torch: sdpa       scaled_dot_product_attention behind the mask, keys and values repeated for every head of queries
    torch: sdpa, no mask   the same without one, heads shared: what a cache of just those keys allows

Every row's limit is its bytes over the copy bandwidth.  Keys and values rotate through more memory than the L2 holds.
A kernel is timed once it is right: rotary embeddings to the bit, attention within 2^-7 of what its weights give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qkernels import reference
from qkernels.cuda_attention import attention, rotary
from qkernels.scheme import Scheme

__all__ = ["ProblemAttention"]

_SIZE, _SHARED = 128, 4


class ProblemAttention:
    """A token of a batch, and caches that fill ``cold_bytes``."""

    name = "attention"
    kernel = ""
    scheme = Scheme()

    def __init__(self, k: int, n: int, m: int, cold_bytes: int, dtype: torch.dtype) -> None:
        if k % (_SIZE * _SHARED) or dtype == torch.float32:
            raise ValueError(
                f"--schemes attention: expected shapes KxN with K a multiple of {_SIZE * _SHARED} and 16-bit floats, "
                f"got K = {k} and {dtype}"
            )
        self.k, self.n, self.m, self.dtype = k, n, m, dtype
        self.heads = k // _SIZE, k // _SIZE // _SHARED
        cache = 2 * m * self.heads[1] * n * _SIZE * dtype.itemsize
        copies = max(1, min(64, -(-cold_bytes // cache)))

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").to(dtype)

        self.q, self.key = (random(m, 1, heads, _SIZE).transpose(1, 2) for heads in self.heads)
        self.caches = [[random(m, self.heads[1], n, _SIZE) for _ in range(2)] for _ in range(copies)]
        self.angles = [random(1, 1, _SIZE) for _ in range(2)]
        seen = torch.arange(n, device="cuda").view(1, 1, 1, n)
        self.masks = seen < n, seen < max(1, n // 2)

    def bytes_of(self, contender: str) -> float:
        """What has to move."""
        if "rotary" in contender:
            return 2.0 * (self.q.nbytes + self.key.nbytes)
        cache = sum(tensor.nbytes for tensor in self.caches[0])
        return 2.0 * self.q.nbytes + (cache / 2 if "half" in contender else cache)

    def contenders(self) -> Iterator[tuple[str, bool, Callable[[int], object]]]:
        """(name, ours, call) of everyone who can take this problem."""
        q, caches, scale = self.q, self.caches, _SIZE**-0.5
        cos, sin = self.angles

        def repeated(index: int) -> Tensor:
            k, v = (x.repeat_interleave(_SHARED, 1) for x in caches[index % len(caches)])
            return scaled_dot_product_attention(q, k, v, attn_mask=self.masks[0]).transpose(1, 2).contiguous()

        def without_mask(index: int) -> Tensor:
            k, v = caches[index % len(caches)]
            return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).contiguous()

        def behind(index: int, mask: Tensor) -> Tensor | None:
            k, v = caches[index % len(caches)]
            return attention(q, k, v, mask, scale)

        yield "attention", True, lambda index: behind(index, self.masks[0])
        yield "attention, half", True, lambda index: behind(index, self.masks[1])
        yield "rotary", True, lambda index: rotary(q, self.key, cos, sin)
        # the reference is what transformers computes, operation by operation
        yield "torch: rotary", False, lambda index: [reference.rotary(x, cos, sin) for x in (q, self.key)]
        if 3 * _SHARED * self.bytes_of("attention") < torch.cuda.mem_get_info()[0]:
            yield "torch: sdpa", False, repeated
        yield "torch: sdpa, no mask", False, without_mask

    def exact(self, call: Callable[[int], object], name: str) -> bool:
        """Whether the result over the first cache is the reference's, in the sense of the file's head."""
        result: Any = call(0)
        cos, sin = self.angles
        if name == "rotary":
            wanted = [reference.rotary(x, cos, sin) for x in (self.q, self.key)]
            return all(torch.equal(x, y) for x, y in zip(result, wanted, strict=True))
        mask = self.masks["half" in name]
        q, k, v = (x[:1].double() for x in (self.q, *self.caches[0]))  # one sequence: the reference takes memory
        exact, around = (reference.attention(q, k, x, mask, _SIZE**-0.5) for x in (v, v.abs()))
        return bool(((result[:1].double() - exact).abs() <= 2.0**-7 * around + 1e-6).all())
