"""Runs every CUDA kernel once, on small shapes, under compute-sanitizer: memcheck, then racecheck.

python scripts/sanitize_cuda.py                   # both tools
python scripts/sanitize_cuda.py --tools memcheck
python scripts/sanitize_cuda.py --run             # the kernels alone, without the sanitizer

racecheck takes few features, so that no ring of stages comes round, but to what wgmma alone has read: it knows
mbarriers, but not that __syncwarp puts the reads of 32 lanes before the one arrival that frees a stage, and reports the
copy that fills it again; and where warpgroups hand a value round by bar.arrive and bar.sync, it reports the second
round.  (Both on kernels of ten lines.)

Data are made on the CPU, so that nearly all launches are of the kernels themselves, and every tensor is an allocation
(torch's cache would hide accesses beside it).  Results are compared with the reference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = {"memcheck": 1101, "racecheck": 255}
"""And the features of their products."""

PHASED_FEATURES = 1024
"""Fewer than these no kernel shares out among phases."""

MMA_TILES = [8, 16, 64, 128]
"""Tokens of 4-bit weights under 8-bit activations by mma.sync."""

CLUSTERS = 24
"""That take a tile each, or share them all."""

ERRORS = 9
"""Exit code for errors that a tool found."""


def run_kernels(k: int) -> None:
    """Every kernel once, products over ``k`` features.  Raises RuntimeError where a result is wrong."""
    import torch
    from torch import Tensor

    from qkernels import cuda, cuda_attention, cuda_rows, cuda_w4, cuda_w8a16, ops, reference, row_ops
    from qkernels.scheme import Scheme

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def misaligned(x: Tensor) -> Tensor:
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        flat[1:].copy_(x.flatten())
        return flat[1:].view(x.shape)

    def check(what: str, got: Tensor, wanted: Tensor, bound: float = 0.0) -> None:
        got = got.cpu()
        error = float((got.double() - wanted.double()).norm()) / max(1e-30, float(wanted.double().norm()))
        if got.shape != wanted.shape or not error <= bound:
            raise RuntimeError(f"{what}: relative error {error:.3g}, expected at most {bound:.3g}")
        print(f"  {what}: right", flush=True)

    for width in (264, 37, 2056):
        x, up = random(5, width, dtype=torch.bfloat16), random(5, width, dtype=torch.bfloat16)
        weight = random(width, dtype=torch.bfloat16)
        for place in (lambda t: t.to("cuda"), misaligned):
            a, b, w = place(x), place(up), place(weight)
            q, scale, _ = cuda.quantize_rows(a)
            check(f"quantize_rows K={width}", q, reference.quantize_activations(x)[0])
            total = reference.add_residual(x, up)
            got = row_ops.rms_norm_quantize(a, w, eps=1e-5, residual=b)
            check(f"rms_norm_quantize K={width}, sum", got[3], total)
            y = reference.quantize_activations(reference.rms_norm(total, weight, 1e-5))[0]
            check(f"rms_norm_quantize K={width}", got[0], y, 0.01)
            got = row_ops.layer_norm_quantize(a, w, w, eps=1e-5, symmetric=False)
            y = reference.quantize_activations(reference.layer_norm(x, weight, weight, 1e-5), symmetric=False)[0]
            check(f"layer_norm_quantize K={width}", got[0], y, 0.01)
            y = reference.quantize_activations(reference.activated(x, "silu", up))[0]
            check(f"activation_quantize K={width}", row_ops.activation_quantize(a, "silu", b)[0], y, 0.01)
            values, summed = cuda_rows.normalize(a, w, w, 1e-5, layer=True, residual=b)
            check(f"normalize K={width}, sum", summed, total)
            check(f"normalize K={width}", values, reference.layer_norm(total, weight, weight, 1e-5), 0.01)
            y = reference.activated(x, "silu", up)
            check(f"activate K={width}", cuda_rows.activate(a, "silu", b), y, 0.01)

    for tokens, length, size in ((1, 200, 64), (5, 77, 128)):
        heads = [random(2, count, tokens, size, dtype=torch.bfloat16) for count in (8, 2)]
        cos, sin = (random(1, tokens, size, dtype=torch.bfloat16) for _ in range(2))
        for place in (lambda t: t.to("cuda"), misaligned):
            turned = cuda_attention.rotary(*map(place, heads), place(cos), place(sin))
            for got, x in zip(turned, heads, strict=True):
                check(f"rotary of {x.shape[1]} heads of {size}", got, reference.rotary(x, cos, sin))
        keys, values = (random(2, 2, length, size, dtype=torch.bfloat16) for _ in range(2))
        mask = random(2, 1, tokens, length) > 0
        got = cuda_attention.attention(*(t.to("cuda") for t in (heads[0], keys, values, mask)), 0.1)
        check(f"attention over {length} keys", got, reference.attention(heads[0], keys, values, mask, 0.1), 0.01)
        cache = [keys, values, torch.tensor(length - tokens - 1)]
        held = [t.to("cuda") for t in cache]
        cuda_attention.append(*held, heads[1].to("cuda"), heads[1].to("cuda"))
        reference.append(*cache, heads[1], heads[1])
        for got, wanted in zip(held, cache, strict=True):
            check(f"cache with {tokens} tokens more", got, wanted)

    m, n = 70, 130
    x, w = random(m, k), random(n, k)
    tensors = reference.quantize_weight(w, Scheme())
    q, scale, _ = reference.quantize_activations(x)
    packed, colsum = cuda.pack_w8(tensors["weight"].to("cuda"))
    check("pack and unpack", cuda.unpack_w8(packed, n, k), tensors["weight"])
    layer = {"packed": packed, "colsum": colsum, "weight_scale": tensors["weight_scale"].to("cuda"), "bias": None}
    wanted = reference.linear_w8a8_prequantized(q, scale, None, tensors["weight"], tensors["weight_scale"])
    configs = [(0, 16, 1, 1, 0, 0), (0, 64, 1, 1, 0, 0), (0, 128, 1, 1, 0, 0)]
    if torch.cuda.get_device_capability() == (9, 0) and cuda._cuda.has_sm90a():
        configs += [(1, 8, 1, 1, 0, 128), (1, 16, 2, 1, 0, 64), (1, 64, 1, 4, 1, 128), (1, 128, 1, 1, 1, 64)]
        configs += [(2, 128, 1, 2, 1, 0), (2, 128, 1, 1, 0, 0), (2, 224, 1, 2, 0, 0), (2, 256, 1, 1, 0, 0)]
    codes, scales = q.to("cuda"), scale.to("cuda")
    for config in configs:
        got = cuda.gemm_w8a8(codes, scales, None, layer, out_dtype=torch.float32, config=config)
        check(f"gemm_w8a8 {config}", got, wanted)
    presets = [Scheme.from_preset(preset) for preset in ("w8a8", "w4a8", "w4a16", "w8a16", "w4a8_intscale")]
    for scheme in (*presets, *(preset.replace(activation_symmetric=False) for preset in (presets[1], presets[4]))):
        tensors = reference.quantize_weight(w, scheme)
        prepared = ops.prepare(tensors, scheme, k, device="cuda")
        for rows in (1, 20, 70):
            wide = x[:rows].to(torch.bfloat16)
            got = prepared.run(wide.to("cuda"))
            bound = 2.0**-7 if scheme.weight_only else 0.0
            check(
                f"{prepared.kernel} of {scheme.name}, {rows} rows",
                got,
                reference.linear(wide, tensors, scheme, k),
                bound,
            )
            bits = scheme.weight_bits, scheme.activation_bits
            if bits == (4, 8) and rows == 70:
                weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
                a, s, zero = cuda.quantize_rows(wide.to("cuda"), symmetric=scheme.activation_symmetric, for_gemm=True)
                for tokens in MMA_TILES:
                    y = cuda_w4.gemm_w4a8(
                        a, s, weight, None, torch.bfloat16, x_zero_point=zero, plan=(0, tokens, 1, 1, 0, 0)
                    )
                    name = f"{prepared.kernel} of {scheme.name}, tiles of {tokens} by mma.sync"
                    check(name, y, reference.linear(wide, tensors, scheme, k))
            if bits != (8, 8) and configs[-1][0] == 2 and rows == 70:  # every tile of wgmma, shared ones among them
                weight = cuda_w4.describe(prepared.tensors, scheme, n, k) if bits[0] == 4 else ()
                whole = scheme.group_scales == "int"
                if bits[0] == 8:
                    tiles, phased = cuda_w4.TILES, cuda_w8a16.PHASED_TILES
                else:
                    tiles = cuda_w4.TILES_OF_HALVES if scheme.weight_only else cuda_w4.TILES
                    by_bits = cuda_w4.PHASED_TILES[16 if scheme.weight_only else 8]
                    phased = cuda_w4.MULTIPLIER_TILES if whole else by_bits
                for tokens, phases in tiles + (phased if k >= PHASED_FEATURES else []):
                    name = f"{scheme.name}, tiles of {tokens}, {phases} phases"
                    wanted = reference.linear(wide, tensors, scheme, k)
                    if scheme.weight_only:
                        room = (1024, 2 * CLUSTERS * 2 * 128 * tokens) if phases == 1 else (0, 0)
                        plan = (1, tokens, phases, CLUSTERS, *room)
                    if bits[0] == 8:
                        own = prepared.tensors
                        y = cuda_w8a16.gemm_w8a16(
                            wide.to("cuda"), own["packed"], own["packed_scale"], None, torch.bfloat16, plan=plan
                        )
                        check(name, y, wanted, bound)
                    elif scheme.weight_only:
                        y = cuda_w4.gemm_w4a16(wide.to("cuda"), weight, None, torch.bfloat16, plan=plan)
                        check(name, y, wanted, bound)
                    elif whole or (scheme.activation_symmetric and tokens <= 128):
                        a, s, zero = cuda.quantize_rows(
                            wide.to("cuda"), symmetric=scheme.activation_symmetric, for_gemm=True
                        )
                        plan = (1, tokens, phases, CLUSTERS, 0, 0)
                        y = cuda_w4.gemm_w4a8(a, s, weight, None, torch.bfloat16, x_zero_point=zero, plan=plan)
                        check(name, y, wanted)
    torch.cuda.synchronize()


def main() -> int:
    """The first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=170.0, help="for all tools together")
    parser.add_argument("--run", action="store_true", help="run the kernels, without the sanitizer")
    parser.add_argument("--features", type=int, default=TOOLS["memcheck"], metavar="K", help="of products, with --run")
    args = parser.parse_args()
    if args.run:
        run_kernels(args.features)
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("expected compute-sanitizer on the PATH or in /usr/local/cuda/bin")
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    end = time.monotonic() + args.seconds
    for tool in args.tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERRORS)]
        command += [sys.executable, __file__, "--run", "--features", str(TOOLS[tool])]
        print(" ".join(command), flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run(command, env=environment, timeout=max(1.0, end - start)).returncode
        except subprocess.TimeoutExpired:
            print(f"{tool}: out of time", file=sys.stderr)
            return 1
        print(f"{tool}: exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
