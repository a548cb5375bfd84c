"""load and damaged or hostile directories: one clear ValueError each, before anything is allocated or changed."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal
from torch import nn
from toys import IDS, Toy, toy

import qkernels as qk
from qkernels import _safetensors, serialization

MANIFEST = serialization.MANIFEST


def saved(path: Path, **options) -> Toy:
    model = toy(tied=True, head_bias=True)
    qk.quantize_(model, **{"embeddings": True, **options})
    qk.save(model, path)
    return model


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the manifest of a directory."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    data = change(data) or data
    path.write_text(json.dumps(data))


def rewrite_file(directory: Path, content: bytes, name: str = "model.safetensors") -> None:
    """Replace a file, with a manifest that agrees about its size and hash: only its inside is wrong."""
    (directory / name).write_bytes(content)

    def change(data):
        data["files"][name] = {"size": len(content), "sha256": _safetensors.sha256_of(directory / name)}

    rewrite(directory, change)


def rewrite_header(directory: Path, change, name: str = "model.safetensors") -> None:
    content = (directory / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    rewrite_file(directory, struct.pack("<Q", len(text)) + text + content[8 + length :], name)


def refuses(directory: Path, match: str, *, model: nn.Module | None = None) -> None:
    """Loading raises ValueError, and leaves the model as it was."""
    model = Toy(tied=True, head_bias=True).eval() if model is None else model
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        qk.load(model, directory)
    assert [type(m) for m in model.modules()] == kinds
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            assert_bits_equal(tensor, before[name], name)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "out"
    saved(path, scheme="w8a8")
    return path


@pytest.fixture
def out(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def test_load_missing_directory_manifest_and_file(out, tmp_path):
    refuses(tmp_path / "nowhere", "expected a directory")
    (out / "model.safetensors").rename(out / "other")
    refuses(out, "model.safetensors.*missing")
    (out / MANIFEST).unlink()
    refuses(out, f"{MANIFEST}.*missing")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_load_truncated(cut, out):
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:cut])
    refuses(out, "truncated")
    rewrite_file(out, content[:cut])
    refuses(out, "model.safetensors")


def test_load_flipped_bit(out):
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    refuses(out, "SHA-256")
    qk.load(Toy(tied=True, head_bias=True), out, verify=False)


def test_load_trailing_bytes(out):
    rewrite_file(out, (out / "model.safetensors").read_bytes() + b"x")
    refuses(out, "bytes of data")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200_000_000])
def test_load_oversized_header(length, out):
    rewrite_file(out, struct.pack("<Q", length) + (out / "model.safetensors").read_bytes()[8:])
    refuses(out, "header claims")


def entry(header: dict) -> dict:
    return header["blocks.0.up.weight"]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda h: entry(h).update(shape=[1 << 40, 1 << 21]), "takes"),
        (lambda h: entry(h).update(shape=[24, 40]), "expected torch.int8"),  # same bytes, turned
        (lambda h: entry(h).update(shape=[-40, -24]), "shape"),
        (lambda h: entry(h).update(shape=[40.0, 24]), "shape"),
        (lambda h: entry(h).update(shape=[1] * 40 + [960]), "shape"),
        (lambda h: entry(h).update(dtype="U8"), "expected torch.int8"),
        (lambda h: entry(h).update(dtype="Q3"), "dtype"),
        (lambda h: entry(h).update(dtype=["I8"]), "dtype"),
        (lambda h: entry(h).update(data_offsets=[0, 960]), "begins at byte|span"),
        (lambda h: entry(h).update(data_offsets=[960, 0]), "data_offsets"),
        (lambda h: entry(h).update(data_offsets=[1 << 50, (1 << 50) + 960]), "data_offsets"),
        (lambda h: entry(h).update(data_offsets=[True, 960]), "data_offsets"),
        (lambda h: entry(h).update(extra=1), "expected dtype, shape"),
        (lambda h: h.update({"more": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}), "more"),
        (lambda h: h.pop("blocks.0.up.weight") and None, "data|none of the files"),
        (lambda h: b"[1, 2]", "JSON object"),
        (lambda h: b"{", "valid JSON"),
        (lambda h: b"\xff\xfe", "valid JSON"),
        (lambda h: b"[" * 100_000, "valid JSON"),
        (lambda h: b'{"a": 1, "a": 2}', "twice"),
        (lambda h: b'{"a": NaN}', "JSON"),
    ],
)
def test_load_hostile_header(change, match, out):
    rewrite_header(out, change)
    refuses(out, match)


def layer(data: dict) -> dict:
    return data["layers"]["blocks.0.up"]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda d: d.update(format="zip"), "format"),
        (lambda d: d.update(format_version=2), "format_version"),
        (lambda d: d.update(format_version="1"), "format_version"),
        (lambda d: d.pop("format_version") and None, "format_version"),
        (lambda d: d.pop("layers") and None, "layers"),
        (lambda d: d.pop("files") and None, "files"),
        (lambda d: d.update(files={"../model.safetensors": {"size": 1, "sha256": ""}}), "plain names"),
        (lambda d: d.update(files={"/etc/x.safetensors": {"size": 1, "sha256": ""}}), "plain names"),
        (lambda d: d.update(files={"a\\b.safetensors": {"size": 1, "sha256": ""}}), "plain names"),
        (lambda d: d.update(files={"model.safetensors": {"size": "9", "sha256": ""}}), "size"),
        (lambda d: d.update(files={"model.bin": {"size": 9, "sha256": ""}}), "plain names"),
        (lambda d: d["tensors"].update({"ghost": "model.safetensors"}), "ghost"),
        (lambda d: d["tensors"].update({"norm.weight": "elsewhere.safetensors"}), "norm.weight"),
        (lambda d: d.update(tensors=[1]), "tensors"),
        (lambda d: d["aliases"].update({"x.y": "ghost"}), "aliases"),
        (lambda d: d.update(aliases=3), "aliases"),
        (lambda d: d.update(non_persistent=[3]), "non_persistent"),
        (lambda d: layer(d).update(kind="conv2d"), "kind"),
        (lambda d: layer(d).update(scheme="w2a2"), "scheme"),
        (lambda d: layer(d).update(shape=[40]), "shape"),
        (lambda d: layer(d).update(shape=[1 << 45, 24]), "shape"),
        (lambda d: layer(d).update(shape=[4000, 24]), "expected torch.int8"),
        (lambda d: layer(d).update(dtype="int8"), "dtype"),
        (lambda d: layer(d).update(shares="blocks.0.up"), "shares"),
        (lambda d: layer(d).update(shares="ghost"), "shares"),
        (lambda d: layer(d).update(shares=3), "shares"),
        (lambda d: layer(d).pop("kind") and None, "kind"),
        (lambda d: d["layers"].update({"../x": layer(d)}), r"\.\./x"),
        (lambda d: d["schemes"]["w8a8"].update(weight_bits=5), "weight_bits"),
        (lambda d: d["schemes"]["w8a8"].update(weight_granularity="per_group", group_size=0), "group_size"),
        (lambda d: d["schemes"]["w8a8"].update(weight_granularity="per_group", group_size=10**30), "weight_scale"),
        (lambda d: d["schemes"]["w8a8"].update(surprise=1), "surprise"),
        (lambda d: d["schemes"].update(w8a8=3), "schemes"),
        (lambda d: d.update(schemes=3), "schemes"),
        (lambda d: [d], "JSON object"),
    ],
)
def test_load_hostile_manifest(change, match, out):
    rewrite(out, change)
    refuses(out, match)


def test_load_manifest_that_is_no_text(out):
    (out / MANIFEST).write_bytes(b"\x80\x04\x95pickle")
    refuses(out, "valid JSON")
    (out / MANIFEST).write_text("1" * 10_000)
    refuses(out, "JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_load_bad_scale(value, out):
    poke(out, "blocks.1.down.weight_scale", torch.tensor(value))
    refuses(out, r"blocks\.1\.down\.weight_scale.*positive finite")


def test_load_bad_static_scale_and_zero_points(tmp_path):
    asymmetric = qk.Scheme(activation_granularity="per_tensor", activation_dynamic=False, activation_symmetric=False)
    for number, (name, value, match) in enumerate(
        [
            ("act_scale", torch.tensor(float("nan")), "finite values > 0"),
            ("act_scale", torch.tensor(1e-40), "reciprocal is finite"),
            ("act_zero_point", torch.tensor(256, dtype=torch.int32), "0 to 255"),
        ]
    ):
        out = tmp_path / str(number)
        saved(out, scheme=asymmetric, calibration=[IDS])
        poke(out, f"blocks.0.up.{name}", value)
        refuses(out, match)
    out = tmp_path / "int4"
    saved(out, scheme=qk.Scheme.resolve("w4a16").replace(weight_symmetric=False))
    poke(out, "blocks.0.up.weight_zero_point", torch.tensor(16, dtype=torch.uint8))
    refuses(out, "0 to 15")


@pytest.mark.parametrize("symmetric, value, top", [(True, 0, 15), (True, 16, 15), (False, 9, 8), (False, 255, 8)])
def test_load_multiplier_that_takes_weights_out_of_a_byte(symmetric, value, top, tmp_path):
    saved(tmp_path / "out", scheme=qk.Scheme.resolve("w4a8_intscale").replace(weight_symmetric=symmetric))
    poke(tmp_path / "out", "blocks.0.up.weight_multiplier", torch.tensor(value, dtype=torch.uint8))
    refuses(tmp_path / "out", rf"blocks\.0\.up\.weight_multiplier: expected values from 1 to {top}")


def poke(directory: Path, name: str, value: torch.Tensor) -> None:
    """Overwrite the first element of a stored tensor."""
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    raw = bytes(value.reshape(1).view(torch.uint8).tolist())
    content[begin : begin + len(raw)] = raw
    rewrite_file(directory, bytes(content))


def test_load_into_another_architecture(out):
    refuses(out, "embed", model=nn.Sequential(nn.Linear(3, 3)))
    refuses(out, "ties", model=_untied_the_wrong_way())
    wide = Toy(tied=True, head_bias=True)
    wide.blocks[0]["up"] = nn.Linear(24, 41)
    refuses(out, r"blocks\.0\.up.*\[40, 24\].*\[41, 24\]", model=wide)
    more = Toy(tied=True, head_bias=True)
    more.extra = nn.Linear(2, 2)
    refuses(out, r"extra\.weight", model=more)
    other = Toy(tied=True, head_bias=True)
    other.norm = nn.LayerNorm(25)
    refuses(out, r"norm\.weight", model=other)
    pruned = Toy(tied=True, head_bias=True)
    torch.nn.utils.parametrizations.weight_norm(pruned.blocks[0]["up"])
    refuses(out, "parametrized", model=pruned)
    quantized = toy(tied=True, head_bias=True)
    qk.quantize_(quantized)
    with pytest.raises(ValueError, match="quantized already"):
        qk.load(quantized, out)
    with pytest.raises(TypeError, match="model"):
        qk.load({}, out)


def _untied_the_wrong_way() -> nn.Module:
    model = Toy(tied=True, head_bias=True)
    model.norm.bias = model.norm.weight
    return model


def test_load_allocates_nothing_on_the_word_of_a_file(out, monkeypatch):
    """A header that claims a tensor of a terabyte: refused before anything is read."""
    rewrite_header(out, lambda h: entry(h).update(shape=[1 << 40]))
    monkeypatch.setattr(serialization, "Reader", lambda *a, **k: pytest.fail("opened"))
    refuses(out, "takes")
