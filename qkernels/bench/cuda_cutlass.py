"""CUTLASS as a rival of W8A8 on a GPU: a library built from ``bench/rivals/cutlass_w8a8.cu`` by ``make cutlass-rival``.

    cutlass          the configuration that vLLM takes for this shape
    cutlass best     the fastest of nine configurations at this very shape, found by trying them

Int8 activations to scaled bfloat16, no bias.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Cutlass"]


class Cutlass:
    """The functions of the library at ``path``.

    Raises:
        OSError: ``path`` is no library that loads here.
        AttributeError: the library lacks the functions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path.resolve()))
        self._run = library.cutlass_w8a8
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._run.argtypes = [number, *[pointer] * 5, *[number] * 3, pointer]
        self._default = library.cutlass_w8a8_default
        self.configurations = int(library.cutlass_w8a8_configs())

    def default(self, m: int, n: int) -> int:
        """The configuration that vLLM takes for ``m`` rows and ``n`` columns."""
        return int(self._default(m, n))

    def gemm(
        self, q: Tensor, scale: Tensor, weights: list[Tensor], weight_scale: Tensor, out: Tensor, configuration: int
    ) -> Callable[[int], object]:
        """A call that multiplies the activations ``q`` (M, K) by copy ``i`` of the weight (N, K) into ``out`` (M, N).

        Raises:
            RuntimeError: on a call, where CUTLASS takes no such problem in this configuration.
        """
        (m, k), n, count = q.shape, len(weight_scale), len(weights)

        def call(index: int) -> Tensor:
            status = self._run(
                configuration,
                q.data_ptr(),
                weights[index % count].data_ptr(),
                scale.data_ptr(),
                weight_scale.data_ptr(),
                out.data_ptr(),
                m,
                n,
                k,
                torch.cuda.current_stream().cuda_stream,
            )
            if status != 0:
                raise RuntimeError(f"CUTLASS, configuration {configuration}: status {status} at M={m} N={n} K={k}")
            return out

        return call
