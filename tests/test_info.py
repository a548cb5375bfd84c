"""info(): facts about the installation, on every platform."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import qkernels as qk
from qkernels import info as _function  # the attribute is the function, not the module

information = sys.modules["qkernels.info"]

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 1   /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f01-7f02 r--p 00001000 08:01 1   /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f02-7f03 r-xp 00000000 08:01 2   /opt/my libs/libiomp5.so (deleted)
7f03-7f04 r-xp 00000000 08:01 3   /opt/torch/lib/libgomp-a34b3233.so.1
7f04-7f05 r-xp 00000000 08:01 4   /opt/libompi_helper.so
7f05-7f06 rw-p 00000000 00:00 0
7f06-7f07 r-xp 00000000 08:01 5   /opt/libomp.so
"""


def test_info_is_json_and_complete():
    facts = json.loads(json.dumps(qk.info()))
    assert facts["version"] == qk.__version__
    assert facts["isa"] in facts["usable"]
    assert set(facts["usable"]) <= set(facts["compiled"])
    assert facts["isa_reason"]
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["cuda"]) >= {"built", "available"}
    assert isinstance(facts["warnings"], list)
    assert callable(_function)


def test_info_follows_set_num_threads(one_thread):
    assert qk.info()["threads"] == 1
    torch.set_num_threads(2)
    assert qk.info()["threads"] == 2


def test_openmp_runtimes_are_found_in_the_maps(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    found = information.openmp_runtimes(maps)
    assert [Path(p.removesuffix(" (deleted)")).name for p in found] == [
        "libgomp.so.1.0.0",
        "libiomp5.so",
        "libgomp-a34b3233.so.1",
        "libomp.so",
    ]
    assert information.openmp_runtimes(tmp_path / "missing") == []


def test_info_warns_of_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(information, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert any("libiomp5.so" in text for text in qk.info()["warnings"])
    monkeypatch.setattr(information, "openmp_runtimes", lambda: ["/a/libgomp.so.1"])
    assert not any("OpenMP" in text for text in qk.info()["warnings"])


def test_info_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: (_ for _ in ()).throw(OSError("no /proc")))
    facts = qk.info()
    assert facts["openmp"] == []
    assert isinstance(facts["processor"], str)


def test_import_loads_one_openmp_runtime_and_torch_first():
    code = "import sys, qkernels; print(len(qkernels.info()['openmp']), 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, transformers_loaded = done.stdout.split()
    assert int(count) <= 1
    assert transformers_loaded == "False"


def test_public_names_are_there():
    for name in qk.__all__:
        assert getattr(qk, name) is not None
