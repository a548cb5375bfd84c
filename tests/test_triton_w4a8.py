"""The W4A8 Triton kernel against the reference, bit for bit: in the interpreter on the CPU (fp32 outputs), compiled
where there is a GPU.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from helpers import DTYPES, W4_KINDS, assert_bits_equal, hazard_rows, run_in_interpreter, seeded, static_grid
from torch import Tensor

from qkernels import reference
from qkernels.scheme import Scheme

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

if DEVICE.type == "cpu" and not INTERPRETED:

    def test_triton_w4a8_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

    def test_layers_say_what_they_leave_alone() -> None:
        from qkernels.triton.layer import PreparedTritonW4A8

        there, scheme = torch.device("cuda", 0), Scheme.from_preset("w4a8")
        assert PreparedTritonW4A8.objection(scheme, 256, 64, there) == ""
        assert "groups of 40" in PreparedTritonW4A8.objection(scheme.replace(group_size=40), 256, 64, there)
        assert PreparedTritonW4A8.objection(scheme.replace(group_size=40), 24, 64, there) == ""
        assert "empty" in PreparedTritonW4A8.objection(scheme, 0, 64, there)
        assert "w4a16" in PreparedTritonW4A8.objection(Scheme.from_preset("w4a16"), 256, 64, there)
        assert PreparedTritonW4A8.objection(scheme, 256, 64, torch.device("cpu"))
        assert PreparedTritonW4A8.objection(Scheme.from_preset("w4a8_intscale"), 256, 64, there) == ""

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_layers_keep_sums_of_integer_weights(symmetric: bool) -> None:
        from qkernels.triton.layer import PreparedTritonW4A8

        scheme = Scheme.from_preset("w4a8_intscale").replace(weight_symmetric=symmetric, activation_symmetric=False)
        first, second = (reference.quantize_weight(seeded(9, 201, seed=seed), scheme) for seed in (1, 2))
        layer = PreparedTritonW4A8.from_canonical({name: t.clone() for name, t in first.items()}, scheme, 201)
        for name in (*second, "all"):
            whole = reference.multiplied_codes(layer.canonical(), scheme, 201).to(torch.int64)
            assert layer.canonical().keys() == first.keys()
            assert torch.equal(layer.tensors["colsum"].to(torch.int64), whole.sum(1)), name
            layer.load(second if name == "all" else {name: second[name]})
        plain = PreparedTritonW4A8.from_canonical(first, scheme.replace(activation_symmetric=True), 201)
        assert "colsum" not in plain.tensors

else:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    from qkernels.triton.gemm_w4a8 import gemm_w4a8, tile_for
    from qkernels.triton.quantize import quantize_rows
    from qkernels.triton.tiles import Tile

    KINDS = {name: options for name, options in W4_KINDS.items() if name != "codebook"}
    KINDS["multipliers"] = {"group_scales": "int"}
    KINDS["multipliers, zero point"] = {"group_scales": "int", "weight_symmetric": False}
    ONE_GROUP = 1 << 16
    OUTPUTS = (torch.float32,) if INTERPRETED else DTYPES  # the interpreter truncates where it should round
    SMALL = Tile(16, 16, 128, 4, 2) if INTERPRETED else None

    def scheme_of(kind: str, group: int | None, *, symmetric: bool) -> Scheme:
        if group is None and kind.startswith("multipliers"):
            group = ONE_GROUP
        options = {} if group is None else {"weight_granularity": "per_group", "group_size": group}
        return Scheme(4, activation_symmetric=symmetric, **options, **KINDS[kind])  # type: ignore[arg-type]

    def weight_of(n: int, k: int) -> Tensor:
        """A weight whose groups differ in size, and so in their multipliers."""
        return seeded(n, k, seed=n) * torch.linspace(0.05, 2.0, k)

    def multiply(
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        tensors: dict[str, Tensor],
        scheme: Scheme,
        out_dtype: torch.dtype = torch.float32,
        tile: Tile | None = SMALL,
    ) -> Tensor:
        at, features = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}, q.shape[1]
        integer = scheme.group_scales == "int" and zero is not None
        colsum = reference.multiplied_codes(at, scheme, features).sum(1, dtype=torch.int32) if integer else None
        return gemm_w4a8(
            q,
            scale,
            zero,
            at["weight"],
            at["weight_scale"],
            at.get("bias"),
            group_size=scheme.resolve_group_size(features),
            weight_zero_point=at.get("weight_zero_point"),
            weight_min=at.get("weight_min"),
            weight_multiplier=at.get("weight_multiplier"),
            colsum=colsum,
            out_dtype=out_dtype,
            tile=tile,
        )

    def product(x: Tensor, tensors: dict[str, Tensor], scheme: Scheme, out_dtype: torch.dtype) -> Tensor:
        return multiply(*quantize_rows(x.to(DEVICE), symmetric=scheme.activation_symmetric), tensors, scheme, out_dtype)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("group", [None, 32, 64, 128, 96, 256])
    @pytest.mark.parametrize("kind", KINDS)
    def test_gemm_w4a8_odd_shapes(kind: str, group: int | None, symmetric: bool) -> None:
        scheme = scheme_of(kind, group, symmetric=symmetric)
        shapes = [(1, 8, 64), (3, 5, 33), (33, 20, 330)]
        if not INTERPRETED:
            shapes += [(70, 200, 1000), (150, 136, 512), (2, 576, 1536)]
        for (m, n, k), out_dtype in zip(shapes, itertools.cycle(OUTPUTS)):
            tensors = reference.quantize_weight(weight_of(n, k), scheme)
            if n % 2:
                tensors["bias"] = seeded(n, seed=2)
            x = seeded(m, k, seed=3)
            wanted = reference.linear(x, tensors, scheme, k, out_dtype)
            assert_bits_equal(product(x, tensors, scheme, out_dtype), wanted, f"{m}x{n}x{k}")

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_gemm_w4a8_hazards(kind: str, symmetric: bool) -> None:
        k = 70
        scheme = scheme_of(kind, 32, symmetric=symmetric)
        tensors = reference.quantize_weight(weight_of(9, k), scheme)
        tensors["weight"][0] = 0x00  # codes at both ends
        tensors["weight"][1] = 0xFF
        if kind.endswith("zero point"):
            tensors["weight_zero_point"][:2] = torch.tensor([[15], [0]], dtype=torch.uint8)
        if kind == "zero point":
            tensors["weight_zero_point"][2] = 128  # foreign checkpoints may hold more than 15
        if kind.startswith("multipliers"):
            tensors["weight_multiplier"][:2] = scheme.largest_multiplier
        tensors["bias"] = seeded(9, seed=4)
        x = hazard_rows(k)
        wanted = reference.linear(x, tensors, scheme, k, torch.float32)
        assert_bits_equal(product(x, tensors, scheme, torch.float32), wanted)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gemm_w4a8_odd_addresses_and_rows_apart(kind: str) -> None:
        n, k = 20, 256
        scheme = scheme_of(kind, 64, symmetric=False)
        tensors = reference.quantize_weight(weight_of(n, k), scheme)
        x = seeded(3, k, seed=5)
        wanted = reference.linear(x, tensors, scheme, k, torch.float32)
        q, scale, zero = quantize_rows(x.to(DEVICE), symmetric=False)
        codes = torch.zeros(n * k // 2 + 1, dtype=torch.uint8, device=DEVICE)
        codes[1:] = tensors["weight"].flatten()
        apart = torch.zeros(6, k + 3, dtype=torch.int8, device=DEVICE)
        apart[::2, 1 : k + 1] = q
        # At an odd address no four codes are loaded together.
        for weight in (codes[1:].view(n, k // 2), tensors["weight"]):
            y = multiply(apart[::2, 1 : k + 1], scale, zero, {**tensors, "weight": weight}, scheme)
            assert_bits_equal(y, wanted)

    def test_gemm_w4a8_says_which_groups_it_takes() -> None:
        q, weight = (
            torch.ones(1, 96, dtype=torch.int8, device=DEVICE),
            torch.zeros(2, 48, dtype=torch.uint8, device=DEVICE),
        )
        ones = torch.ones(2, 3, device=DEVICE)
        with pytest.raises(ValueError, match="group_size"):
            gemm_w4a8(q, ones[0, :1], None, weight, ones, group_size=40)
        eights, zero = torch.full((2, 3), 8, dtype=torch.uint8, device=DEVICE), torch.zeros(1, device=DEVICE).int()
        for name, shift, options in (
            ("group_size", None, {"group_size": 40}),
            ("colsum", zero, {"group_size": 32}),
            ("weight_min", None, {"group_size": 32, "weight_min": ones}),
        ):
            with pytest.raises(ValueError, match=name):
                gemm_w4a8(q, ones[0, :1], shift, weight, ones[:, 0], weight_multiplier=eights, **options)

    def test_tile_for_keeps_fewer_stages_where_two_programs_share_a_multiprocessor() -> None:
        stages = {(64, 14336): 3, (64, 12737): 3, (64, 12736): 4, (64, 8192): 4, (128, 4096): 4}
        for shape, wanted in stages.items():
            assert (tile_for(*shape).m, tile_for(*shape).stages) == (64, wanted), shape

    @pytest.mark.skipif(DEVICE.type == "cpu", reason="layers of the kernel live on a GPU")
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", ["zero point", "multipliers", "multipliers, zero point"])
    def test_layer_static_smoothed_and_through_the_dispatcher(kind: str, symmetric: bool) -> None:
        from qkernels.triton.layer import PreparedTritonW4A8

        n, k = 96, 256
        scheme = scheme_of(kind, 64, symmetric=symmetric)
        tensors = reference.quantize_weight(weight_of(n, k), scheme)
        tensors["inv_smooth"] = seeded(k, seed=6).abs() + 0.5
        for static in (False, True):
            if static:
                scheme = scheme.replace(activation_dynamic=False, activation_granularity="per_tensor")
                tensors |= static_grid(scheme, 0.021, 101)
            moved = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
            prepared = PreparedTritonW4A8.from_canonical(moved, scheme, k)
            assert prepared.kernel == "w4a8.triton"
            x = hazard_rows(k).to(torch.bfloat16)
            wanted = reference.linear(x, tensors, scheme, k)
            assert_bits_equal(prepared.run(x.to(DEVICE)), wanted)
            assert_bits_equal(prepared.call(x.to(DEVICE), prepared.tensors), wanted)
