"""Large packed weights, and outputs that the allocator takes from the system anew: kernels ask for huge pages, which
Linux shows in smaps."""

import copy
import gc
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.nn import QuantLinear

SMAPS = Path("/proc/self/smaps")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="madvise(MADV_HUGEPAGE) is a call of Linux"),
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel knows no transparent huge pages"
    ),
]


def flags_at(address: int) -> set[str]:
    """The flags of the mapping that holds ``address``."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError(f"no mapping holds {address:#x}")


def middle(t: Tensor) -> int:
    return t.data_ptr() + t.nbytes // 2


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a16", "w4a16"])
def test_layers_ask_for_huge_pages_in_large_outputs(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 9000))
    x = torch.randn(1024, 32)
    qk.quantize_(model, scheme)
    with torch.inference_mode():
        large, small = model(x), model(x[:512])  # enough rows for sums in the same order
    assert large.nbytes >= 32 << 20
    assert "hg" in flags_at(middle(large))
    assert torch.equal(large[:512], small)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a16", "w4a16"])
def test_large_packed_weights_have_huge_pages_of_their_own(scheme: str) -> None:
    weight = torch.randn(4500, 2048)
    large = QuantLinear.from_float(weight, None, scheme)
    small = QuantLinear.from_float(weight[:1000], None, scheme)
    assert "hg" in flags_at(middle(large.packed))
    x, copied, loaded = torch.randn(3, 2048), copy.deepcopy(large), pickle.loads(pickle.dumps(large))
    for other in (copied, loaded):
        assert "hg" in flags_at(middle(other.packed))
        assert other.packed.data_ptr() != large.packed.data_ptr()
        assert torch.equal(other(x), large(x))
    assert torch.equal(copied(x)[:, :1000], small(x))


def test_nothing_small_asks_for_huge_pages() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_huge_pages as t; t.small_ones()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def small_ones() -> None:
    """In a process of its own: the allocator gives memory again that asked, as the workspace of an earlier test."""
    for scheme in ("w8a8", "w4a8", "w8a16", "w4a16"):
        layer = QuantLinear.from_float(torch.randn(9000, 32), None, scheme)
        with torch.inference_mode():
            output = layer(torch.randn(512, 32))
        assert 1 << 22 < output.nbytes < 32 << 20
        assert "hg" not in flags_at(middle(output)), scheme
        packed = QuantLinear.from_float(torch.randn(1000, 2048), None, scheme).packed
        assert 1 << 19 < packed.nbytes < 1 << 22
        assert "hg" not in flags_at(middle(packed)), scheme


def test_copies_of_shared_weights_stay_shared() -> None:
    layer = QuantLinear.from_float(torch.randn(4500, 2048), None, "w8a8")
    once, twice, view = copy.deepcopy([layer, layer, layer.packed])
    assert once is twice
    assert view is once.packed
    assert "hg" in flags_at(middle(view))


def test_packed_weights_leave_the_process_with_their_layer() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    layer = QuantLinear.from_float(torch.randn(8192, 4096), None, "w8a8")
    before, pages = resident(), layer.packed.nbytes // os.sysconf("SC_PAGE_SIZE")
    del layer
    gc.collect()
    assert before - resident() > 0.9 * pages


def test_quantize_and_dequantize_ask_for_huge_pages() -> None:
    x = torch.randn(4100, 8192)
    for bits, granularity in itertools.product((8, 4), ("token", "tensor")):
        q = qk.quantize(x, bits=bits, granularity=granularity)
        if bits == 8:
            assert "hg" in flags_at(middle(q.data))
        assert "hg" in flags_at(middle(q.dequantize()))
