"""A Llama-shaped model on a GPU: INT8 with norms and activations fused into the quantization, against bfloat16.

python examples/llama_gpu.py                                  # four layers of the size of Llama 3 8B, random weights
python examples/llama_gpu.py --shape smollm2 --json out.json  # all layers of SmolLM2-135M's size
python examples/llama_gpu.py --model DIRECTORY                # a model's own weights
python examples/llama_gpu.py --device cpu --shape tiny        # a check without a GPU, without CUDA graphs

Times are those of the decoder layers and the last norm, without embedding and head: medians over replays of CUDA
graphs, the variants in turns.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qkernels as qk

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
CASES = ((1, 1), (16, 1), (64, 1), (1, 128), (1, 1024), (4, 1024), (8, 2048))
VARIANTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "w8a8, not fused": {"scheme": "w8a8", "fuse": False},
    "w8a8": {"scheme": "w8a8"},
    "w4a8_intscale": {"scheme": "w4a8_intscale"},
}


def random_llama(shape: str, layers: int | None, device: torch.device) -> nn.Module:
    """A model of one of the sizes above with random weights in bfloat16, made where it will run."""
    config = LlamaConfig(**{**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(device).eval()


class Decoder:
    """The decoder layers of a causal language model and the norm after them, for any release of transformers."""

    def __init__(self, model: nn.Module) -> None:
        self.body: Any = model.model
        parameters = inspect.signature(type(self.body.layers[0]).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def positions(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """What rotary embeddings need at ``position_ids [1, T]``."""
        return self.body.rotary_emb(hidden, position_ids)

    def __call__(self, hidden: Tensor, positions: Any, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """``hidden [B, T, C]`` to the same shape; without a mask every token sees those before it."""
        options = {"position_embeddings": positions, "attention_mask": mask, self._cache_name: cache}
        for layer in self.body.layers:
            out = layer(hidden, **options)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.body.norm(hidden)


class Timed:
    """A call, captured into a CUDA graph where there is a GPU."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result = call()
        if self.result.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self.result = call()
            self.run()  # capturing computes nothing

    def run(self) -> None:
        """Once."""
        if self._graph is None:
            self.result = self._call()
        else:
            self._graph.replay()

    def seconds(self, count: int) -> float:
        """Of one run, over ``count`` of them in a row."""
        if self._graph is None:
            start = time.perf_counter()
            for _ in range(count):
                self.run()
            return (time.perf_counter() - start) / count
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


def medians(calls: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Seconds of each, measured in turns; a sample lasts about 20 ms."""
    counts = {name: max(1, int(0.02 / max(call.seconds(2), 1e-6))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(call.seconds(counts[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def device_name(device: torch.device) -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def rows(models: dict[str, nn.Module], cases: list[tuple[int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """One result per case: milliseconds of each variant, and how far its output is from that of bfloat16."""
    width = next(iter(models.values())).config.hidden_size
    first = next(iter(models["bf16"].parameters()))
    for batch, length in cases:
        hidden = torch.randn(batch, length, width, device=first.device).to(first.dtype)
        ids = torch.arange(length, device=first.device).unsqueeze(0)
        calls = {}
        for name, model in models.items():
            decoder = Decoder(model)
            positions = decoder.positions(hidden, ids)
            calls[name] = Timed(functools.partial(decoder, hidden, positions))
        wanted = calls["bf16"].result.double().flatten()
        cosines = {
            name: float(torch.cosine_similarity(call.result.double().flatten(), wanted, dim=0))
            for name, call in calls.items()
        }
        times = {name: 1e3 * seconds for name, seconds in medians(calls, rounds).items()}
        yield {"batch": batch, "length": length, "milliseconds": times, "cosine": cosines}


def case(text: str) -> tuple[int, int]:
    """``4x1024`` as (4, 1024)."""
    batch, length = text.split("x")
    return int(batch), int(length)


def main() -> None:
    """Builds the variants, times them, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="default: 4 of 8b, all of the others")
    parser.add_argument("--model", help="directory of a Llama-like model, in place of random weights")
    parser.add_argument("--cases", nargs="+", type=case, metavar="BxT", help="batch x tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device, or a torch built without CUDA")
    if args.model:
        from qkernels import hf

        base = hf.load_float(args.model).to(device, torch.bfloat16).eval()
    else:
        base = random_llama(args.shape, args.layers or (4 if args.shape == "8b" else None), device)

    models, results = {}, []
    with torch.no_grad():
        for name, options in VARIANTS.items():
            models[name] = base if options is None else copy.deepcopy(base)
            if options is not None:
                report = qk.quantize_(models[name], **options)
                print(f"{name}: {report.bytes_before / 1e6:.0f} MB -> {report.bytes_after / 1e6:.0f} MB")
        print(f"{device_name(device)}, {len(base.model.layers)} layers of {base.config.hidden_size}; milliseconds")
        print(f"{'batch x tokens':>16}" + "".join(f"{name:>18}" for name in models) + "   speed-up   cosine")
        for row in rows(models, args.cases or list(CASES), args.rounds):
            results.append(row)
            times = row["milliseconds"]
            print(
                f"{row['batch']:>7} x {row['length']:<6}"
                + "".join(f"{times[name]:18.3f}" for name in models)
                + f"{times['bf16'] / times['w8a8']:10.2f}x{row['cosine']['w8a8']:10.5f}",
                flush=True,
            )
    if args.json:
        head = {"device": device_name(device), "torch": torch.__version__, "layers": len(base.model.layers)}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**head, "config": base.config.to_dict(), "rows": results}, file, indent=1, default=str)


if __name__ == "__main__":
    main()
