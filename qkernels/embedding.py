"""QuantEmbedding, whose table output heads (``tied.py``) share.

The table is int8 ``[V, K]`` with one float32 scale per row.  Alone, it is resident row by row.  Once a head reads
it, the packed form the head's kernel reads is the only one resident, and lookups gather their rows from there; on the
CPU that is

    packed[n // 64, k // 4, n % 64, k % 4] = table[n, k]

and on a GPU what :func:`qkernels.cuda.pack_w8` makes of it, in the layout of the head's scheme.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _C, cuda, reference
from .backends import PreparedReference, PreparedW8A8
from .checks import DTYPE_CODES, TensorSpec, check_canonical, check_out_dtype
from .cuda import W8Layout
from .cuda_w8a16 import embedding_w8
from .eager import is_plain
from .module import QuantModule
from .native import pack_w8, unpack_w8
from .prepared import scheme_key
from .scheme import Scheme
from .tied import TiedQuantLinear, head_kernel

__all__ = ["QuantEmbedding", "TiedQuantLinear"]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_TABLE_SCHEME = Scheme(activation_bits=None)


class QuantEmbedding(QuantModule):
    """``weight[ids]`` over an int8 table with one float32 scale per row.

    Args:
        num_embeddings: V.
        embedding_dim: K.
        tensors: ``weight`` int8 ``[V, K]`` and ``weight_scale`` float32 ``[V]``.
        padding_idx: kept for whoever asks; it concerns gradients alone.
        dtype: of the output, and of ``weight``, the float view.

    Raises:
        ValueError, TypeError: naming the argument or tensor.
    """

    _unpacked: tuple[weakref.ref[Tensor], int, tuple[int, ...]] | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tensors: Mapping[str, Tensor | None],
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_out_dtype(dtype, "dtype")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected within {num_embeddings} embeddings, got {padding_idx}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx + num_embeddings if padding_idx is not None and padding_idx < 0 else padding_idx
        self.max_norm = None
        self.scheme = _TABLE_SCHEME
        self.dtype = dtype
        self._head_scheme: Scheme | None = None
        self._epoch = 0  # changes whenever a head has to look at the table anew
        self._packed = False
        self._layout = int(W8Layout.ROWS)  # on a GPU
        self._has_minus128 = True
        self._on_gpu = False  # and the CUDA module serves lookups
        self.__dict__["_unpacked"] = None
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._install(check_canonical(given, _TABLE_SCHEME, embedding_dim, num_embeddings))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> QuantEmbedding:
        """Quantize the table of an Embedding, row by row.

        Raises:
            ValueError: it has ``max_norm`` (lookups would write to the table), NaN or Inf in it, or no values.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm: expected None, got {embedding.max_norm} (lookups would rescale the table)")
        weight = embedding.weight.detach()
        if weight.device.type == "meta":
            raise ValueError("weight: expected values, got a meta tensor")
        tensors = reference.quantize_weight(weight, _TABLE_SCHEME)
        rows, features = weight.shape
        layer = cls(rows, features, tensors, padding_idx=embedding.padding_idx, dtype=weight.dtype)
        return layer.train(embedding.training)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantEmbedding:
        """A table on the meta device, to be filled by ``load_state_dict(..., assign=True)``."""
        tensors = {
            "weight": torch.empty((num_embeddings, embedding_dim), dtype=torch.int8, device="meta"),
            "weight_scale": torch.empty(num_embeddings, dtype=torch.float32, device="meta"),
        }
        return cls(num_embeddings, embedding_dim, tensors, padding_idx=padding_idx, dtype=dtype)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A float Embedding with the dequantized table; ``dtype`` None: that of ``weight``."""
        weight = self._build_weight(dtype or self.dtype)
        embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` int32 or int64 of any shape to ``[*, embedding_dim]`` in ``self.dtype``.

        Raises:
            TypeError: not integers.
            ValueError: on another device than the table.
            IndexError: an id outside the table.  On a GPU the kernel stops with a failed assertion, as torch's does.
        """
        if not isinstance(input, Tensor) or input.dtype not in (torch.int32, torch.int64):
            got = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input: expected an int32 or int64 tensor, got {got}")
        buffers = self._buffers
        if self._on_gpu:
            table = buffers["packed" if self._packed else "table"]
            if _is_dynamo_compiling() or not is_plain(input):
                size = (self.num_embeddings, self.embedding_dim)
                return torch.ops.qkernels.embedding_w8(
                    input, table, buffers["weight_scale"], self._layout, *size, self.dtype
                )
            return embedding_w8(input, table, buffers["weight_scale"], self._layout, self.embedding_dim, self.dtype)
        if not _is_dynamo_compiling() and is_plain(input) and input.is_cpu and self._readable():
            return self._native_lookup(input)
        scale = F.embedding(input, buffers["weight_scale"].unsqueeze(1))  # checks the range of the ids
        if not self._packed:
            q = F.embedding(input, buffers["table"])
        else:
            lines = (self.embedding_dim + 63) // 64 * 16  # groups of four features in a row of the padded table
            packed = buffers["packed"].view(-1, lines, 64, 4)
            ids = input.to(torch.int64)
            q = packed[ids // 64, :, ids % 64].flatten(-2)[..., : self.embedding_dim]
        return (q.to(torch.float32) * scale).to(self.dtype)

    def _readable(self) -> bool:
        """Whether the resident tensors are what the native kernel reads."""
        tensors = [self._buffers[name] for name in self._resident_names()]
        return all(type(t) is Tensor and t.is_cpu and t.is_contiguous() for t in tensors)

    def _native_lookup(self, input: Tensor) -> Tensor:
        ids = input.to(torch.int64).contiguous()
        out = torch.empty((*input.shape, self.embedding_dim), dtype=self.dtype)
        table = self._buffers["packed" if self._packed else "table"]
        _C.embedding(
            table.data_ptr(),
            self._packed,
            self.num_embeddings,
            self.embedding_dim,
            self._buffers["weight_scale"].data_ptr(),
            ids.data_ptr(),
            ids.numel(),
            out.data_ptr(),
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )
        return out

    def shared_head(
        self,
        bias: Tensor | None = None,
        *,
        scheme: Scheme | str = "w8a8",
        act_scale: Tensor | None = None,
        act_zero_point: Tensor | None = None,
    ) -> TiedQuantLinear:
        """The output layer ``x @ weight.T + bias`` over this very table: nothing is resident twice.

        Args:
            bias: ``[V]``.
            scheme: one with 8-bit weights per channel; all heads of a table run in the same one.
            act_scale, act_zero_point: for static schemes.

        Raises:
            ValueError: a scheme with other weights, or not that of an earlier head.
        """
        scheme = Scheme.resolve(scheme)
        if scheme.weight_bits != 8 or scheme.weight_granularity != "per_channel":
            raise ValueError(f"scheme: expected 8-bit weights per channel, as the table has, got {scheme.name}")
        if self._head_scheme is not None and scheme != self._head_scheme:
            raise ValueError(f"scheme: expected {self._head_scheme.name}, as the table's other head, got {scheme.name}")
        extra = {"bias": bias, "act_scale": act_scale, "act_zero_point": act_zero_point}
        head = TiedQuantLinear(self, extra, scheme)
        return head.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and padding index."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        shared = ", shared with a head" if self._head_scheme is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, int8{shared}"

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> str:
        """What serves lookups."""
        device = self._device()
        if self._on_gpu:
            return f"embedding.cuda.sm{cuda.capability(device.index or 0)}"
        return f"embedding.{_C.info()['isa']}" if device.type == "cpu" else "reference"

    @property
    def reason(self) -> str:
        """Why no faster kernel serves it; "" where there is nothing to explain."""
        device = self._device()
        if self._on_gpu or device.type == "cpu":
            return ""
        return (device.type == "cuda" and cuda.unavailable(device)) or f"no native lookup for device {device.type}"

    def canonical(self) -> dict[str, Tensor]:
        """``weight`` and ``weight_scale``, as in the state dict."""
        return {"weight": self._canonical_weight(), "weight_scale": self._buffers["weight_scale"]}

    def specs(self) -> dict[str, TensorSpec]:
        """What each of them has to be."""
        return {
            "weight": TensorSpec((self.num_embeddings, self.embedding_dim), (torch.int8,)),
            "weight_scale": TensorSpec((self.num_embeddings,), (torch.float32,)),
        }

    def _canonical_weight(self) -> Tensor:
        """The int8 table; while one that was unpacked lives untouched, the same again, so savers see it is shared."""
        if not self._packed:
            return self._buffers["table"]
        if self._unpacked is not None:
            known, version, key = self._unpacked
            weight = known()
            if weight is not None and weight._version == version and key == self._table_key():
                return weight
        packed, size = self._buffers["packed"], (self.num_embeddings, self.embedding_dim)
        weight = cuda.unpack_w8(packed, *size, layout=self._layout) if packed.is_cuda else unpack_w8(packed, *size)
        if not weight.is_inference():
            self.__dict__["_unpacked"] = (weakref.ref(weight), weight._version, self._table_key())
        return weight

    def _table_key(self) -> tuple[int, ...]:
        packed = self._buffers["packed"]
        return self._epoch, id(packed), packed.data_ptr()

    def _resident_names(self) -> tuple[str, ...]:
        return ("packed", "colsum", "weight_scale") if self._packed else ("table", "weight_scale")

    def _device(self) -> torch.device:
        return self._buffers["weight_scale"].device

    def _install(self, canonical: Mapping[str, Tensor]) -> None:
        canonical = check_canonical(canonical, _TABLE_SCHEME, self.embedding_dim, self.num_embeddings)
        for name in self._resident_names():
            self._buffers.pop(name, None)
        tensors = {"table": canonical["weight"], "weight_scale": canonical["weight_scale"]}
        self._packed, self._layout = False, int(W8Layout.ROWS)
        self._hold(tensors)
        self._pack_for_head()

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        self._buffers.update(tensors)
        self._non_persistent_buffers_set.update(tensors)
        self._moved()

    def _pack_for_head(self) -> None:
        """Pack the table if a head reads it and its kernel runs where the table is."""
        if self._packed or self._head_scheme is None:
            return
        table = self._buffers["table"]
        if head_kernel(self._head_scheme, self.embedding_dim, self.num_embeddings, table.device)[0] is None:
            return
        if table.is_cuda:
            self._layout = int(W8Layout.PAIRS if self._head_scheme.weight_only else W8Layout.SLABS)
            packed, colsum = cuda.pack_w8(table.contiguous(), layout=self._layout)
            self._has_minus128 = True  # the kernels there do not ask
            resident = {"packed": packed, "colsum": colsum}
        else:
            tensors = {"weight": table, "weight_scale": self._buffers["weight_scale"]}
            prepared = PreparedW8A8.from_canonical(tensors, Scheme(), self.embedding_dim)
            self._has_minus128 = prepared.has_minus128
            resident = prepared.resident()
        del self._buffers["table"]
        self._packed = True
        self._hold(resident)

    def _overwrite(self, canonical: Mapping[str, Tensor]) -> None:
        buffers = self._buffers
        with torch.no_grad():
            if "weight_scale" in canonical:
                buffers["weight_scale"].copy_(canonical["weight_scale"])
            if "weight" in canonical and not self._packed:
                buffers["table"].copy_(canonical["weight"])
            elif "weight" in canonical:
                packed, colsum = buffers["packed"], buffers["colsum"]
                weight = canonical["weight"].to(packed.device).contiguous()
                if packed.is_cuda:
                    cuda.pack_w8(weight, packed, colsum, layout=self._layout)
                else:
                    self._has_minus128 = pack_w8(weight, packed, colsum)[2]
        self._epoch += 1

    def _moved(self) -> None:
        device = self._device()
        filled = self.num_embeddings > 0 and self.embedding_dim > 0
        self._on_gpu = filled and device.type == "cuda" and not cuda.unavailable(device)
        self._epoch += 1

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _build_weight(self, dtype: torch.dtype) -> Tensor:
        buffers = self._buffers
        size = (self.num_embeddings, self.embedding_dim)
        if self._layout == W8Layout.PAIRS:
            tensors = buffers["packed"], buffers["weight_scale"], None, None, None, None
            return torch.ops.qkernels.dequantize_packed(*tensors, scheme_key(_TABLE_SCHEME), *size, dtype)
        if self._packed:
            return torch.ops.qkernels.dequantize_w8(buffers["packed"], buffers["weight_scale"], None, *size, dtype)
        prepared = PreparedReference.from_canonical(self.canonical(), _TABLE_SCHEME, self.embedding_dim)
        return prepared.weight(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModule:
        """A table of its own, which its copied heads share."""
        clone = super().__deepcopy__(memo)
        clone.__dict__["_unpacked"] = None
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the canonical tensors."""
        state = self.__dict__.copy()
        names = self._resident_names()
        state["_buffers"] = {name: tensor for name, tensor in self._buffers.items() if name not in names}
        state["_canonical"] = self.canonical()
        state["_unpacked"] = None
        state["_packed"] = False
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other way round."""
        state = dict(state)
        canonical = state.pop("_canonical")
        super().__setstate__(state)
        self._install(canonical)
