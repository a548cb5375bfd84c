"""``qkernels bench --device cuda``: W8A8 on a GPU, cold weights, CUDA graphs, rivals in turns with ours.

By ``--schemes``, other weights and activations (:mod:`qkernels.bench.cuda_w4`, :mod:`qkernels.bench.cuda_w8a16`), the
quantizers of rows (:mod:`qkernels.bench.cuda_rows`) and attention (:mod:`qkernels.bench.cuda_attention`).

Each contender's calls, one per copy of the weight, are captured into a graph; graphs are replayed in an order drawn
anew for each round, and a row is the median over the rounds.  The copies together are larger than the L2.  Nothing of
ours is timed before its result equals the reference bit for bit.  Data are random throughout: zeros run faster.

Where operations limit, the clock is what the card's power limit leaves to what runs.  In such rows each contender runs
alone for :data:`STEADY_SECONDS` before each of its samples: in turns of a few milliseconds all would run at the clock
that their mixture leaves, and one that needs more power at others' expense.

    gemm               int8 activations to scaled output
    gemm overlapped    the same, each launch fetching its weight while the one before it ends
    layer              quantize and gemm from floating-point activations
    triton gemm        the portable kernels
    int_mm             torch._int_mm, int32 output: no scales
    cutlass            CUTLASS, where ``--cutlass`` names it (:mod:`qkernels.bench.cuda_cutlass`)
    gemlite            GemLite as a layer, where it is installed (:mod:`qkernels.bench.cuda_gemlite`)
    cublas bf16        torch.mm in bfloat16
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels import cuda, reference, triton
from qkernels.bench.cuda_attention import ProblemAttention
from qkernels.bench.cuda_cutlass import Cutlass
from qkernels.bench.cuda_gemlite import gemlite_contender
from qkernels.bench.cuda_rows import ProblemRows
from qkernels.bench.cuda_w4 import ProblemW4
from qkernels.bench.cuda_w8a16 import ProblemW8A16
from qkernels.bench.grid import traffic
from qkernels.bench.outcome import outcome
from qkernels.info import info
from qkernels.progress import tracking
from qkernels.scheme import Scheme

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672))
ROWS = (1, 16, 64, 128, 256, 1024, 4096)
MOST_CALLS = 32
GRAPH_SECONDS = 0.02
STEADY_SECONDS = 0.15
STEADY_ROUNDS, STEADY_REPLAYS = 3, 3
"""Of a row that operations limit: how often each contender has its turn at most, and what is timed then."""
ENOUGH_ROWS_FOR_INT_MM = 17

Call = Callable[[int], object]
"""Launches the work over copy ``i`` of the weight."""


@dataclass(frozen=True)
class CudaRow:
    """One contender at one shape and number of rows.  Times in microseconds, over interleaved replays; ``steady``: each
    at the clock that its own power leaves."""

    contender: str
    ours: bool
    kernel: str
    k: int
    n: int
    m: int
    median: float
    best: float
    worst: float
    limit: float
    percent_of_limit: float
    tops: float
    scheme: str = "w8a8"
    steady: bool = False


@dataclass(frozen=True)
class CudaCeilings:
    """Measured in the run: bytes read plus written a second, operations a second."""

    copy: float
    bf16: float
    int8: float

    def limit(self, moved: float, operations: float, *, integers: bool = True) -> float:
        """Microseconds that no kernel can beat whose products are of int8 or else of bfloat16."""
        return 1e6 * max(moved / self.copy, operations / (self.int8 if integers else self.bf16))


class Graph:
    """``count`` launches captured once; :meth:`replay` times them together."""

    def __init__(self, call: Call, count: int) -> None:
        self.count = count
        self._call = call  # a graph holds addresses: the tensors behind them must live as long as it does
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for index in range(count):
                call(index)
        self.replay()

    def replay(self) -> float:
        """Microseconds of one launch."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / self.count

    def settle(self, seconds: float) -> None:
        """Replay for so long."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.replay()


def measure_ceilings() -> CudaCeilings:
    """Copy bandwidth, the rate of a large bf16 product, that of int8 products from shared memory."""
    bf16 = _bf16_rate()
    try:
        random = torch.randint(-127, 128, (48 << 10,), dtype=torch.int8, device="cuda")
        operations = cuda.peak_s8(random, 20000)
        int8 = 1e6 * operations / statistics.median(_replays(Graph(lambda _: cuda.peak_s8(random, 20000), 1), 5))
    except ValueError:
        int8 = 2 * bf16  # the ratio of the two instructions' rates
    return CudaCeilings(_copy_rate(), bf16, int8)


def _copy_rate() -> float:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    graph = Graph(lambda _: torch.mul(source, 2.0, out=target), 4)
    return 1e6 * 2 * source.nbytes / statistics.median(_replays(graph, 7))


def _bf16_rate(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    graph = Graph(lambda _: torch.mm(a, b.t(), out=out), 4)
    return 1e6 * 2 * size**3 / statistics.median(_replays(graph, 7))


def _replays(graph: Graph, count: int) -> list[float]:
    return [graph.replay() for _ in range(count)]


class Problem:
    """The operands of one shape and number of rows; copies of the weight fill ``cold_bytes``."""

    name = "w8a8"
    scheme = Scheme()

    def __init__(
        self, k: int, n: int, m: int, cold_bytes: int, dtype: torch.dtype, cutlass: Cutlass | None = None
    ) -> None:
        self.k, self.n, self.m, self.dtype, self.cutlass = k, n, m, dtype, cutlass
        copies = max(2, min(64, -(-cold_bytes // (n * k))))
        self.weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies)]
        self.weight_scale = torch.rand(n, device="cuda") * 0.01 + 0.001
        self.layers: list[dict[str, Tensor | None]] = []
        for weight in self.weights:
            packed, colsum = cuda.pack_w8(weight)
            self.layers.append({"packed": packed, "colsum": colsum, "weight_scale": self.weight_scale, "bias": None})
        self.x = torch.randn(m, k, device="cuda").to(dtype)
        self.q, self.scale, _ = cuda.quantize_rows(self.x)
        self.out = torch.empty(m, n, dtype=dtype, device="cuda")

    @property
    def kernel(self) -> str:
        """The kernel of ours."""
        return cuda.kernel_name(self.m, self.n, self.k, self.x.device)

    def contenders(self) -> Iterator[tuple[str, bool, Call]]:
        """(name, ours, call) of everyone who can take this problem."""
        layers, count = self.layers, len(self.layers)

        def gemm(index: int, dependent: bool = False) -> Tensor:
            layer = layers[index % count]
            return cuda.gemm_w8a8(
                self.q, self.scale, None, layer, out_dtype=self.dtype, out=self.out, dependent=dependent
            )

        def layer(index: int) -> Tensor:
            t: Any = layers[index % count]
            return cuda.linear_w8a8(
                self.x,
                t["packed"],
                t["colsum"],
                t["weight_scale"],
                None,
                self.n,
                self.k,
                True,
                None,
                None,
                None,
                self.dtype,
            )

        yield "gemm", True, gemm
        yield "gemm overlapped", True, lambda index: gemm(index, True)
        yield "layer", True, layer
        if not triton.available():
            from qkernels.triton.gemm_w8a8 import gemm_w8a8

            yield (
                "triton gemm",
                True,
                lambda index: gemm_w8a8(
                    self.q, self.scale, None, self.weights[index % count], self.weight_scale, out_dtype=self.dtype
                ),
            )
        if self.m >= ENOUGH_ROWS_FOR_INT_MM and self.k % 8 == 0 and self.n % 8 == 0:
            yield "int_mm", False, lambda index: torch._int_mm(self.q, self.weights[index % count].t())
        if self.cutlass is not None and self.dtype == torch.bfloat16:
            yield from self._cutlass(self.cutlass)
        canonical = [{"weight": weight, "weight_scale": self.weight_scale} for weight in self.weights]
        yield from gemlite_contender(self.scheme, canonical, self.x)
        wide = [weight.to(torch.bfloat16) for weight in self.weights[: max(2, count // 2)]]
        x16, out16 = self.x.to(torch.bfloat16), torch.empty(self.m, self.n, dtype=torch.bfloat16, device="cuda")
        yield "cublas bf16", False, lambda index: torch.mm(x16, wide[index % len(wide)].t(), out=out16)

    def _cutlass(self, library: Cutlass) -> Iterator[tuple[str, bool, Call]]:
        out, first = torch.empty_like(self.out), library.default(self.m, self.n)
        times: dict[int, float] = {}
        calls: dict[int, Call] = {}
        for number in range(library.configurations):
            calls[number] = library.gemm(self.q, self.scale, self.weights, self.weight_scale, out, number)
            try:
                graph = Graph(calls[number], 4)
            except RuntimeError:
                if number == first:
                    return
                continue
            graph.settle(STEADY_SECONDS / 3)
            times[number] = min(_replays(graph, 3))
        yield "cutlass", False, calls[first]
        best = min(times, key=lambda number: times[number])
        yield "cutlass best", False, calls[best]

    def exact(self, call: Call) -> bool:
        """Whether the result over the first weight has the reference's bits."""
        wanted = reference.linear_w8a8_prequantized(
            self.q, self.scale, None, self.weights[0], self.weight_scale, None, self.dtype
        )
        result = call(0)
        bits = torch.int32 if self.dtype == torch.float32 else torch.int16
        return isinstance(result, Tensor) and torch.equal(result.view(bits), wanted.view(bits))


def run_cuda_grid(args: argparse.Namespace) -> int:
    """Run what the command line asks for on the current GPU; 1 if one of our results was not exact, else 0.

    Raises:
        RuntimeError: no GPU that the CUDA module serves.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda: no CUDA device, or a torch built without CUDA")
    reason = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        raise RuntimeError(f"--device cuda: {reason}")
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings.copy / 1e12:.2f} TB/s, "
        f"bf16 {ceilings.bf16 / 1e12:.0f} TFLOP/s, int8 {ceilings.int8 / 1e12:.0f} TOP/s"
    )
    dtype = getattr(torch, args.dtype)
    cutlass = Cutlass(args.cutlass) if args.cutlass else None
    rows: list[CudaRow] = []
    notes: list[str] = []
    known = ("w8a8", "w8a16", "w4a16", "w4a8", "w4a8_intscale", "quantize", "attention")
    unknown = sorted(set(args.schemes) - set(known))
    if unknown:
        raise ValueError(f"--schemes: expected {', '.join(known)} with --device cuda, got {', '.join(unknown)}")
    cases = list(itertools.product((s for s in args.schemes if s != "quantize"), args.shapes, args.rows))
    if "quantize" in args.schemes:
        cases += [("quantize", (k, k), m) for k in sorted({k for k, _ in args.shapes}) for m in args.rows]
    with torch.inference_mode(), tracking(None, total=len(cases), what="bench") as step:
        for number, (name, (k, n), m) in enumerate(cases):
            step(number, len(cases), f"{name} K={k} N={n} M={m}")
            cold = args.cold_mb << 20
            new = _run_problem(_problem(name, k, n, m, cold, dtype, cutlass), ceilings, args.rounds, notes)
            print("\n" + table(new), flush=True)
            rows += new
    result = outcome(
        args,
        notes,
        rows,
        machine={name: value for name, value in info().items() if name != "openmp"},
        device=torch.cuda.get_device_name(),
        capability=cuda.capability(torch.cuda.current_device()),
        dtype=args.dtype,
        ceilings=asdict(ceilings),
    )
    if args.plot:
        from qkernels.bench.cuda_plots import draw

        print(f"wrote {draw(result, args.plot)}")
    return 1 if notes else 0


_OfBytes = ProblemRows | ProblemAttention
"""What is no product of weights: its contenders' limits are the bytes that each has to move."""
_Problem = Problem | ProblemW4 | ProblemW8A16 | _OfBytes


def _problem(
    name: str, k: int, n: int, m: int, cold: int, dtype: torch.dtype, cutlass: Cutlass | None = None
) -> _Problem:
    if name == "quantize":
        return ProblemRows(k, m, cold, dtype)
    if name == "attention":
        return ProblemAttention(k, n, m, cold, dtype)
    if name.startswith("w4"):
        return ProblemW4(name, k, n, m, cold, dtype)
    if name == "w8a16":
        return ProblemW8A16(k, n, m, cold, dtype)
    return Problem(k, n, m, cold, dtype, cutlass)


def _run_problem(problem: _Problem, ceilings: CudaCeilings, rounds: int, notes: list[str]) -> list[CudaRow]:
    k, n, m = problem.k, problem.n, problem.m
    operations = 0.0 if isinstance(problem, _OfBytes) else 2.0 * m * n * k
    size = problem.dtype.itemsize
    integers = not problem.scheme.weight_only
    gemm_limit = ceilings.limit(traffic(problem.scheme, k, n, m, size, 1), operations, integers=integers)
    layer_limit = ceilings.limit(traffic(problem.scheme, k, n, m, size), operations, integers=integers)
    if isinstance(problem, _OfBytes):
        gemm_limit = ceilings.limit(problem.bytes_of(problem.name), 0.0)
    count = max(2, min(MOST_CALLS, int(GRAPH_SECONDS * 1e6 / max(gemm_limit, 5.0))))
    graphs: list[tuple[str, bool, Graph]] = []
    for name, ours, call in problem.contenders():
        exact = not ours or (problem.exact(call, name) if isinstance(problem, _OfBytes) else problem.exact(call))
        if not exact:
            notes.append(f"{name}: NOT EXACT at K={k} N={n} M={m}, so not timed")
            continue
        graphs.append((name, ours, Graph(call, count)))
    steady = gemm_limit > ceilings.limit(traffic(problem.scheme, k, n, m, size, 1), 0.0) and operations > 0
    times: list[list[float]] = [[] for _ in graphs]
    order = list(range(len(graphs)))
    shuffle = random.Random(0).shuffle  # not in turns: who follows a hungry contender finds a slower clock
    for _ in range(min(rounds, STEADY_ROUNDS) if steady else rounds):
        shuffle(order)
        for index in order:
            if steady:
                graphs[index][2].settle(STEADY_SECONDS)
            times[index] += _replays(graphs[index][2], STEADY_REPLAYS if steady else 1)
    rows = []
    for (name, ours, _), values in zip(graphs, times, strict=True):
        median = statistics.median(values)
        limit = layer_limit if "layer" in name or problem.scheme.weight_only else gemm_limit
        if isinstance(problem, _OfBytes):
            limit = ceilings.limit(problem.bytes_of(name), 0.0)
        rows.append(
            CudaRow(
                contender=name,
                ours=ours,
                kernel=problem.kernel if ours and "triton" not in name else "",
                k=k,
                n=n,
                m=m,
                median=median,
                best=min(values),
                worst=max(values),
                limit=limit,
                percent_of_limit=100 * limit / median,
                tops=operations / median / 1e6,
                scheme=problem.name,
                steady=steady,
            )
        )
    return rows


def table(rows: list[CudaRow]) -> str:
    """One shape and number of rows as text."""
    first, width = rows[0], max(16, *(len(row.contender) + 2 for row in rows))
    state = ", steady" if first.steady else ""
    lines = [f"{first.scheme} K={first.k} N={first.n} M={first.m}: limit {first.limit:.1f} us{state}"]
    for row in rows:
        lines.append(
            f"  {row.contender:<{width}}{row.median:9.1f} us  ({row.best:.1f}..{row.worst:.1f})"
            f"{row.percent_of_limit:6.0f} %{row.tops:8.0f} TOP/s  {row.kernel}"
        )
    return "\n".join(lines)
