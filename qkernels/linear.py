"""QuantLinear: stands where ``nn.Linear`` stood.

Same call, same attributes (``weight`` is a read-only float view, ``bias`` a tensor or None), a state dict under the
same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .checks import TensorSpec, canonical_specs, check_out_dtype
from .deferred import Handoff, hand_term
from .epilogues import check_epilogue
from .groups import InputGroup
from .joint import own_memory, separate
from .module import QuantModule
from .ops import Prepared, prepare
from .scheme import Scheme

__all__ = ["QuantLinear"]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class QuantLinear(QuantModule):
    """``y = epilogue(x @ weight.T + bias)`` over integers, as a scheme says.

    Args:
        in_features: K.
        out_features: N.
        tensors: the canonical tensors (names, shapes, dtypes: :mod:`qkernels.reference`); ``bias`` and
            ``inv_smooth`` may be absent or None.
        scheme: a Scheme or the name of a preset.
        dtype: dtype of ``weight``, the float view.  The layer takes float32, bfloat16 and float16 whatever it is.
        epilogue: None, or what is applied to the output before it is rounded: "relu", "gelu", "gelu_tanh", "silu"
            (see :mod:`qkernels.epilogues`).

    Raises:
        ValueError, TypeError: naming the argument or tensor.

    The output has the dtype of the input; under autocast the input is cast first, as for ``nn.Linear``.
    Gradients reach the input, not the weight.
    """

    bias: Tensor | None
    _prepared: Prepared
    _epilogue: str | None = None
    _group: tuple[InputGroup, int] | None = None  # and the number of this member
    _reads: Handoff | None = None  # by which its input may come as integers
    _feeds: tuple[Handoff, bool] | None = None  # where its output goes as integers; through a product?
    _adds: Handoff | None = None  # to the readers of a norm that reads the sum of its output and something else

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, Tensor | None],
        scheme: Scheme | str,
        *,
        dtype: torch.dtype = torch.float32,
        epilogue: str | None = None,
    ) -> None:
        super().__init__()
        check_out_dtype(dtype, "dtype")
        self._epilogue = check_epilogue(epilogue)
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = Scheme.resolve(scheme)
        self.dtype = dtype
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        weight = given.get("weight")
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] != out_features:
            raise ValueError(f"weight: expected {out_features} rows (out_features), got {weight.shape[0]}")
        self._adopt(prepare(given, self.scheme, in_features))

    # -- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        scheme: Scheme | str = "w8a8",
        *,
        act_scale: Tensor | None = None,
        act_zero_point: Tensor | None = None,
        inv_smooth: Tensor | None = None,
    ) -> QuantLinear:
        """Quantize a float weight by rounding to nearest.

        Args:
            weight: float32, bfloat16 or float16 ``[N, K]``; where ``inv_smooth`` is given, already divided by it.
            bias: ``[N]``.
            scheme: a Scheme or the name of a preset.
            act_scale, act_zero_point: for static schemes, measured by calibration.
            inv_smooth: float32 ``[K]``, multiplied into the input at run time.

        Raises:
            ValueError: NaN or Inf in the weight, or a meta tensor; a static scheme without ``act_scale``.
        """
        scheme = Scheme.resolve(scheme)
        if weight.device.type == "meta":
            raise ValueError("weight: expected values, got a meta tensor")
        tensors: dict[str, Tensor | None] = dict(reference.quantize_weight(weight.detach(), scheme))
        tensors.update(bias=bias, act_scale=act_scale, act_zero_point=act_zero_point, inv_smooth=inv_smooth)
        return cls(weight.shape[1], weight.shape[0], tensors, scheme, dtype=weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme | str = "w8a8", **options: Tensor | None) -> QuantLinear:
        """:meth:`from_float` over the weight and bias of a Linear, in the same training mode; ``options`` as there."""
        layer = cls.from_float(linear.weight, linear.bias, scheme, **options)
        return layer.train(linear.training)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme | str = "w8a8",
        *,
        bias: bool = True,
        inv_smooth: bool = False,
        group_scale_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """A layer on the meta device, to be filled by ``load_state_dict(..., assign=True)``.

        ``group_scale_dtype`` is the dtype of float scales of groups where it is not the scheme's own.
        """
        scheme = Scheme.resolve(scheme)
        tensors: dict[str, Tensor | None] = {}
        for name, spec in canonical_specs(scheme, in_features, out_features).items():
            if (name == "bias" and not bias) or (name == "inv_smooth" and not inv_smooth):
                continue
            of_group = name in ("weight_scale", "weight_min") and len(spec.shape) == 2
            own = (group_scale_dtype or scheme.scale_dtype) if of_group else spec.dtypes[0]
            tensors[name] = torch.empty(spec.shape, dtype=own, device="meta")
        return cls(in_features, out_features, tensors, scheme, dtype=dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A float Linear with the dequantized weight, and no epilogue; ``dtype`` None: that of ``weight``."""
        dtype = dtype or self.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self._build_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    # -- running --------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``, plus ``residual`` where there is one.

        The residual has the shape, dtype and device of the output and is added after the epilogue.  CPU kernels add it
        in float32 before the one rounding of the output: for float32 that is ``layer(input) + residual`` to the bit,
        for bfloat16 and float16 one rounding fewer.

        Raises:
            TypeError: not a float32, bfloat16 or float16 tensor.
            ValueError: another number of features, or another device; a residual of another shape.
        """
        if _is_dynamo_compiling():
            return self._prepared.call(input, self._tensors(), residual)
        if residual is not None:
            return self._prepared.run_plus(input, residual)
        group = self._group
        y = self._prepared.run(input) if group is None else group[0].run(self, group[1], input)
        return y if self._adds is None or self._forward_hooks else hand_term(y, self._adds)

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves this layer: ``"w8a8.avx2"``, ``"w8a8.avx2+gelu"``, ``"reference"``, ..."""
        prepared = self._prepared
        return f"{prepared.kernel}+{prepared.epilogue}" if prepared.fuses and prepared.epilogue else prepared.kernel

    @property
    def epilogue(self) -> str | None:
        """What is applied to the output before it is rounded, or None.  May be set."""
        return self._epilogue

    @epilogue.setter
    def epilogue(self, name: str | None) -> None:
        self._epilogue = self._prepared.epilogue = check_epilogue(name)
        self._prepared.moved()

    def feed(self, feeds: tuple[Handoff, bool] | None) -> None:
        """Where the output goes as integers where it can (see :mod:`qkernels.deferred`), or None."""
        self._feeds = self._prepared.feeds = feeds

    @property
    def reason(self) -> str:
        """Why no faster kernel serves it; "" where there is nothing to explain."""
        return self._prepared.reason

    def extra_repr(self) -> str:
        """Sizes, scheme and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, kernel={self.kernel}"
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors, as in the state dict."""
        canonical = self._prepared.canonical()
        return own_memory(canonical) if self._joined() else canonical

    def specs(self) -> dict[str, TensorSpec]:
        """What each canonical tensor of this layer has to be."""
        present = self._tensors()
        return {
            name: spec
            for name, spec in canonical_specs(self.scheme, self.in_features, self.out_features).items()
            if spec.required or present.get(name) is not None
        }

    def _adopt(self, prepared: Prepared) -> None:
        """Hold the tensors of ``prepared`` as buffers; from then on both look at the same dictionary."""
        for name in self._resident_names():
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self._buffers["bias"] = None
        self._buffers.update(prepared.tensors)
        self._non_persistent_buffers_set.update(prepared.resident())
        prepared.tensors = self._buffers
        prepared.epilogue, prepared.feeds = self._epilogue, self._feeds
        self.__dict__["_prepared"] = prepared

    def _tensors(self) -> dict[str, Tensor | None]:
        buffers = self._buffers
        return {name: buffers.get(name) for name in self._prepared.names}

    def _resident_names(self) -> tuple[str, ...]:
        prepared = self.__dict__.get("_prepared")
        return () if prepared is None else prepared.names

    def _device(self) -> torch.device:
        return self._prepared.device

    def _install(self, canonical: Mapping[str, Tensor]) -> None:
        self._adopt(prepare(canonical, self.scheme, self.in_features))
        self._settle()

    def _overwrite(self, canonical: Mapping[str, Tensor]) -> None:
        self._prepared.load(canonical)
        self._settle()

    def _moved(self) -> None:
        self._prepared.moved()
        self._settle()

    def beside(self, group: tuple[InputGroup, int] | None) -> None:
        """Become a member of a group of layers over one input, with that number, or of none."""
        if self._group is not None and self._group != group:
            self._group[0].leave(self._group[1])
        self._group = group
        if group is not None:
            group[0].join(group[1], self)

    def _joined(self) -> bool:
        """Whether resident tensors are views of what belongs to others too."""
        return self._group is not None and self._group[0].joined

    def _settle(self) -> None:
        """What layers beside this one have to know of its tensors changed."""
        if self._group is not None:
            self._group[0].settle()

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _build_weight(self, dtype: torch.dtype) -> Tensor:
        return self._prepared.weight_of(self._tensors(), dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and "_prepared" in self.__dict__:
            if value is not None:
                spec = canonical_specs(self.scheme, self.in_features, self.out_features)["bias"]
                complaint = spec.complaint("bias", value)
                if complaint is not None:
                    raise complaint
                value = value.detach().to(device=self._device(), dtype=torch.float32).contiguous()
            self._buffers["bias"] = value
            self._non_persistent_buffers_set.add("bias")
            self._moved()
            return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the canonical tensors; where the memory is shared between processes, the resident ones."""
        state = self.__dict__.copy()
        prepared: Prepared = state.pop("_prepared")
        resident = prepared.resident()
        state["_buffers"] = {name: t for name, t in self._buffers.items() if name not in prepared.names}
        if not self._joined() and all(tensor.is_shared() for tensor in resident.values()):
            state["_shared"] = (prepared, resident)
        else:
            state["_canonical"] = self.canonical()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other way round."""
        state = dict(state)
        canonical, shared = state.pop("_canonical", None), state.pop("_shared", None)
        super().__setstate__(state)
        if shared is None:
            self._install(canonical)
        else:
            prepared, resident = shared
            prepared.tensors = resident
            prepared.moved()
            self._adopt(prepared)
        self._join()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModule:
        """See :class:`QuantModule`."""
        clone = super().__deepcopy__(memo)
        if isinstance(clone, QuantLinear):
            if self._joined():
                separate(clone._prepared)
            clone._join()
        return clone

    def _join(self) -> None:
        """Take the place that the layer this is a copy of had beside others."""
        if self._group is not None:
            self._group[0].join(self._group[1], self)
            self._group[0].settle()
        if self._reads is not None:
            self._reads.join(self)
