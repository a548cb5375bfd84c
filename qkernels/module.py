"""What quantized modules share: a state dict in the canonical layout over buffers in another one.

Buffers hold the resident form and are not persistent; ``state_dict``, ``load_state_dict`` and pickling speak the
canonical layout and convert.  Moves keep every dtype: a scale is never narrowed.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import TensorSpec, check_values
from .native import copy_packed
from .scheme import Scheme
from .views import DequantizedWeight

__all__ = ["QuantModule"]


class QuantModule(nn.Module):
    """Base of the quantized modules.

    Attributes:
        scheme: what the canonical tensors mean.
        dtype: dtype of ``weight``; follows ``.to(dtype)``, ``.half()`` and the like, which change nothing else.
    """

    _version = 1
    scheme: Scheme
    dtype: torch.dtype
    _buffers: dict[str, Any]

    # -- what a subclass says -------------------------------------------------------------------------------------

    @abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors: those of the state dict, without loss."""

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """What the canonical tensors of this module have to be."""

    @abstractmethod
    def _resident_names(self) -> tuple[str, ...]:
        """The buffers of this module that hold the resident form."""

    @abstractmethod
    def _device(self) -> torch.device:
        """Where the weight is."""

    @abstractmethod
    def _install(self, canonical: Mapping[str, Tensor]) -> None:
        """Make these tensors the module's own, wherever they are."""

    @abstractmethod
    def _overwrite(self, canonical: Mapping[str, Tensor]) -> None:
        """Write these values into the resident memory; some names may be absent."""

    @abstractmethod
    def _moved(self) -> None:
        """Resident buffers were replaced by equal ones elsewhere."""

    @abstractmethod
    def _weight_shape(self) -> tuple[int, int]:
        """Shape of the float weight."""

    @abstractmethod
    def _build_weight(self, dtype: torch.dtype) -> Tensor:
        """The float weight, computed."""

    # -- the float view -------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in ``self.dtype``: read-only, built when its values are read."""
        if torch.compiler.is_compiling():
            return self._build_weight(self.dtype)
        dtype = self.dtype
        return DequantizedWeight(lambda: self._build_weight(dtype), self._weight_shape(), dtype, self._device())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"weight: read-only in {type(self).__name__}; load a state dict, or dequantize the layer first"
            )
        super().__setattr__(name, value)

    # -- moves ----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        """Every move of torch comes through here (``to``, ``half``, ``share_memory``, ``to_empty``, ...)."""
        device = self._device()
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        buffers = self._buffers
        held = {name: buffers.pop(name) for name in self._resident_names() if buffers.get(name) is not None}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(held)
        kinds = {probe.device.type, device.type}
        if len(kinds) == 1 or kinds == {"cpu", "meta"}:  # a meta tensor has the layout of the CPU's kernels
            for name, tensor in held.items():
                self._buffers[name] = _keep_dtype(fn, tensor)
            self._moved()
        else:
            self._install({name: _keep_dtype(fn, tensor) for name, tensor in self.canonical().items()})
        return self

    # -- state ----------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        specs = self.specs()
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys.extend(key for key in unexpected if key[len(prefix) :] not in specs)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        found: dict[str, Tensor] = {}
        complaints: list[str] = []
        for name, spec in specs.items():
            key = prefix + name
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            complaint = spec.complaint(name, state_dict[key]) or self._objection(name, state_dict[key], assign)
            if complaint is None:
                found[name] = state_dict[key].detach()
            else:
                complaints.append(f"{prefix}{complaint}")
        if complaints or not found:
            error_msgs.extend(complaints)
            return
        if self._device().type == "meta" and not assign:
            warnings.warn(
                f"{prefix}weight: the module is on the meta device, so loading has no effect; "
                "pass assign=True, or call to_empty first",
                stacklevel=2,
            )
            return
        try:
            if not assign:
                self._overwrite(found)
            elif len(found) == len(specs) or self._device().type != "meta":
                self._install({**self.canonical(), **found})
            else:
                lacking = ", ".join(name for name in specs if name not in found)
                error_msgs.append(f"{prefix}weight: expected {lacking} beside {', '.join(found)}, got only these")
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")

    def _objection(self, name: str, tensor: Tensor, assign: bool) -> Exception | None:
        """What is wrong with the values of a tensor to load whose shape and dtype are right, or None."""
        if tensor.device.type == "meta" and not assign and self._device().type != "meta":
            return ValueError(f"{name}: expected values, got a meta tensor (pass assign=True to take it as it is)")
        try:
            check_values(name, tensor.detach(), self.scheme)
        except ValueError as error:
            return error
        return None

    # -- copies ---------------------------------------------------------------------------------------------------

    def __copy__(self) -> QuantModule:
        """A second module over the same tensors."""
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModule:
        """A module with tensors of its own; nothing is unpacked for it."""
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        packed = self._buffers.get("packed")
        if packed is not None and id(packed) not in memo and (copied := copy_packed(packed)) is not None:
            memo[id(packed)] = copied
        for name, value in self.__dict__.items():
            clone.__dict__[name] = copy.deepcopy(value, memo)
        return clone


def _keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Where ``fn`` puts the tensor, in the dtype it has."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
