"""Whether a call may go straight to a binding, past torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .prepared import function_transform

__all__ = ["are_plain", "autocast", "dispatch_modes", "is_plain", "jit_trace"]

# Where a release of torch does not know one of these questions, the dispatcher serves every call.
dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
jit_trace = getattr(torch._C, "_get_tracing_state", lambda: True)
autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_plain(x: Tensor) -> bool:
    """An ordinary tensor, with nobody listening: no gradient, transform, trace, mode or autocast."""
    return (
        type(x) is Tensor
        and not x.requires_grad
        and not dispatch_modes()
        and function_transform() is None
        and jit_trace() is None
        and not autocast()
        and forward_ad._current_level < 0
    )


def are_plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors, with nobody listening.  At least one."""
    for x in tensors:
        if type(x) is not Tensor or x.requires_grad:
            return False
    return is_plain(tensors[0])
