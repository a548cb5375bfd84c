"""INT8 and INT4 Linear layers for PyTorch: exact kernels for CPUs and GPUs, put into a model by one call.

import qkernels as qk

report = qk.quantize_(model, "w8a8")
print(report)
qk.save(model, "directory")
"""

import torch  # noqa: F401  first of all: its OpenMP runtime has to be the one that the kernels find

from . import (
    _C,  # noqa: F401  fails here, and clearly, if QKERNELS_ISA is wrong
    nn,
    ops,
)
from ._version import __version__
from .awq import AWQ, MSE
from .calibrate import calibrate
from .codebook import NF4, fit_codebook
from .compat import quantize_dynamic
from .convert import dequantize_, quantize_
from .experts import join_experts_, split_experts_
from .fuse import fuse_, unfuse_
from .gptq import GPTQ
from .hqq import HQQ
from .info import info
from .qat import convert_, prepare_qat_
from .qtensor import QTensor, dequantize, quantize
from .report import LayerReport, Report
from .retrieval import EmbeddingIndex
from .scheme import Scheme
from .sensitivity import plan, sensitivity
from .serialization import load, save
from .smooth import smooth_

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "MSE",
    "NF4",
    "EmbeddingIndex",
    "LayerReport",
    "QTensor",
    "Report",
    "Scheme",
    "__version__",
    "calibrate",
    "convert_",
    "dequantize",
    "dequantize_",
    "fit_codebook",
    "fuse_",
    "info",
    "join_experts_",
    "load",
    "nn",
    "ops",
    "plan",
    "prepare_qat_",
    "quantize",
    "quantize_",
    "quantize_dynamic",
    "save",
    "sensitivity",
    "smooth_",
    "split_experts_",
    "unfuse_",
]
