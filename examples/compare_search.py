"""Recall and time of embedding search: `qk.EmbeddingIndex` beside fp32 in torch and, where it is installed, faiss.

pip install faiss-cpu                               # optional
python examples/compare_search.py                   # 100,000 embeddings of 384 features
python examples/compare_search.py --rows 1000000 --width 768 --json search.json

Embeddings are random directions around random centres, of length 1, and queries are embeddings that were moved a
little: neighbours are near each other, as those of real sentences are.  Recall is the share of the 10 nearest by fp32
inner product that an index finds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

import qkernels as qk
from qkernels.demo.timing import interleaved

K = 10
Search = Callable[[Tensor], Tensor]


def embeddings(rows: int, width: int, queries: int) -> tuple[Tensor, Tensor]:
    """Rows `[rows, width]` and queries `[queries, width]`, all of length 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres = normal(max(rows // 100, 1), width)
    base = centres[torch.randint(len(centres), (rows,), generator=generator)] + 0.7 * normal(rows, width)
    moved = base[torch.randint(rows, (queries,), generator=generator)] + 0.5 * normal(queries, width)
    return torch.nn.functional.normalize(base, dim=1), torch.nn.functional.normalize(moved, dim=1)


def contenders(base: Tensor) -> dict[str, tuple[Search, int]]:
    """Name -> a function from queries to row numbers `[M, K]`, and the bytes it searches in."""
    rows, width = base.shape
    found: dict[str, tuple[Search, int]] = {"torch fp32": (lambda q: (q @ base.T).topk(K, dim=1)[1], base.nbytes)}
    for kind in ("int8", "binary"):
        index = qk.EmbeddingIndex(width, kind=kind)
        index.add(base)
        found[f"qkernels {kind}"] = (lambda q, index=index: index.search(q, K)[1], index.nbytes)
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu")
        return found
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(width)
    coded = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    coded.train(base.numpy())
    for name, index, size in (("faiss flat fp32", flat, 4), ("faiss 8-bit", coded, 1)):
        index.add(base.numpy())
        found[name] = (lambda q, index=index: torch.from_numpy(index.search(q.numpy(), K)[1]), rows * width * size)
    return found


def main() -> None:
    """Build, search, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 128], help="queries in one call")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per number of queries")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    base, queries = embeddings(args.rows, args.width, 500)
    names = contenders(base)
    exact = names["torch fp32"][0](queries)
    recalls = {}
    for name, (search, _) in names.items():
        hits = (search(queries).unsqueeze(2) == exact.unsqueeze(1)).any(2)
        recalls[name] = float(hits.float().mean())
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in args.queries:
        part = queries[:count].contiguous()
        calls = {name: (lambda search=search, part=part: search(part)) for name, (search, _) in names.items()}
        medians = interleaved(calls, seconds=args.seconds)
        for name, value in medians.items():
            times[name].append(1e3 * value)
    heads = "".join(f"{f'{count} queries, ms':>18}" for count in args.queries)
    print(f"{'':<18}{'MB':>8}{f'recall@{K}':>12}{heads}")
    for name, (_, size) in names.items():
        cells = "".join(f"{value:>18.2f}" for value in times[name])
        print(f"{name:<18}{size / 1e6:>8.1f}{recalls[name]:>12.4f}{cells}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"rows": args.rows, "width": args.width, "recall": recalls, "ms": times}, file, indent=1)


if __name__ == "__main__":
    main()
