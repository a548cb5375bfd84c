"""Text generation on a GPU as one CUDA graph a token: bfloat16, INT8 and INT4 weights, against the memory's speed.

python examples/generate_gpu.py                               # 32 layers of the size of Llama 3 8B, random weights
python examples/generate_gpu.py --batches 1 8 --schemes bf16 w8a8 w4a16
python examples/generate_gpu.py --model DIRECTORY             # a model's own weights
python examples/generate_gpu.py --device cpu --shape tiny     # a check without a GPU

A token costs at least the time to read every weight and all keys and values; percent of limit is that time, at the copy
bandwidth measured in the same run, over the time taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from llama_gpu import SHAPES, Decoder, device_name, random_llama
from torch import Tensor, nn
from transformers import StaticCache

import qkernels as qk


class Generator:
    """Greedy generation; every step after the prompt is one replay of a graph."""

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        batch, length = prompt.shape
        self._model, self._decoder = model, Decoder(model)
        self._start = length
        total = length + new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=total)
        self._columns = torch.arange(total, device=prompt.device)
        self.tokens = torch.zeros(batch, total, dtype=torch.long, device=prompt.device)
        self.tokens[:, :length] = prompt
        self._graph: torch.cuda.CUDAGraph | None = None

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The most likely next token ``[B, 1]``."""
        hidden = self._model.model.embed_tokens(ids)
        mask = (self._columns <= positions.unsqueeze(1)).view(1, 1, len(positions), -1)
        rotary = self._decoder.positions(hidden, positions.unsqueeze(0))
        hidden = self._decoder(hidden, rotary, mask, self.cache)[:, -1:]
        return self._model.lm_head(hidden).argmax(-1)

    def prefill(self) -> None:
        """Through the prompt, to its first successor."""
        positions = self._columns[: self._start]
        self.tokens[:, self._start : self._start + 1] = self._forward(self.tokens[:, : self._start], positions)
        self._position = torch.tensor([self._start], device=self.tokens.device)

    def _rewind(self) -> None:
        """To the end of the prompt."""
        self._position.fill_(self._start)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._start)

    def cache_bytes(self) -> int:
        """Of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def _step(self) -> None:
        ids = self.tokens.index_select(1, self._position)
        following = self._forward(ids, self._position)
        self._position += 1
        self.tokens.index_copy_(1, self._position.clamp(max=len(self._columns) - 1), following)

    def capture(self) -> None:
        """Make the graph of a step; on a CPU there is none."""
        if not self.tokens.is_cuda:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._step()

    def decode(self, steps: int) -> float:
        """Seconds for ``steps`` tokens from the end of the prompt."""
        self._rewind()
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written a second by a large copy."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 22), device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            torch.mul(source, 2.0, out=target)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(8 * 2 * source.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def weight_bytes(model: nn.Module) -> int:
    """What a token reads: every parameter and buffer but the embedding table, where that is not the head too."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    embedding = getattr(model.model.embed_tokens, "weight", None)
    if embedding is not model.lm_head._parameters.get("weight"):
        tensors.pop(id(embedding), None)
    return sum(tensor.nbytes for tensor in tensors.values())


def main() -> None:
    """One variant after the other: convert, prefill, capture, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--model", help="directory of a Llama-like model, in place of random weights")
    parser.add_argument("--schemes", nargs="+", default=["bf16", "w8a8", "w4a16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="quantize the output head too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device, or a torch built without CUDA")
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}: copy {bandwidth / 1e12:.3f} TB/s")
    columns = (("scheme", 8), ("batch", 7), ("GB read", 10), ("ms/token", 10), ("tokens/s", 10), ("of limit", 10))
    print("".join(f"{name:>{width}}" for name, width in columns) + "   same tokens as the first")
    results: list[dict[str, Any]] = []
    first: dict[int, Tensor] = {}
    with torch.no_grad():
        for scheme in args.schemes:
            if args.model:
                from qkernels import hf

                model: Any = hf.load_float(args.model).to(device, torch.bfloat16).eval()
            else:
                model = random_llama(args.shape, args.layers, device)
            if scheme != "bf16":
                qk.quantize_(model, scheme, **({"exclude": ()} if args.head else {}))
            for batch in args.batches:
                generator = torch.Generator().manual_seed(batch)
                prompt = torch.randint(0, model.config.vocab_size, (batch, args.prompt_tokens), generator=generator)
                run = Generator(model, prompt.to(device), args.new_tokens)
                run.prefill()
                run.capture()
                steps = args.new_tokens - 1
                seconds = statistics.median(run.decode(steps) for _ in range(args.rounds)) / steps
                moved = weight_bytes(model) + run.cache_bytes()
                own = run.tokens[:, args.prompt_tokens :].cpu()
                same = float((own == first.setdefault(batch, own)).double().mean())
                row = {
                    "scheme": scheme,
                    "batch": batch,
                    "bytes": moved,
                    "milliseconds": 1e3 * seconds,
                    "tokens_per_second": batch / seconds,
                    "percent_of_limit": 100 * moved / bandwidth / seconds,
                    "same_tokens": same,
                }
                results.append(row)
                print(
                    f"{scheme:>8}{batch:>7}{moved / 1e9:>10.2f}{1e3 * seconds:>10.3f}{batch / seconds:>10.1f}"
                    f"{row['percent_of_limit']:>8.0f} %{100 * same:>8.0f} %",
                    flush=True,
                )
                del run
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json:
        head = {"device": device_name(device), "torch": torch.__version__, "copy_bandwidth": bandwidth}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**head, "arguments": vars(args), "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
