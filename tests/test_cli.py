"""The command line, run in this process on tiny models made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import cli

transformers = pytest.importorskip("transformers")

from qkernels import hf  # noqa: E402


def save_words(directory: Path, *, unk_token: str, **others: str) -> None:
    """A tokenizer of 64 words: three special ones in the order of the arguments, then w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [unk_token, *others.values(), *(f"w{number}" for number in range(3, 64))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk_token, **others).save_pretrained(
        directory
    )


def save_bert(directory: Path, vocab_size: int = 200) -> Path:
    """A BERT encoder of two small layers, without a tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )
    transformers.BertModel(config).save_pretrained(directory)
    return directory


def save_llama(directory: Path) -> Path:
    """A tied Llama of two small layers, with a tokenizer of words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    save_words(directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail as unusable input; its message, which is one line."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err
    assert message[-1].startswith(f"qkernels {argv[0]}: error: ")
    return message[-1]


def test_info_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for key in qkernels.info():
        assert str(key) in text


def test_info_json_is_the_function_s_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(qkernels.info(), default=str))


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qkernels", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == f"qkernels {qkernels.__version__}"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["generate", "x"], ["quantize", "x"]])
def test_usage_errors_exit_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: qkernels" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "demo", "quantize", "inspect", "generate", "bench"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: qkernels {command}" in capsys.readouterr().out


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "inspect", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_quantize_encoder_round_trip(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(bert), "-o", str(out)]) == 0
    assert "stored" in capsys.readouterr().out

    expected = hf.load_float(bert)
    qkernels.quantize_(expected, "w8a8")
    loaded = hf.load_quantized(out)
    assert type(loaded).__name__ == "BertModel"
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    ids = torch.arange(14).reshape(2, 7)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).last_hidden_state, expected(ids).last_hidden_state)
    assert hf.load_tokenizer(out) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written stays beside it


def test_inspect_prints_the_report_of_quantize(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(bert), "-o", str(out), "--exclude", "*.key", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["report"]
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    schemes = {layer["name"]: layer["scheme"] for layer in made["layers"]}
    assert schemes["encoder.layer.0.attention.self.key"] is None
    assert schemes["encoder.layer.0.attention.self.query"] == "w8a8"
    assert cli.main(["inspect", str(out)]) == 0
    assert "w8a8" in capsys.readouterr().out


def test_inspect_without_a_stored_report_loads_the_model(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hf.load_float(bert)
    report = qkernels.quantize_(model, "w8a8")
    hf.save_quantized(model, tmp_path / "out")
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    shown = {layer["name"]: layer["scheme"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert shown == {layer.name: layer.scheme for layer in report.layers}


def test_inspect_refuses_what_is_no_quantized_model(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "existing directory" in fails(capsys, "inspect", str(tmp_path / "nowhere"))
    assert "qkernels.json" in fails(capsys, "inspect", str(bert))
    (tmp_path / "qkernels_report.json").write_text("{")
    assert "not valid JSON" in fails(capsys, "inspect", str(tmp_path))


def test_quantize_keeps_an_output_unless_forced(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(bert), "-o", str(out)]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--force" in fails(capsys, "quantize", str(bert), "-o", str(out), "--embeddings")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert cli.main(["quantize", str(bert), "-o", str(out), "--embeddings", "--force"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quantize_force_replaces_only_a_quantized_model(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("three years")
    assert "not a quantized model" in fails(capsys, "quantize", str(bert), "-o", str(precious), "--force")
    assert (precious / "thesis.txt").read_text() == "three years"


def test_quantize_failure_leaves_the_earlier_output(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(bert), "-o", str(out)]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(model: object, directory: Path) -> None:
        (directory / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_config", full_disk)
    assert cli.main(["quantize", str(bert), "-o", str(out), "--force"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quantize_scheme_typo_lists_the_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "quantize", str(tmp_path), "-o", str(tmp_path / "out"), "--scheme", "w8a9")
    assert "w8a8" in message
    assert "w8a9" in message


def test_quantize_with_groups_and_zero_points(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scheme", "w4a16", "--group-size", "16", "--asymmetric-weights"]
    assert cli.main(["quantize", str(bert), "-o", str(tmp_path / "out"), *options, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["report"]["layers"]
    names = {layer["scheme"] for layer in layers if layer["scheme"]}
    scheme = qkernels.Scheme.resolve("w4a16").replace(group_size=16, weight_symmetric=False)
    assert names == {scheme.name}
    message = fails(capsys, "quantize", str(bert), "-o", str(tmp_path / "no"), "--group-size", "16")
    assert "group_size: expected None with weight_granularity='per_channel', got 16" in message
    message = fails(capsys, "quantize", str(bert), "-o", str(tmp_path / "no"), "--asymmetric-weights")
    assert "weight_symmetric: expected True with weight_bits=8" in message


def test_quantize_with_asymmetric_activations(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", str(bert), "-o", str(tmp_path / "out"), "--asymmetric-activations", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["report"]["layers"]
    wanted = qkernels.Scheme(activation_symmetric=False).name
    assert {layer["scheme"] for layer in layers if layer["scheme"]} == {wanted}
    out = str(tmp_path / "other")
    message = fails(capsys, "quantize", str(bert), "-o", out, "--scheme", "w8a16", "--asymmetric-activations")
    assert "activation_symmetric" in message


def test_quantize_refuses_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "existing directory" in fails(capsys, "quantize", str(tmp_path / "nowhere"), "-o", out)
    assert "config.json" in fails(capsys, "quantize", str(tmp_path), "-o", out)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["NoSuchModel"]}')
    assert "NoSuchModel" in fails(capsys, "quantize", str(tmp_path), "-o", out)
    (tmp_path / "config.json").write_text("{")
    fails(capsys, "quantize", str(tmp_path), "-o", out)
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_a_choice_between_gguf_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    message = fails(capsys, "quantize", str(tmp_path), "-o", str(tmp_path / "out"))
    assert "a.gguf" in message
    assert "b.gguf" in message


def test_quantize_twice_is_an_error(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", str(bert), "-o", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    message = fails(capsys, "quantize", str(tmp_path / "one"), "-o", str(tmp_path / "two"))
    assert "quantized already" in message


@pytest.mark.parametrize("embeddings", [False, True])
def test_generate_from_a_quantized_directory(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], embeddings: bool
) -> None:
    out = tmp_path / "out"
    extra = ["--embeddings"] if embeddings else []
    assert cli.main(["quantize", str(llama), "-o", str(out), *extra]) == 0
    capsys.readouterr()

    arguments = ["--prompt", "w3 w4 w5", "--max-new-tokens", "5", "--json"]
    assert cli.main(["generate", str(out), *arguments]) == 0
    captured = capsys.readouterr()
    stored = json.loads(captured.out)
    assert stored["prompt_tokens"] == 3
    assert 1 <= stored["new_tokens"] <= 5
    assert stored["prefill_tokens_per_second"] > 0
    assert "prefill 3 tokens" in captured.err

    assert cli.main(["generate", str(llama), "--scheme", "w8a8", *extra, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == stored["text"]


def test_generate_streams_text_to_standard_output(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(llama), "--prompt", "w9", "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "decode" not in captured.err  # one token has no decode phase


def test_generate_with_a_temperature_repeats_with_its_seed(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        options = ["--prompt", "w9", "--max-new-tokens", "12", "--temperature", "2", "--seed", seed, "--json"]
        assert cli.main(["generate", str(llama), *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_generate_refuses_an_encoder_and_an_empty_prompt(
    bert: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tokenizer" in fails(capsys, "generate", str(bert), "--prompt", "w3")
    assert "prompt" in fails(capsys, "generate", str(llama), "--prompt", "")


def test_generate_refuses_a_scheme_for_a_quantized_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(llama), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    fails(capsys, "generate", str(tmp_path / "out"), "--prompt", "w3", "--scheme", "w8a8")


def test_demo_refuses_a_plot_in_a_missing_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "existing directory" in fails(capsys, "demo", "--plot", str(tmp_path / "missing" / "plot.png"))
