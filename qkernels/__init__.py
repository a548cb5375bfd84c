"""INT8 and INT4 Linear layers for PyTorch: exact kernels for CPUs and GPUs, put into a model by one call."""

import torch  # noqa: F401  first of all: its OpenMP runtime has to be the one that the kernels find

from . import _C  # noqa: F401  fails here, and clearly, if QKERNELS_ISA is wrong
from ._version import __version__
from .report import LayerReport, Report
from .scheme import Scheme

__all__ = ["LayerReport", "Report", "Scheme", "__version__"]
