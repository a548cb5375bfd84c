"""The report: every byte of the model is in it once, and it prints compactly."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from toys import all_tensors, toy

import qkernels as qk
from qkernels.report import LayerReport, Report, measure


def storages(model: nn.Module) -> int:
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in all_tensors(model)}
    return sum(found.values())


class Deep(nn.Module):
    """Thirty-two equal blocks and one that differs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(16, 16), "norm": nn.LayerNorm(16)}) for _ in range(32)
        )
        self.layers.append(nn.ModuleDict({"fc": nn.Linear(16, 8), "norm": nn.LayerNorm(8)}))


def test_measure_counts_tied_and_viewed_bytes_once():
    model = toy(tied=True)
    assert sum(measure(model).values()) == storages(model)
    assert measure(model)["lm_head"] == 0
    base = torch.zeros(10, 8)
    views = nn.ParameterList([nn.Parameter(base[:6]), nn.Parameter(base[4:]), nn.Parameter(base[::2])])
    assert measure(views)[""] == 10 * 8 * 4


def test_measure_counts_a_weight_among_others_by_its_own_bytes():
    together = torch.zeros(3, 10, 8)
    model = nn.ModuleDict({"q": nn.Module(), "k": nn.Module(), "all": nn.Module(), "t": nn.Module()})
    model["q"].register_buffer("packed", together.narrow(1, 0, 4))
    model["k"].register_buffer("packed", together.narrow(1, 4, 5))
    model["all"].register_buffer("packed", together)
    model["t"].register_buffer("packed", together.transpose(0, 2))
    assert measure(model) == {"q": 3 * 4 * 8 * 4, "k": 3 * 5 * 8 * 4, "all": 3 * 1 * 8 * 4, "t": 0}


def test_measure_counts_buffers_meta_lazy_sparse_and_empty_tensors():
    model = nn.Module()
    model.register_buffer("loose", torch.zeros(3), persistent=False)
    model.register_buffer("empty", torch.zeros(0, 4))
    model.register_buffer("sparse", torch.eye(4).to_sparse())
    model.child = nn.Linear(4, 4, device="meta")
    model.lazy = nn.LazyLinear(4)
    sizes = measure(model)
    assert sizes[""] == 12 + 4 * 4
    assert sizes["child"] == 20 * 4
    assert sizes["lazy"] == 0


def test_report_totals_are_the_bytes_of_the_model():
    model = toy(tied=True)
    model.register_buffer("table", torch.zeros(7))
    before = storages(model)
    report = qk.quantize_(model, embeddings=True)
    assert report.bytes_before == before == sum(layer.bytes_before for layer in report.layers)
    assert report.bytes_after == storages(model)
    assert report[""].reason == "buffers only"


def test_report_says_of_every_layer_what_became_of_it():
    report = qk.quantize_(toy())
    up = report["blocks.0.up"]
    assert (up.type, up.shape, up.scheme, up.quantized) == ("Linear", (40, 24), "w8a8", True)
    assert up.kernel == f"w8a8.{qk.info()['isa']}"
    assert up.reason is None
    assert up.bytes_before == (40 * 24 + 40) * 4
    assert {layer.name for layer in report.left} == {"embed", "norm", "lm_head"}
    assert all(layer.reason for layer in report.left)
    with pytest.raises(KeyError):
        report["nothing"]


def test_report_names_the_reference_where_no_kernel_serves():
    report = qk.quantize_(nn.Sequential(nn.Linear(40, 8)), qk.Scheme(weight_granularity="per_group", group_size=8))
    assert report["0"].kernel == "reference"
    assert report["0"].reason


def test_report_to_dict_is_json_and_comes_back():
    report = qk.quantize_(toy(tied=True), embeddings=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["bytes_after"] == report.bytes_after
    assert len(data["layers"]) == len(report.layers)
    assert Report.from_dict(data) == report
    for bad in ({}, {"layers": [{"name": "x"}]}, {"layers": 3}):
        with pytest.raises(ValueError, match="layers"):
            Report.from_dict(bad)


def test_report_prints_repeated_layers_in_one_row():
    report = qk.quantize_(Deep())
    text = str(report)
    assert len(report.layers) == 66
    assert len(text.splitlines()) < 12
    row = next(line for line in text.splitlines() if line.startswith("layers.{0-31}.fc"))
    assert "16x16" in row
    assert " 32 " in row
    assert "layers.32.fc" in text
    assert "33 layers quantized, 33 modules left alone" in text


def test_report_table_is_aligned_and_totals_add_up():
    text = str(qk.quantize_(toy(), exclude=()))
    lines = text.splitlines()
    column = lines[0].index("MB before") + len("MB before")
    rows = [line for line in lines[2:] if line[:1].strip() and not line.startswith("-") and "quantized," not in line]
    assert all(line[column - 1].isdigit() and line[column : column + 2].strip() == "" for line in rows)
    assert any(line.startswith("total") for line in lines)


def test_report_groups_only_what_is_alike():
    def row(name, reason):
        return LayerReport(name, "Linear", (4, 4), None, None, 64, 64, reason)

    text = str(
        Report(
            (row("a.0.x", "excluded by '*'"), row("a.1.x", "excluded by '*'"), row("a.3.x", "pruned"), row("b.2", None))
        )
    )
    assert "a.{0-1}.x" in text
    assert "a.3.x" in text
    assert "b.2" in text


def test_report_of_nothing_prints():
    assert "0 layers quantized" in str(Report(()))
