"""Calls of the CUDA module: from tensors that were checked to addresses, on NVIDIA GPUs.

``qkernels._cuda`` is optional and imports without a GPU.  It takes addresses, sizes and a stream; every launch is on
torch's current stream of the tensors' device, nothing in it allocates or synchronises, so calls can be captured into
CUDA graphs.  Which kernel runs is chosen in ``csrc/cuda/dispatch.cu`` by architecture and shape: ``wgmma`` on compute
capability 9.0, ``mma.sync`` on 8.x and what comes after.  Results equal :mod:`qkernels.reference` bit for bit.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPE_CODES, row_stride

_cuda: Any
try:
    from . import _cuda  # type: ignore[attr-defined,no-redef]  # built only where a CUDA compiler was found
except ImportError:  # built without CUDA
    _cuda = None

__all__ = [
    "ATOM_ROWS",
    "MINIMUM_CAPABILITY",
    "PACKED_ALIGNMENT",
    "SLAB_K",
    "W8Layout",
    "capability",
    "dequantize",
    "gemm_w8a8",
    "kernel_name",
    "launch",
    "linear_w8a8",
    "pack_w8",
    "packed_w8_bytes",
    "peak_s8",
    "quantize",
    "quantize_rows",
    "settle",
    "slab_rows",
    "unavailable",
    "unpack_w8",
]

MINIMUM_CAPABILITY = 80
"""10 * major + minor: int8 tensor cores with ``mma.sync.m16n8k32`` and asynchronous copies."""

Config = tuple[int, int, int, int, int, int]
"""(kernel, tile, split, share, deep, channels) of ``csrc/cuda/w8a8.h``."""

_KERNELS = ("mma", "wgmma.stream", "wgmma.tiled")
_ACTIVATION_ALIGNMENT = 16
PACKED_ALIGNMENT = 128
"""Bytes; packed weights begin at a multiple of it."""

ATOM_ROWS: int = 8
SLAB_K: int = 128
"""Of the packed weight of ``csrc/cuda/w8a8.h``: rows are padded to a multiple, bytes of a row in a slab."""


class W8Layout(enum.IntEnum):
    """How 8-bit weights lie on a GPU, as ``csrc/cuda/w8a8.h`` says."""

    ROWS = 0
    """``[N, K]`` as it is."""
    SLABS = 1
    """Packed, for W8A8."""
    PAIRS = 2
    """Packed, for floating-point activations."""


# -- what there is ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def capability(index: int) -> int:
    """10 * major + minor of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (programmatic dependent launch)."""
    return capability(device.index or 0) >= 90


@functools.cache
def _any_device() -> bool:
    return torch.cuda.is_available()


def unavailable(device: torch.device) -> str:
    """Why the CUDA module cannot serve a device; "" where it can."""
    if device.type != "cuda":
        return f"no CUDA kernel for device {device.type}"
    if _cuda is None:
        return "no CUDA kernel: this installation was built without nvcc"
    if not _any_device():
        return "no CUDA kernel: no CUDA device, or a torch built without CUDA"
    found = capability(device.index or 0)
    if found < MINIMUM_CAPABILITY:
        return f"no CUDA kernel for compute capability {found // 10}.{found % 10} (8.0 and up)"
    return ""


def kernel_name(rows: int, out_features: int, in_features: int, device: torch.device) -> str:
    """The kernel that multiplies ``rows`` tokens, such as ``w8a8.cuda.wgmma.tiled.256``."""
    index = device.index or 0
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    kernel, tile, split, share, deep, width = _cuda.select_w8a8(rows, out_features, in_features, capability(index), sms)
    parts = [f"w8a8.cuda.{_KERNELS[kernel]}.{tile}"]
    parts += [f"channels{width}"] if width == 64 else []
    parts += ["turns"] if _KERNELS[kernel] == "wgmma.tiled" and deep else []
    parts += [f"split{split}"] if split > 1 else []
    parts += [f"share{share}"] if share > 1 else []
    return ".".join(parts)


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Of tensors that are there already: torch's public functions make an object of what is known, or look whether CUDA has
been started, and take longer than the rest of a call."""

_STAY = contextlib.nullcontext()


def _stream(device: torch.device) -> int:
    """The address of torch's current stream."""
    if _raw_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it that of the tensors."""
    if device.index is None or device.index == _current_device():
        return _STAY
    return torch.cuda.device(device)


def launch(device: torch.device, function: Callable[..., Any], *args: Any) -> None:
    """``function(*args, stream)``, the stream being torch's current one of the device."""
    index = device.index
    if _raw_stream is not None and index is not None and index == _current_device():
        function(*args, _raw_stream(index))
        return
    with _on(device):
        function(*args, _stream(device))


def settle(device: torch.device) -> None:
    """Waits for what was packed or copied: launches of layers fetch weights before the kernel in front of them has
    ended."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def packed_w8_bytes(rows: int, features: int) -> int:
    """Bytes of a packed weight ``[rows, features]``."""
    return _cuda.packed_w8_bytes(rows, features)


def peak_s8(random: Tensor, iterations: int) -> float:
    """Launches back-to-back int8 products on 48 KB of random bytes in shared memory; returns their operations.

    Raises:
        ValueError: no such kernel for this build or device.
    """
    if capability(random.device.index or 0) != 90 or not _cuda.has_sm90a():
        raise ValueError(f"random: expected a device of compute capability 9.0, got {random.device}")
    sink = random.new_empty(1, dtype=torch.int32)
    with _on(random.device):
        return _cuda.peak_s8(random.data_ptr(), iterations, sink.data_ptr(), _stream(random.device))


# -- weights ----------------------------------------------------------------------------------------------------------


def pack_w8(
    weight: Tensor,
    packed: Tensor | None = None,
    colsum: Tensor | None = None,
    *,
    layout: int = W8Layout.SLABS,
) -> tuple[Tensor, Tensor]:
    """Canonical weight to a layout of the CUDA kernels, on the GPU.

    Args:
        weight: int8 ``[N, K]``, contiguous, on a CUDA device.
        packed, colsum: written in place where given, contiguous.
        layout: ``SLABS`` or ``PAIRS`` of :class:`W8Layout`.

    Returns:
        packed int8 ``[ceil(K / 128) * ceil(N / 8) * 1024]`` and colsum int32 ``[N]``, the sum of each row.
    """
    rows, features = weight.shape
    if packed is None:
        packed = torch.empty(_cuda.packed_w8_bytes(rows, features), dtype=torch.int8, device=weight.device)
    if colsum is None:
        colsum = torch.empty(rows, dtype=torch.int32, device=weight.device)
    with _on(weight.device):
        addresses = packed.data_ptr(), colsum.data_ptr()
        _cuda.pack_w8(weight.data_ptr(), rows, features, layout, *addresses, _stream(weight.device))
    return packed, colsum


def slab_rows(packed: Tensor, rows: int) -> int:
    """Rows from one slab of a packed weight ``[rows, K]`` to the next: more than its own where it lies among others, as
    ``[slabs, rows, 128]`` (see :mod:`qkernels.joint`)."""
    alone = packed.dim() == 1 or packed.shape[0] == 1
    return -(-rows // ATOM_ROWS) * ATOM_ROWS if alone else packed.stride(0) // SLAB_K


def unpack_w8(packed: Tensor, rows: int, features: int, *, layout: int = W8Layout.SLABS) -> Tensor:
    """The canonical int8 ``[rows, features]`` that :func:`pack_w8` packed, without loss."""
    packed = packed.contiguous()
    weight = torch.empty((rows, features), dtype=torch.int8, device=packed.device)
    with _on(packed.device):
        _cuda.unpack_w8(packed.data_ptr(), rows, features, layout, weight.data_ptr(), _stream(packed.device))
    return weight


# -- the two steps, one by one ----------------------------------------------------------------------------------------


def quantize_rows(
    x: Tensor,
    *,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    for_gemm: bool = False,
    settled: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`qkernels.reference.quantize_activations` of ``x [M, K]`` on the GPU.

    Args:
        x: float32, bfloat16 or float16, rows of contiguous values.
        symmetric, scale, zero_point, inv_smooth: as there; tensors on the GPU.
        for_gemm: codes of an asymmetric grid are less 128, as int8; the launch may begin while the kernel before it
            ends.
        settled: and so may the launch after this one, whose weights no kernel still writes.

    Returns:
        q: int8 (symmetric or for_gemm) or uint8 ``[M, K]``, its rows 16-byte aligned; scale float32 ``[M]``; zero
        points int32 ``[M]`` or None.
    """
    rows, features = x.shape
    stride = -(-features // _ACTIVATION_ALIGNMENT) * _ACTIVATION_ALIGNMENT
    dtype = torch.int8 if symmetric or for_gemm else torch.uint8
    q = torch.empty((rows, stride), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    zeros = None if symmetric else torch.empty(rows, dtype=torch.int32, device=x.device)
    step = row_stride(x)
    if step is None:
        x, step = x.contiguous(), features
    with _on(x.device):
        _cuda.quantize_rows(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            rows,
            features,
            step,
            q.data_ptr(),
            stride,
            scales.data_ptr(),
            _address(zeros),
            _address(inv_smooth),
            _address(scale),
            _address(zero_point),
            for_gemm,
            for_gemm and overlaps(x.device),
            settled,
            _stream(x.device),
        )
    return q[:, :features], scales, zeros


def gemm_w8a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    tensors: Mapping[str, Tensor | None],
    *,
    out_dtype: torch.dtype,
    config: Config | None = None,
    out: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """:func:`qkernels.reference.linear_w8a8_prequantized` over a packed weight.

    Args:
        q: int8, or uint8 with zero points, ``[M, K]``; x_scale float32 ``[M]``; x_zero_point int32 ``[M]`` or None.
        tensors: ``packed``, ``colsum``, ``weight_scale`` and perhaps ``bias``, as a layer holds them.
        config: a kernel and its tile; None: the module's own choice.
        out: written where given, ``[M, N]`` with contiguous rows.
        dependent: the launch may begin to fetch the weight while the kernel before it ends; that one must not write it.

    Raises:
        ValueError: no such kernel.
    """
    rows, features = q.shape
    weight_scale, packed = tensors.get("weight_scale"), tensors.get("packed")
    if weight_scale is None or packed is None:
        raise ValueError(f"tensors: expected packed and weight_scale, got {', '.join(tensors)}")
    if q.dtype == torch.uint8:
        q = (q ^ 128).view(torch.int8)  # the kernels read q - 128
    if q.stride(-1) != 1 or q.stride(0) % _ACTIVATION_ALIGNMENT or q.data_ptr() % _ACTIVATION_ALIGNMENT:
        q = _aligned_rows(q)
    channels, device = weight_scale.numel(), q.device
    out = torch.empty((rows, channels), dtype=out_dtype, device=device) if out is None else out
    if config is None:
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        config = _cuda.select_w8a8(rows, channels, features, capability(device.index or 0), sms)
    with _on(device):
        _cuda.gemm_w8a8(
            q.data_ptr(),
            max(q.stride(0), -(-features // _ACTIVATION_ALIGNMENT) * _ACTIVATION_ALIGNMENT),
            x_scale.data_ptr(),
            _address(x_zero_point),
            packed.data_ptr(),
            slab_rows(packed, channels),
            _address(tensors.get("colsum")),
            weight_scale.data_ptr(),
            _address(tensors.get("bias")),
            rows,
            channels,
            features,
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
            out.stride(0),
            config,
            dependent,
            _stream(device),
        )
    return out


def _aligned_rows(q: Tensor) -> Tensor:
    """``q [M, K]`` as bytes whose rows begin at multiples of 16."""
    rows, features = q.shape
    stride = -(-features // _ACTIVATION_ALIGNMENT) * _ACTIVATION_ALIGNMENT
    copy = q.new_empty((rows, stride))[:, :features]
    return copy.copy_(q)


# -- a whole layer ----------------------------------------------------------------------------------------------------


def linear_w8a8(
    x: Tensor,
    packed: Tensor,
    colsum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rows: int,
    features: int,
    symmetric: bool,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checked tensors through quantizer and GEMM: two launches, one workspace from torch's allocator.

    Arguments as those of ``torch.ops.qkernels.linear_w8a8``; static scales are read on the GPU.  Layers come by another
    way (:mod:`qkernels.cuda_bound`).
    """
    step: int | None = features
    if not x.is_contiguous():
        step = row_stride(x)
        if step is None or x.is_neg():
            x, step = x.resolve_neg().contiguous(), features
    out = x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)
    count = x.numel() // features
    if count:
        layer = _cuda.LinearW8A8(
            packed.data_ptr(),
            slab_rows(packed, rows),
            colsum.data_ptr(),
            weight_scale.data_ptr(),
            _address(bias),
            rows,
            features,
            symmetric,
            _address(inv_smooth),
            _address(act_scale),
            _address(act_zero_point),
            False,
        )
        workspace = x.new_empty(_cuda.workspace_bytes(count, features), dtype=torch.int8)
        launch(
            x.device,
            layer.run,
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            count,
            step,
            workspace.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
        )
    return out


# -- whole tensors ----------------------------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    view: tuple[int, int, int, int],
    data: Tensor,
    kind: int,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    symmetric: bool,
    static: bool,
) -> None:
    """Codes of a contiguous tensor into ``data``, and its scales and zero points unless they are given.

    Args:
        view: (outer, channels, inner, group) of ``csrc/args.h``: a granule per channel, or ``group`` values of a row.
        kind: 0 int8, 1 uint8, 2 two 4-bit codes per byte.
        static: ``scale`` and ``zero_point`` are given; granules with NaN or Inf get scale NaN, zero point 0.
    """
    stats = torch.zeros(2 * scale.numel(), dtype=torch.int32, device=x.device)
    with _on(x.device):
        _cuda.quantize(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            *view,
            data.data_ptr(),
            kind,
            scale.data_ptr(),
            _address(zero_point),
            symmetric,
            static,
            stats.data_ptr(),
            _stream(x.device),
        )


def dequantize(
    data: Tensor,
    kind: int,
    view: tuple[int, int, int, int],
    scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
) -> None:
    """``scale * (q - zero_point)`` into ``out``; arguments as those of :func:`quantize`."""
    with _on(data.device):
        _cuda.dequantize(
            data.data_ptr(),
            kind,
            *view,
            scale.data_ptr(),
            _address(zero_point),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            _stream(data.device),
        )
