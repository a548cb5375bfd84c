"""EmbeddingIndex: the same neighbours as float search, in a quarter of the memory; files; refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, seeded

import qkernels as qk
import qkernels.retrieval


def embeddings(rows: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Clusters, as sentences have them, scaled to length 1."""
    centers = seeded(20, width, seed=100)
    x = centers[torch.arange(rows) % 20] + 0.6 * seeded(rows, width, seed=seed)
    return torch.nn.functional.normalize(x, dim=1)


def recall(found: torch.Tensor, expected: torch.Tensor) -> float:
    hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, expected, strict=True))
    return hits / expected.numel()


@pytest.mark.parametrize("kind, least", [("int8", 0.97), ("binary", 0.85)])
def test_search_finds_what_float_search_finds(kind, least):
    data, queries = embeddings(600), embeddings(20, seed=5)
    index = qk.EmbeddingIndex(48, kind=kind)
    index.add(data)
    scores, rows = index.search(queries, k=10)
    exact = queries @ data.t()
    assert rows.dtype == torch.int64
    assert recall(rows, exact.topk(10).indices) >= least
    torch.testing.assert_close(scores, exact.gather(1, rows), atol=0.02, rtol=0)
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())


def test_rows_are_numbered_in_order_over_several_adds_and_parts(monkeypatch):
    monkeypatch.setattr(qkernels.retrieval, "ROWS_AT_ONCE", 64)
    data = embeddings(200)
    one, many = qk.EmbeddingIndex(48), qk.EmbeddingIndex(48)
    one.add(data)
    for part in data.split(37):
        many.add(part)
        many.search(data[:1])
    for a, b in zip(one.search(data, k=5), many.search(data, k=5), strict=True):
        assert_bits_equal(a, b)
    assert one.search(data, k=1)[1][:, 0].tolist() == list(range(200))
    assert len(many) == 200
    assert many.nbytes == 200 * 52


def test_one_query_and_more_results_than_rows():
    index = qk.EmbeddingIndex(48)
    index.add(embeddings(3))
    scores, rows = index.search(embeddings(3)[1], k=10)
    assert rows.shape == (3,)
    assert int(rows[0]) == 1
    assert float(scores[0]) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind", ("int8", "binary"))
def test_save_and_load(tmp_path, kind):
    index = qk.EmbeddingIndex(48, kind=kind, rescore=3)
    index.save(tmp_path / "empty")
    assert len(qk.EmbeddingIndex.load(tmp_path / "empty")) == 0
    index.add(embeddings(50))
    for _ in range(2):  # a second time over the first
        index.save(tmp_path / "index")
    loaded = qk.EmbeddingIndex.load(tmp_path / "index")
    assert repr(loaded) == repr(index)
    for a, b in zip(loaded.search(embeddings(4, seed=9)), index.search(embeddings(4, seed=9)), strict=True):
        assert_bits_equal(a, b)
    loaded.add(embeddings(2))
    assert len(loaded) == 52


def test_refusals(tmp_path):
    index = qk.EmbeddingIndex(8)
    with pytest.raises(ValueError, match="this one is empty"):
        index.search(seeded(1, 8))
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[rows, 8\]"):
        index.add(seeded(2, 7))
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        index.add(torch.full((1, 8), torch.nan))
    with pytest.raises(TypeError, match="embeddings: expected a floating-point"):
        index.add(torch.ones(1, 8, dtype=torch.int64))
    assert len(index) == 0
    index.add(seeded(2, 8))
    with pytest.raises(ValueError, match="k: expected a positive integer"):
        index.search(seeded(1, 8), k=0)
    for arguments, message in [((0,), "width"), ((8, "float"), "kind"), ((8, "binary", 0), "rescore")]:
        names = dict(zip(("width", "kind", "rescore"), arguments, strict=False))
        with pytest.raises(ValueError, match=f"{message}: expected"):
            qk.EmbeddingIndex(**names)
    with pytest.raises(ValueError, match="expected an index"):
        qk.EmbeddingIndex.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        index.save(tmp_path / "other")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "index.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        qk.EmbeddingIndex.load(tmp_path / "bad")


@pytest.mark.parametrize("width", (1, 63, 64, 65, 384))
def test_signs_are_compared_bit_by_bit(width):
    x = seeded(7, width, seed=width)
    x[0], x[1], x[2] = 1.0, -1.0, 0.0
    signs = qkernels.retrieval._pack_signs(x)
    assert signs.shape == (7, -(-width // 64))
    for i in range(7):
        expected = ((x > 0) != (x[i] > 0)).sum(1)
        assert torch.equal(qkernels.retrieval._count_ones(signs ^ signs[i]), expected)


def test_binary_search_in_pieces_that_do_not_fit(monkeypatch):
    data, queries = embeddings(101), embeddings(5, seed=5)
    index = qk.EmbeddingIndex(48, kind="binary")
    index.add(data)
    whole = index.search(queries, k=3)
    monkeypatch.setattr(qkernels.retrieval, "ROWS_IN_CACHE", 7)
    for a, b in zip(whole, index.search(queries, k=3), strict=True):
        assert_bits_equal(a, b)
