"""quantize_ and dequantize_: what is replaced, what is left and why, what stays shared."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers import assert_bits_equal, hazard_rows, seeded
from torch import nn
from torch.nn.utils import prune
from toys import IDS, Toy, assert_unchanged, snapshot, toy

import qkernels as qk
from qkernels import reference
from qkernels.nn import QuantLinear
from qkernels.rows import quantize_rows

# -- selection -----------------------------------------------------------------------------------------------------


def test_quantize_replaces_every_plain_linear_but_the_head():
    model = toy()
    report = qk.quantize_(model, "w8a8")
    assert all(isinstance(m, QuantLinear) for b in model.blocks for m in b.values())
    assert type(model.lm_head) is nn.Linear
    assert "lm_head" in report["lm_head"].reason
    assert type(model.embed) is nn.Embedding
    assert len(report.quantized) == 4


def test_quantize_output_equals_reference_layers():
    model = nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 5, bias=False))
    expected = [reference.quantize_weight(m.weight, qk.Scheme()) for m in model]
    bias = model[0].bias.detach().clone()
    x = seeded(3, 70)
    y = reference.linear_w8a8(x, expected[0]["weight"], expected[0]["weight_scale"], bias)
    y = reference.linear_w8a8(y, expected[1]["weight"], expected[1]["weight_scale"])
    qk.quantize_(model, "w8a8", exclude=())
    assert_bits_equal(model(x), y)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8", "w4a8_intscale", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_every_preset_and_dtype_runs(scheme, dtype):
    model = toy().to(dtype)
    y = model(IDS)
    qk.quantize_(model, scheme)
    out = model(IDS)
    assert out.dtype == dtype
    assert torch.nn.functional.cosine_similarity(out.float().flatten(), y.float().flatten(), dim=0) > 0.97


def test_quantize_include_glob_and_regex():
    model = toy()
    qk.quantize_(model, include=("blocks.0.*", r"re:blocks\.1\.(up)"))
    assert isinstance(model.blocks[0]["up"], QuantLinear)
    assert isinstance(model.blocks[0]["down"], QuantLinear)
    assert isinstance(model.blocks[1]["up"], QuantLinear)
    assert type(model.blocks[1]["down"]) is nn.Linear


def test_quantize_exclude_replaces_the_default():
    model = toy()
    report = qk.quantize_(model, exclude=("*.down",))
    assert isinstance(model.lm_head, QuantLinear)
    assert report["blocks.0.down"].reason == "excluded by '*.down'"


def test_quantize_overrides_first_match_counts_and_none_leaves():
    model = toy()
    report = qk.quantize_(model, overrides={"blocks.0.down": None, "*.down": "w8a16", "re:.*up": "w4a16"})
    assert type(model.blocks[0]["down"]) is nn.Linear
    assert report["blocks.1.down"].scheme == "w8a16"
    assert report["blocks.1.up"].scheme == "w4a16"
    assert "override" in report["blocks.0.down"].reason


def test_quantize_override_of_the_head_beats_the_default_exclude():
    model = toy()
    report = qk.quantize_(model, overrides={"lm_head": "w8a16"})
    assert report["lm_head"].scheme == "w8a16"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"include": ("blocks.7.*",)}, r"blocks\.7\.\*"),
        ({"exclude": ("*nothing*",)}, "nothing"),
        ({"overrides": {"re:zzz": None}}, "zzz"),
        ({"include": ("blocks.0",)}, r"blocks\.0\.\*"),  # a container: the remedy is named
        ({"include": ("re:(",)}, "regular expression"),
        ({"include": ("",)}, "include"),
    ],
)
def test_quantize_pattern_that_cannot_match_is_an_error(options, word):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=word):
        qk.quantize_(model, **options)
    assert_unchanged(model, before)


def test_quantize_unmatched_pattern_is_ignored_when_not_strict():
    qk.quantize_(toy(), exclude=("*nothing*",), strict=False)


@pytest.mark.parametrize("value", ["*.up", 3, [3]])
def test_quantize_patterns_of_wrong_type(value):
    with pytest.raises(TypeError, match="include"):
        qk.quantize_(toy(), include=value)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_quantize_scheme_typo_lists_the_presets():
    with pytest.raises(ValueError, match="w8a8_static"):
        qk.quantize_(toy(), "w8a9")
    with pytest.raises(ValueError, match="w4a16"):
        qk.quantize_(toy(), overrides={"*.up": "int8"})


def test_quantize_group_size_zero():
    with pytest.raises(ValueError, match="group_size"):
        qk.quantize_(toy(), qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=0))


def test_quantize_unknown_algorithm_and_smooth_values():
    with pytest.raises(ValueError, match="rtn"):
        qk.quantize_(toy(), algorithm="gptqq")
    for value in (1.5, "strong", float("nan")):
        with pytest.raises(ValueError, match="smooth"):
            qk.quantize_(toy(), smooth=value)
    with pytest.raises(TypeError, match="smooth"):
        qk.quantize_(toy(), smooth=True)


def test_quantize_wrong_argument_types():
    with pytest.raises(TypeError, match="model"):
        qk.quantize_([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="embeddings"):
        qk.quantize_(toy(), embeddings="yes")
    with pytest.raises(TypeError, match="overrides"):
        qk.quantize_(toy(), overrides=["*.up"])
    with pytest.raises(TypeError, match="progress"):
        qk.quantize_(toy(), progress=3)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Embedding(4, 4)])
def test_quantize_single_layer_says_how_to_wrap_it(layer):
    with pytest.raises(ValueError, match="Sequential"):
        qk.quantize_(layer)


def test_quantize_nothing_to_quantize():
    with pytest.raises(ValueError, match="nothing to quantize"):
        qk.quantize_(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))
    report = qk.quantize_(nn.Sequential(nn.LayerNorm(4)), strict=False)
    assert not report.quantized
    model = toy()
    qk.quantize_(model, exclude=())
    with pytest.raises(ValueError, match="quantized already"):
        qk.quantize_(model, exclude=())


def test_quantize_meta_tensors():
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ValueError, match="meta"):
        qk.quantize_(model)
    report = qk.quantize_(model, strict=False)
    assert report["blocks.0.up"].reason == "on the meta device"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_bad_weight_in_the_last_layer_leaves_the_model(bad):
    model = toy()
    with torch.no_grad():
        model.blocks[1]["down"].weight[3, 5] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.down.*NaN or infinite"):
        qk.quantize_(model)
    assert_unchanged(model, before)
    report = qk.quantize_(model, strict=False)
    assert "NaN" in report["blocks.1.down"].reason
    assert isinstance(model.blocks[0]["up"], QuantLinear)


def test_quantize_bad_weight_that_is_excluded_does_no_harm():
    model = toy()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    qk.quantize_(model)


# -- what is left alone --------------------------------------------------------------------------------------------


def test_quantize_leaves_subclasses_with_their_reason():
    class LoraLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": LoraLinear(8, 8), "c": nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)}
    )
    report = qk.quantize_(model)
    assert "LoraLinear" in report["b"].reason
    assert "NonDynamicallyQuantizableLinear" in report["c"].reason
    assert type(model["b"]) is LoraLinear


def test_quantize_leaves_parametrized_pruned_and_normed_layers():
    layers = [nn.Linear(8, 8) for _ in range(4)]
    torch.nn.utils.parametrizations.weight_norm(layers[1])
    prune.random_unstructured(layers[2], "weight", amount=0.5)
    layers[3].forward = lambda x: x
    model = nn.Sequential(*layers)
    x = seeded(2, 8)
    y = nn.Sequential(*layers[1:])(x)
    report = qk.quantize_(model)
    assert "parametrized" in report["1"].reason
    assert "pruned" in report["2"].reason
    assert "forward" in report["3"].reason
    assert torch.equal(nn.Sequential(*list(model)[1:])(x), y)


def test_quantize_leaves_lazy_float64_and_integer_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4), nn.Linear(4, 4, dtype=torch.float64))
    report = qk.quantize_(model)
    assert "LazyLinear" in report["1"].reason
    assert report["1"].bytes_before == 0
    assert "float64" in report["2"].reason


def test_quantize_leaves_too_wide_layers_for_integer_sums_only():
    model = nn.Sequential(nn.Linear(65_537, 1, bias=False), nn.Linear(65_536, 1, bias=False))
    report = qk.quantize_(copy.deepcopy(model))
    assert "65536" in report["0"].reason
    assert report["1"].scheme == "w8a8"
    assert qk.quantize_(model, "w8a16")["0"].scheme == "w8a16"


def test_quantize_leaves_adapters_of_peft():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2)})

    Wrapper.__module__ = "peft.tuners.lora.layer"
    model = nn.Sequential(Wrapper(), nn.Linear(8, 8))
    report = qk.quantize_(model)
    assert "adapters" in report["0.base_layer"].reason
    assert "adapters" in report["0.lora_A.default"].reason
    assert report["1"].quantized


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1)])
def test_quantize_empty_and_tiny_layers(shape):
    n, k = shape
    expected = pytest.warns(UserWarning, match="zero-element") if 0 in shape else contextlib.nullcontext()
    with expected:
        model = nn.Sequential(nn.Linear(k, n))
    x = seeded(3, k)
    y = model(x)
    qk.quantize_(model)
    torch.testing.assert_close(model(x), y, rtol=0.05, atol=0.05)


# -- surroundings --------------------------------------------------------------------------------------------------


def test_quantize_keeps_hooks_mode_and_extra_attributes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    calls = []
    handle = model[0].register_forward_hook(lambda m, a, y: calls.append("hook"))
    model[0].register_forward_pre_hook(lambda m, a: calls.append("pre"))
    model[0].NANOGPT_SCALE_INIT = 1
    model[0].eval()
    qk.quantize_(model)
    model(seeded(1, 8))
    assert calls == ["pre", "hook"]
    assert model[0].NANOGPT_SCALE_INIT == 1
    assert not model[0].training
    assert model[1].training
    handle.remove()
    model(seeded(1, 8))
    assert calls == ["pre", "hook", "pre"]
    qk.dequantize_(model)
    assert model[0].NANOGPT_SCALE_INIT == 1
    assert set(vars(model[0])) == {*vars(nn.Linear(8, 8)), "NANOGPT_SCALE_INIT"}
    model(seeded(1, 8))
    assert calls[-1] == "pre"


def test_quantize_non_contiguous_and_viewed_weights():
    base = seeded(16, 48)
    model = nn.Sequential(nn.Linear(8, 48, bias=False), nn.Linear(48, 16, bias=False))
    model[0].weight = nn.Parameter(base.t()[:, :8])
    model[1].weight = nn.Parameter(base)
    plain = copy.deepcopy(model)
    plain[0].weight = nn.Parameter(plain[0].weight.detach().contiguous())
    qk.quantize_(model)
    qk.quantize_(plain)
    x = seeded(3, 8)
    assert_bits_equal(model(x), plain(x))


def test_quantize_rows_in_slices_equals_the_whole(monkeypatch):
    monkeypatch.setattr("qkernels.rows.CHUNK_ELEMENTS", 100)
    w = seeded(37, 40)
    for scheme in (
        "w8a8",
        "w4a16",
        qk.Scheme(weight_bits=4, weight_granularity="per_group", weight_symmetric=False, activation_bits=None),
    ):
        scheme = qk.Scheme.resolve(scheme)
        for scale in (1.0, 1e9):  # large values need fp32 group scales, in one slice only
            values = w.clone()
            values[20:23] *= scale
            for name, tensor in reference.quantize_weight(values, scheme).items():
                assert_bits_equal(quantize_rows(values, scheme)[name], tensor, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rows_by_the_kernel_equals_the_reference(dtype):
    w = hazard_rows(77)
    w = torch.nan_to_num(w, 0.0, 0.0, 0.0).to(dtype)
    w = torch.nan_to_num(w, 0.0, 0.0, 0.0)  # overflows of float16
    for values in (w, w.t().contiguous().t(), w[:, ::2]):
        for name, tensor in reference.quantize_weight(values, qk.Scheme()).items():
            assert_bits_equal(quantize_rows(values, qk.Scheme())[name], tensor, name)
    w[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_rows(w, qk.Scheme())


def test_quantize_progress_is_called_for_every_layer():
    calls = []
    qk.quantize_(toy(), progress=lambda done, total, name: calls.append((done, total, name)))
    assert calls[0] == (0, 4, "")
    assert calls[-1] == (4, 4, "blocks.1.down")
    qk.quantize_(toy(), progress=True)
    qk.quantize_(toy(), progress=False)


# -- dequantize_ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_dequantize_gives_float_layers_with_the_same_values(scheme):
    model = toy(head_bias=True).to(torch.bfloat16)
    keys = list(model.state_dict())
    qk.quantize_(model, scheme, exclude=(), embeddings=True)
    weight = model.blocks[0]["up"].weight.detach().clone()
    report = qk.dequantize_(model)
    assert type(model.blocks[0]["up"]) is nn.Linear
    assert type(model.embed) is nn.Embedding
    assert_bits_equal(model.blocks[0]["up"].weight.detach(), weight)
    assert list(model.state_dict()) == keys
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert report["lm_head"].reason == "dequantized"
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())


def test_dequantize_restores_the_tie():
    model = toy(tied=True, head_bias=True)
    qk.quantize_(model, embeddings=True)
    y = model(IDS)
    qk.dequantize_(model)
    assert model.lm_head.weight is model.embed.weight
    assert model.lm_head.bias is not None
    torch.testing.assert_close(model(IDS), y, rtol=0.1, atol=0.1)


def test_dequantize_bad_input():
    with pytest.raises(ValueError, match="holds none"):
        qk.dequantize_(toy())
    with pytest.raises(TypeError, match="model"):
        qk.dequantize_(3)
    model = toy()
    qk.quantize_(model)
    with pytest.raises(TypeError, match="dtype"):
        qk.dequantize_(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="to_linear"):
        qk.dequantize_(model.blocks[0]["up"])


def test_dequantize_then_quantize_is_stable():
    model = toy()
    qk.quantize_(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    qk.dequantize_(model)
    qk.quantize_(model)
    for name, value in model.state_dict().items():
        if value.dtype == torch.int8:
            assert torch.equal(value, state[name])


def test_quantized_model_deepcopies_and_pickles(tmp_path):
    model = toy(tied=True)
    qk.quantize_(model, embeddings=True)
    y = model(IDS)
    assert_bits_equal(copy.deepcopy(model)(IDS), y)
    torch.save(model, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    assert_bits_equal(again(IDS), y)
    qk.dequantize_(again)
    assert again.lm_head.weight is again.embed.weight
