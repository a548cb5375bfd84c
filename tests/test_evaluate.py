"""Evaluation: perplexity and errors by hand, and `qkernels evaluate` end to end on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import batches, build
from helpers import seeded
from test_cli import save_bert, save_llama, save_words
from torch import nn

import qkernels as qk
from qkernels import cli
from qkernels.evaluate import block_errors, cosines, observe_blocks, perplexity, text_windows

transformers = pytest.importorskip("transformers")


def test_windows_do_not_overlap_and_drop_a_lone_token():
    windows = text_windows(torch.arange(11), 5)
    assert [w.tolist() for w in windows] == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]]]
    assert sum(w.numel() for w in text_windows(torch.arange(100), 8, limit=20)) == 20
    with pytest.raises(ValueError, match="ids: expected at least 2 tokens"):
        text_windows(torch.arange(1), 5)
    with pytest.raises(ValueError, match="window: expected at least 2"):
        text_windows(torch.arange(9), 1)


def test_perplexity_is_exp_of_the_mean_loss():
    class Model(nn.Module):
        def forward(self, ids):
            return logits[:, : ids.shape[1]]

    logits = seeded(1, 600, 7)
    ids = torch.randint(0, 7, (600,), generator=torch.Generator().manual_seed(0))
    found = perplexity(Model(), text_windows(ids, 600))
    expected = nn.functional.cross_entropy(logits[0, :-1], ids[1:])
    assert found.tokens == 599
    assert found.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)
    with pytest.raises(ValueError, match="windows: expected at least one"):
        perplexity(Model(), [])


def test_block_errors_grow_from_the_block_that_changed():
    model, data = build("llama"), batches("llama", count=1)
    before = observe_blocks(model, data)
    assert list(before.outputs) == ["model.layers.0", "model.layers.1", ""]
    same = block_errors(before, observe_blocks(model, data))
    assert set(same.values()) == {0.0}
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.5
    errors = block_errors(before, observe_blocks(model, data))
    assert errors["model.layers.0"] == 0.0
    assert errors["model.layers.1"] > 0.0
    assert errors[""] > 0.0


def test_cosines_of_rows():
    x = seeded(3, 8)
    assert cosines(x, 2 * x).tolist() == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="after: expected shape"):
        cosines(x, x[:2])


# -- the command ----------------------------------------------------------------------------------------------


def save_bert_with_words(directory: Path) -> Path:
    save_words(directory, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")
    return save_bert(directory, vocab_size=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(3, 64, (40, 30), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(f"w{n}" for n in line) for line in numbers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_evaluate_a_language_model(llama, text, tmp_path, capsys):
    target, plot = tmp_path / "result.json", tmp_path / "blocks.png"
    code = cli.main(
        ["evaluate", str(llama), "--scheme", "w8a8", "--smooth", "0.5", "--text", str(text), "--tokens", "500"]
        + ["--json", str(target), "--plot", str(plot), "--max-rise", "50"]
    )
    assert code == 0
    result = json.loads(target.read_text())
    assert result["quality"]["tokens"] == 499
    assert result["quality"]["perplexity"]["before"] > 1
    assert list(result["block_errors"]) == ["model.layers.0", "model.layers.1", "output"]
    assert plot.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "smoothed (0.5)" in shown
    assert "perplexity" in shown


def test_evaluate_a_calibrated_algorithm_and_fail_the_check(llama, text, capsys):
    code = cli.main(
        ["evaluate", str(llama), "--scheme", "w4a16", "--algorithm", "gptq", "--text", str(text), "--max-rise", "0"]
        + ["--tokens", "200", "--json"]
    )
    result = json.loads(capsys.readouterr().out)
    assert result["algorithm"] == "gptq"
    assert code == (1 if result["quality"]["rise_percent"] > 0 else 0)


def test_evaluate_with_finer_layers_where_it_hurts_most(llama, text, capsys):
    options = ["--smooth", "0.5", "--finer", "30", "--text", str(text), "--tokens", "200"]
    assert cli.main(["evaluate", str(llama), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    sizes = {"w8a8": 0, "w8a16": 0}
    for layer in result["report"]["layers"]:
        if layer["scheme"]:
            sizes[layer["scheme"]] += layer["bytes_before"]
    assert 0 < sizes["w8a16"] <= 0.3 * sum(sizes.values())
    assert cli.main(["evaluate", str(llama), "--finer", "30", "--text", str(text), "--tokens", "200"]) == 0
    assert "30 % of the weights finer" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(llama), "--finer", "130"])
    assert "expected a number from 0 to 100" in capsys.readouterr().err


def test_evaluate_an_encoder(tmp_path, text, capsys):
    model = save_bert_with_words(tmp_path / "bert")
    assert cli.main(["evaluate", str(model), "--text", str(text), "--min-cosine", "0.9", "--smooth", "auto"]) == 0
    assert "cosine to float" in capsys.readouterr().out
    assert cli.main(["evaluate", str(model), "--text", str(text), "--min-cosine", "1.5"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--smooth", "much"], "--smooth: expected a number"),
        (["--algorithm", "best"], "algorithm: expected one of rtn"),
        (["--text", "FILE", "--calibration", "FILE"], "expected another file than --calibration"),
    ],
)
def test_evaluate_refuses(llama, text, options, message, capsys):
    arguments = [str(text) if option == "FILE" else option for option in options]
    assert cli.main(["evaluate", str(llama), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_quantize_takes_calibrated_algorithms(llama, text, tmp_path):
    target = tmp_path / "out"
    code = cli.main(
        [
            "quantize",
            str(llama),
            "-o",
            str(target),
            "--scheme",
            "w4a16",
            "--algorithm",
            "awq",
            "--calibration",
            str(text),
        ]
    )
    assert code == 0
    from qkernels import hf

    model = hf.load_quantized(target)
    assert any(isinstance(module, qk.nn.QuantLinear) for module in model.modules())
