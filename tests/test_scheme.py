"""Scheme: presets, validation, names, JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels.scheme import PRESETS, Scheme

NF4_LIKE = tuple(i / 8 - 1 for i in range(16))

VALID = [
    *PRESETS.values(),
    Scheme(4),
    Scheme(4, "per_group", 64, weight_symmetric=False),
    Scheme(4, "per_group", 32, weight_symmetric=False, weight_zero="float", scale_dtype=torch.float32),
    Scheme(4, "per_group", 64, codebook=NF4_LIKE, activation_bits=None),
    Scheme(8, "per_group", 32, activation_bits=None),
    Scheme(activation_symmetric=False),
    Scheme(activation_granularity="per_tensor", activation_dynamic=False, activation_symmetric=False),
]


def test_presets_are_what_they_say() -> None:
    assert set(PRESETS) == {"w8a8", "w8a8_static", "w8a16", "w4a8", "w4a8_intscale", "w4a16", "w3a16", "w2a16"}
    assert Scheme.from_preset("w8a8") == Scheme()
    static = Scheme.from_preset("w8a8_static")
    assert (static.activation_granularity, static.activation_dynamic) == ("per_tensor", False)
    for name in ("w4a8", "w4a16"):
        scheme = Scheme.from_preset(name)
        assert (scheme.weight_bits, scheme.weight_granularity, scheme.group_size) == (4, "per_group", "auto")
        assert scheme.scale_dtype == torch.float16
        assert scheme.weight_symmetric
    assert [name for name, scheme in PRESETS.items() if scheme.weight_only] == ["w8a16", "w4a16", "w3a16", "w2a16"]
    assert Scheme().scale_dtype == torch.float32


def test_resolve_typo_lists_names() -> None:
    with pytest.raises(
        ValueError,
        match=r"scheme: expected one of w2a16, w3a16, w4a16, w4a8, w4a8_intscale, w8a16, w8a8, w8a8_static, got 'w8a9'",
    ):
        Scheme.resolve("w8a9")
    with pytest.raises(TypeError, match="scheme: expected a Scheme or the name of a preset, got int"):
        Scheme.resolve(8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scheme"):
        Scheme.from_preset(None)  # type: ignore[arg-type]
    assert Scheme.resolve(PRESETS["w4a8"]) is PRESETS["w4a8"]
    assert Scheme.resolve("w4a8") == PRESETS["w4a8"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"weight_bits": 5}, ValueError, "weight_bits: expected one of 8, 4, 3, 2, got 5"),
        ({"weight_bits": True}, ValueError, "weight_bits"),
        ({"weight_bits": 8.0}, ValueError, "weight_bits"),
        ({"weight_bits": "8"}, ValueError, "weight_bits"),
        (
            {"weight_granularity": "per_row"},
            ValueError,
            "weight_granularity: expected one of 'per_channel'",
        ),
        ({"group_size": 32}, ValueError, "group_size: expected None"),
        ({"weight_granularity": "per_group", "group_size": 0}, ValueError, "group_size.*got 0"),
        ({"weight_granularity": "per_group", "group_size": -32}, ValueError, "group_size"),
        (
            {"weight_granularity": "per_group", "group_size": 12},
            ValueError,
            "positive multiple of 8",
        ),
        ({"weight_granularity": "per_group", "group_size": "big"}, ValueError, "group_size"),
        ({"weight_granularity": "per_group", "group_size": 32.0}, TypeError, "group_size"),
        ({"weight_granularity": "per_group", "group_size": True}, TypeError, "group_size"),
        ({"weight_symmetric": 1}, TypeError, "weight_symmetric: expected a bool"),
        ({"weight_symmetric": False}, ValueError, "weight_symmetric: expected True with weight_bits=8"),
        ({"weight_bits": 4, "weight_zero": "float"}, ValueError, "weight_zero"),
        ({"weight_bits": 4, "weight_zero": "half"}, ValueError, "weight_zero"),
        ({"scale_dtype": torch.float16}, ValueError, "scale_dtype: expected torch.float32 with per_channel"),
        ({"scale_dtype": "float32"}, TypeError, "scale_dtype"),
        ({"weight_granularity": "per_group", "scale_dtype": torch.bfloat16}, ValueError, "scale_dtype"),
        ({"activation_bits": 4}, ValueError, "activation_bits: expected one of 8, None, got 4"),
        ({"activation_granularity": "per_tensor"}, ValueError, "activation_granularity"),
        ({"activation_dynamic": False}, ValueError, "activation_granularity"),
        ({"activation_bits": None, "activation_symmetric": False}, ValueError, "activation_symmetric: has no meaning"),
        ({"weight_bits": 4, "codebook": NF4_LIKE}, ValueError, "codebook: .*activation_bits=None"),
        ({"weight_bits": 4, "codebook": NF4_LIKE[:15], "activation_bits": None}, ValueError, "16 entries, got 15"),
        ({"weight_bits": 4, "codebook": (0.0,) * 16, "activation_bits": None}, ValueError, "codebook"),
        ({"weight_bits": 4, "codebook": (float("nan"),) * 16, "activation_bits": None}, ValueError, "codebook"),
        ({"weight_bits": 4, "codebook": "nf4", "activation_bits": None}, TypeError, "codebook"),
        ({"weight_bits": 4, "codebook": 3, "activation_bits": None}, TypeError, "codebook"),
    ],
)
def test_scheme_rejects(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scheme(**arguments)


def test_scheme_is_frozen_and_hashable() -> None:
    scheme = Scheme()
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.weight_bits = 4  # type: ignore[misc]
    assert len({Scheme(), Scheme.from_preset("w8a8"), PRESETS["w4a8"]}) == 2
    assert Scheme(4, "per_group") == Scheme(4, "per_group", "auto", scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="group_size"):
        PRESETS["w4a8"].replace(group_size=7)


@pytest.mark.parametrize("scheme", VALID, ids=lambda s: s.name)
def test_to_dict_survives_json(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_names_tell_schemes_apart() -> None:
    names = [scheme.name for scheme in VALID]
    assert len(set(names)) == len(names), names
    assert Scheme(4, "per_group", 64, weight_symmetric=False).name == "w4a8_g64_asym"
    assert [PRESETS[name].name for name in PRESETS] == list(PRESETS)


def test_from_dict_rejects() -> None:
    with pytest.raises(ValueError, match=r"scheme: unknown keys bits, wieght_bits; expected some of weight_bits"):
        Scheme.from_dict({"bits": 8, "wieght_bits": 8})
    with pytest.raises(ValueError, match="scale_dtype: expected one of float32, float16, got 'float8'"):
        Scheme.from_dict({"scale_dtype": "float8"})
    with pytest.raises(TypeError, match="mapping"):
        Scheme.from_dict([("weight_bits", 8)])  # type: ignore[arg-type]
    assert Scheme.from_dict({}) == Scheme()


@given(k=st.integers(0, 10_000))
def test_group_size_auto(k: int) -> None:
    size = PRESETS["w4a8"].resolve_group_size(k)
    assert size in (128, 64, 32)
    if k % size:
        assert size == 128
        assert k % 32
    else:
        assert not any(k % larger == 0 for larger in (128, 64) if larger > size)


def test_group_size_of_other_schemes() -> None:
    assert Scheme(4, "per_group", 64).resolve_group_size(100) == 64
    assert Scheme().resolve_group_size(576) == 576
    assert Scheme().resolve_group_size(0) == 1
    assert PRESETS["w4a8"].resolve_group_size(576) == 64
    with pytest.raises(ValueError, match="in_features"):
        Scheme().resolve_group_size(-1)
