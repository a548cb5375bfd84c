"""The CPU kernels. Addresses are what ``Tensor.data_ptr()`` returns, 0 meaning absent; nothing keeps the tensors alive.

Codes: dtypes 0 float32, 1 bfloat16, 2 float16; kinds of codes 0 int8, 1 uint8, 2 two 4-bit codes a byte, the first in
the low nibble. Functions applied to the output: 0 none, 1 ReLU, 2 GELU, 3 GELU by tanh, 4 SiLU.
Sizes are in elements unless named otherwise. ValueError where a size or code makes no sense.
"""

from typing import Any, TypedDict, type_check_only

@type_check_only
class _Info(TypedDict):
    isa: str
    reason: str
    compiled: list[str]
    usable: list[str]

def info() -> _Info:
    """isa (the tier in use), reason, compiled and usable (tiers, the fastest last)."""

def set_isa(name: str) -> None:
    """Force a tier; ValueError, listing the valid names, if it is unknown or not usable here."""

def last_kernel() -> str:
    """What ran last on this thread, for example "w8a8.avx512vnni"; "" before the first call."""

def packed_w8_bytes(N: int, K: int) -> int: ...
def pack_w8(weight: int, N: int, K: int, packed: int, colsum: int, threads: int) -> bool:
    """int8 ``[N, K]`` to the packed layout and int32 ``colsum [N]``; returns whether a -128 occurs."""

def unpack_w8(packed: int, N: int, K: int, weight: int, threads: int) -> None: ...
def packed_w4_bytes(N: int, K: int) -> int: ...
def pack_w4(weight: int, N: int, K: int, packed: int, threads: int) -> None:
    """uint8 ``[N, ceil(K / 2)]``, low nibble first, to the packed layout."""

def unpack_w4(packed: int, N: int, K: int, weight: int, threads: int) -> None: ...
def packed_group_elements(N: int, groups: int) -> int: ...
def pack_groups(source: int, element_bytes: int, N: int, groups: int, packed: int) -> None:
    """Scales, minima or zero points ``[N, groups]`` of 1, 2 or 4 bytes each to the order that kernels read."""

def unpack_groups(packed: int, element_bytes: int, N: int, groups: int, target: int) -> None: ...

class Held:
    """The tensors of a layer whose addresses an object borrowed, referred to weakly; a name that is missing is None."""

    def __init__(self, tensors: dict[str, Any], names: tuple[str, ...]) -> None: ...
    def holds(self, tensors: dict[str, Any]) -> bool:
        """Whether a mapping has the very same tensors, and their memory is where it was."""

class LinearW8A8:
    """One layer's weights. ``act_scale`` 0.0: measured per row."""

    def __init__(
        self,
        packed: int,
        colsum: int,
        weight_scale: int,
        bias: int,
        N: int,
        K: int,
        has_minus128: bool,
        act_symmetric: bool,
        act_scale: float,
        act_zero_point: int,
        inv_smooth: int,
        function: int = 0,
    ) -> None: ...
    def run(
        self, x: int, x_dtype: int, M: int, x_stride: int, y: int, y_dtype: int, y_stride: int, threads: int, /
    ) -> None:
        """Float rows in, float rows out; strides in elements between rows."""

    def run_plus(
        self,
        x: int,
        x_dtype: int,
        M: int,
        x_stride: int,
        y: int,
        y_dtype: int,
        y_stride: int,
        threads: int,
        residual: int,
        residual_stride: int,
        /,
    ) -> None:
        """:meth:`run`, with a residual ``[M, N]`` of y's dtype added before y is rounded."""

    def run_quantized(
        self,
        xq: int,
        xq_stride: int,
        x_scale: int,
        x_zero_point: int,
        M: int,
        y: int,
        y_dtype: int,
        y_stride: int,
        threads: int,
        /,
    ) -> None:
        """The same over rows that are int8 (symmetric) or uint8 already."""

class LinearW8A8Group:
    """Layers that read the same rows, quantized once; ValueError where their activations differ."""

    def __init__(self, members: list[LinearW8A8]) -> None: ...
    def run(self, x: int, x_dtype: int, M: int, x_stride: int, y: list[int], y_dtype: int, threads: int, /) -> None:
        """``y``: a contiguous ``[M, N]`` for each member."""

class LinearW4A8:
    """One layer's weights in groups along K; at most one of zero points and minima, no minima beside multipliers.

    Otherwise as LinearW8A8.
    """

    def __init__(
        self,
        packed: int,
        weight_scale: int,
        weight_zero_point: int,
        weight_min: int,
        weight_multiplier: int,
        scale_dtype: int,
        bias: int,
        N: int,
        K: int,
        group_size: int,
        act_symmetric: bool,
        act_scale: float,
        act_zero_point: int,
        inv_smooth: int,
        function: int = 0,
    ) -> None: ...
    def run(
        self, x: int, x_dtype: int, M: int, x_stride: int, y: int, y_dtype: int, y_stride: int, threads: int, /
    ) -> None: ...
    def run_plus(
        self,
        x: int,
        x_dtype: int,
        M: int,
        x_stride: int,
        y: int,
        y_dtype: int,
        y_stride: int,
        threads: int,
        residual: int,
        residual_stride: int,
        /,
    ) -> None: ...

class LinearW8A16:
    """int8 weights per channel, float activations."""

    def __init__(
        self, packed: int, weight_scale: int, bias: int, N: int, K: int, inv_smooth: int = 0, function: int = 0
    ) -> None: ...
    def run(
        self, x: int, x_dtype: int, M: int, x_stride: int, y: int, y_dtype: int, y_stride: int, threads: int, /
    ) -> None: ...
    def run_plus(
        self,
        x: int,
        x_dtype: int,
        M: int,
        x_stride: int,
        y: int,
        y_dtype: int,
        y_stride: int,
        threads: int,
        residual: int,
        residual_stride: int,
        /,
    ) -> None: ...

class LinearW4A16:
    """int4 weights in groups along K, float activations; at most one of zero points, minima and codebook."""

    def __init__(
        self,
        packed: int,
        weight_scale: int,
        weight_zero_point: int,
        weight_min: int,
        scale_dtype: int,
        codebook: int,
        bias: int,
        N: int,
        K: int,
        group_size: int,
        inv_smooth: int = 0,
        function: int = 0,
    ) -> None: ...
    def run(
        self, x: int, x_dtype: int, M: int, x_stride: int, y: int, y_dtype: int, y_stride: int, threads: int, /
    ) -> None: ...
    def run_plus(
        self,
        x: int,
        x_dtype: int,
        M: int,
        x_stride: int,
        y: int,
        y_dtype: int,
        y_stride: int,
        threads: int,
        residual: int,
        residual_stride: int,
        /,
    ) -> None: ...

class Attention:
    """Attention over tensors of these shapes and strides, features side by side. ``sizes``: batch, heads of queries,
    heads of keys, queries, keys, features. Strides in elements of batch, head and token. Kinds of masks: 0 none,
    1 bool, 2 added to the scores, of the queries' dtype."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int, int],
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        mask: tuple[int, int, int],
        dtype: int,
        mask_kind: int,
        causal: bool,
    ) -> None: ...
    def run(self, q: int, k: int, v: int, mask: int, y: int, scale: float, threads: int, /) -> bool:
        """``y``: contiguous ``[batch, queries, heads, features]``. False, and nothing done, where the tier has none."""

class Rotary:
    """Rotary embedding of queries and keys of these shapes and strides, features side by side. ``sizes``: batch, heads
    of queries, heads of keys, tokens, features. Strides in elements of batch, head and token."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        angles: tuple[int, int, int],
        dtype: int,
    ) -> None: ...
    def run(self, q: int, k: int, cos: int, sin: int, q_out: int, k_out: int, threads: int, /) -> None:
        """Outputs lie ``[batch, tokens, heads, features]`` in memory of their own."""

def has_attention() -> bool:
    """Whether the tier in use has a kernel of attention."""

def has_attention_of_few() -> bool:
    """Whether it has one that is worth it for few queries."""

def embedding(
    table: int,
    packed: bool,
    n: int,
    k: int,
    scale: int,
    ids: int,
    count: int,
    out: int,
    out_dtype: int,
    threads: int,
    /,
) -> None: ...
def activation(x: int, x_dtype: int, y: int, y_dtype: int, count: int, function: int, threads: int, /) -> None:
    """``y = function(x)`` over ``count`` contiguous elements; ``y`` may be ``x`` where the dtypes are the same."""

def norm(
    x: int,
    x_dtype: int,
    M: int,
    K: int,
    x_stride: int,
    layer: bool,
    eps: float,
    weight: int,
    bias: int,
    y: int,
    threads: int,
    /,
) -> None:
    """``y [M, K]``, contiguous, no part of ``x``: layer norm, or RMS norm, of each row; all tensors of one dtype."""

def quantize(
    x: int,
    x_dtype: int,
    outer: int,
    channels: int,
    inner: int,
    group: int,
    out: int,
    out_kind: int,
    scale: int,
    zero_point: int,
    symmetric: bool,
    static: bool,
    threads: int,
    /,
) -> None:
    """``x`` seen as ``[outer, channels, inner]``; a granule a channel, or with ``group`` > 0 groups along ``inner``."""

def dequantize(
    q: int,
    q_kind: int,
    outer: int,
    channels: int,
    inner: int,
    group: int,
    scale: int,
    zero_point: int,
    out: int,
    out_dtype: int,
    threads: int,
    /,
) -> None: ...
