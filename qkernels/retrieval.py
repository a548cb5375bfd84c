"""Search over sentence embeddings in int8 or binary, by the kernels that serve the layers.

    index = qk.EmbeddingIndex(384)
    index.add(embeddings)                      # [rows, 384], fp32
    scores, rows = index.search(queries, k=10)

An index is one quantized Linear: each embedding is a row of its weight with a scale of its own, and searching is one
product.  The binary form looks at signs first, one bit per feature; the best by Hamming distance are scored by their
int8 rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import reference
from ._atomic import replacing
from .nn import QuantLinear
from .scheme import Scheme

__all__ = ["EmbeddingIndex"]

FILE = "index.safetensors"
KINDS = ("int8", "binary")
ROWS_AT_ONCE = 1 << 18  # rows in one product: bounds the scores in memory
ROWS_IN_CACHE = 1 << 14  # rows of signs that one query is compared with at once: 0.8 MB for 384 features


class EmbeddingIndex:
    """Embeddings in 8 bits (or 1), and the nearest of them by inner product.

    With embeddings of length 1 the inner product is the cosine.

    Args:
        width: features per embedding.
        kind: "int8", or "binary": signs first, int8 for the `rescore` best ones.
        rescore: binary only: how many candidates per result are scored by their int8 rows.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, width: int, *, kind: str = "int8", rescore: int = 8) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 65_536:
            raise ValueError(f"width: expected an integer from 1 to 65536, got {width!r}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if isinstance(rescore, bool) or not isinstance(rescore, int) or rescore < 1:
            raise ValueError(f"rescore: expected a positive integer, got {rescore!r}")
        self.width, self.kind, self.rescore = width, kind, rescore
        self._codes: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._parts: list[QuantLinear] | None = None
        self._signs: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(scale) for scale in self._scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored codes, scales and signs."""
        signs = len(self) * 8 * -(-self.width // 64) if self.kind == "binary" else 0
        return len(self) * (self.width + 4) + signs

    def __repr__(self) -> str:
        return f"EmbeddingIndex(width={self.width}, kind={self.kind!r}, rows={len(self)})"

    def add(self, embeddings: Tensor) -> None:
        """Append rows `[rows, width]`; they are numbered in the order in which they come.

        Raises:
            ValueError, TypeError: another shape or dtype, or values that are not finite; nothing is added then.
        """
        rows = self._check(embeddings, "embeddings")
        tensors = reference.quantize_weight(rows, Scheme())
        self._codes = [*self._rows(), tensors["weight"].cpu()]
        self._scales.append(tensors["weight_scale"].cpu())
        self._parts = self._signs = None

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """The `k` rows of largest inner product with each query, best first.

        Args:
            queries: `[M, width]` or `[width]`.
            k: fewer are returned where the index holds fewer rows.

        Returns:
            Scores fp32 `[M, k]` and row numbers int64 `[M, k]`; without the first dimension for a single query.

        Raises:
            ValueError, TypeError: naming the argument; also for an empty index.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a positive integer, got {k!r}")
        if not len(self):
            raise ValueError("search: expected an index with rows, this one is empty")
        single = isinstance(queries, Tensor) and queries.dim() == 1
        x = self._check(queries.unsqueeze(0) if single else queries, "queries").cpu()
        k = min(k, len(self))
        scores, rows = self._search_int8(x, k) if self.kind == "int8" else self._search_binary(x, k)
        return (scores[0], rows[0]) if single else (scores, rows)

    # -- int8 -------------------------------------------------------------------------------------------------

    def _search_int8(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = x.new_zeros(len(x), 0)
        where = torch.zeros(len(x), 0, dtype=torch.int64)
        start = 0
        for part in self._prepared():
            scores, rows = part(x).topk(min(k, part.out_features), dim=1)
            best, where = torch.cat((best, scores), 1), torch.cat((where, rows + start), 1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, kept)
            start += part.out_features
        return best, where

    def _prepared(self) -> list[QuantLinear]:
        """The rows as layers, packed once after the last change."""
        if self._parts is None:
            self._merge()
            self._parts = [
                QuantLinear(self.width, len(scale), {"weight": codes, "weight_scale": scale}, "w8a8")
                for codes, scale in zip(
                    self._codes[0].split(ROWS_AT_ONCE), self._scales[0].split(ROWS_AT_ONCE), strict=True
                )
            ]
            self._codes = []  # the packed rows are the only ones
        return self._parts

    def _rows(self) -> list[Tensor]:
        """The codes, unpacked if they are packed."""
        return self._codes if self._parts is None else [part.canonical()["weight"] for part in self._parts]

    def _merge(self) -> None:
        if len(self._codes) > 1:
            self._codes = [torch.cat(self._codes)]
        if len(self._scales) > 1:
            self._scales = [torch.cat(self._scales)]

    # -- binary -----------------------------------------------------------------------------------------------

    def _search_binary(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._merge()
        if self._signs is None:
            self._signs = _pack_signs(self._codes[0])
        wanted = min(k * self.rescore, len(self))
        scores, rows = [], []
        for query, bits in zip(x, _pack_signs(x), strict=True):
            distance = torch.cat([_count_ones(part ^ bits) for part in self._signs.split(ROWS_IN_CACHE)])
            near = distance.topk(wanted, largest=False).indices.sort().values
            exact = (self._codes[0][near].to(torch.float32) @ query) * self._scales[0][near]
            top, at = exact.topk(k)
            scores.append(top)
            rows.append(near[at])
        return torch.stack(scores), torch.stack(rows)

    # -- files ------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the index to a new directory, or over an earlier index. An error leaves what was there."""
        self._merge()
        codes = torch.cat(self._rows()) if len(self) else torch.zeros(0, self.width, dtype=torch.int8)
        scales = self._scales[0] if self._scales else torch.zeros(0)
        facts = {"format": "qkernels.index", "version": "1", "kind": self.kind, "rescore": str(self.rescore)}
        target = Path(directory)
        if target.exists() and any(target.iterdir()) and not (target / FILE).is_file():
            raise ValueError(f"directory: expected a new one or an index, got {target}, which holds something else")
        with replacing(target, drop=lambda old: [FILE]) as content:
            save_file({"codes": codes, "scale": scales}, str(content / FILE), metadata=facts)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> EmbeddingIndex:
        """The index that `save` wrote.

        Raises:
            ValueError: not an index, or a damaged one.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise ValueError(f"directory: expected an index ({FILE}) in {directory}")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts: Mapping[str, Any] = file.metadata() or {}
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"directory: {path} is damaged: {error}") from error
        codes, scale = tensors.get("codes"), tensors.get("scale")
        if (
            facts.get("format") != "qkernels.index"
            or codes is None
            or scale is None
            or codes.dim() != 2
            or codes.dtype != torch.int8
            or scale.dtype != torch.float32
            or scale.shape != codes.shape[:1]
        ):
            raise ValueError(f"directory: {path} is not an index that this version reads")
        index = cls(codes.shape[1], kind=str(facts.get("kind")), rescore=int(facts.get("rescore", "8")))
        if len(codes):
            index._codes, index._scales = [codes], [scale]
        return index

    def _check(self, x: Tensor, name: str) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x)}"
            )
        if x.dim() != 2 or x.shape[1] != self.width:
            raise ValueError(f"{name}: expected shape [rows, {self.width}], got {list(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or Inf")
        return x.detach().to(torch.float32)


def _pack_signs(x: Tensor) -> Tensor:
    """One bit per feature, set where it is positive: int64 `[rows, ceil(width / 64)]`."""
    bits = (x > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 64)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).view(torch.int64)


def _count_ones(x: Tensor) -> Tensor:
    """Bits that are set in every row of int64 `[rows, words]`, which is overwritten: int64 `[rows]`.

    Sums of neighbouring bits, of pairs, of nibbles; a product adds the bytes up in the highest one (Warren, Hacker's
    Delight, 5-1).
    """
    x -= (x >> 1) & 0x5555555555555555
    high = (x >> 2) & 0x3333333333333333
    x &= 0x3333333333333333
    x += high
    x += x >> 4
    x &= 0x0F0F0F0F0F0F0F0F
    x *= 0x0101010101010101
    x >>= 56
    return x.sum(1)
