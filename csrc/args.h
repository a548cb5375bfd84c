// Plain argument structs: what a kernel is told about one call. Only fixed-width types and pointers live here.
#pragma once

#include <cstdint>

namespace qk {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// How quantized values are stored. kInt4 holds two per byte, low nibble first, along the innermost dimension.
enum class QKind : int32_t { kInt8 = 0, kUint8 = 1, kInt4 = 2 };

// What is applied to y after the bias, before it is rounded to its dtype; see cpu/activation.h.
enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// What is added to y after the function, before it is rounded: rows [M, N] of y's dtype, or nothing.
struct ResidualArgs {
  const void* rows;  // nullptr: none
  int64_t stride;  // elements between rows
};

// Float activations x [M, K] and how they are quantized.
struct ActivationArgs {
  const void* x;
  DType x_dtype;
  int64_t x_stride;  // elements between rows
  bool symmetric;
  float scale;  // 0: dynamic, per token
  int32_t zero_point;  // static asymmetric only
  const float* inv_smooth;  // [K] or nullptr
};

// y [M, N] = epilogue(quantize(x [M, K]) @ weight [N, K]^T) + residual; see layout.h for the packed weight.
//
// Kernels take several of these that read the same rows (the projections of an attention block): the rows are quantized
// once, and the columns of all of them are shared out as if they were one. What concerns x, m, k, threads and scratch
// is read from the first.
struct LinearW8A8Args {
  // Weight.
  const int8_t* packed;
  const int32_t* colsum;  // [N] sum over k of weight[n, k]
  const float* weight_scale;  // [N]
  const float* bias;  // [N] or nullptr
  int64_t n, k;
  bool has_minus128;  // a weight of -128 occurs: AVX2's sign trick would be wrong for it
  Activation function;

  // Activations: float rows, or rows that are quantized already (xq, with their scales; act.x_stride is theirs).
  ActivationArgs act;
  const uint8_t* xq;  // int8 (symmetric) or uint8 (asymmetric); act.x is unused then
  const float* xq_scale;  // [M]
  const int32_t* xq_zero_point;  // [M] or nullptr
  int64_t m;

  void* y;
  DType y_dtype;
  int64_t y_stride;  // elements between rows
  ResidualArgs residual;

  int threads;
  uint8_t* scratch;  // kernel workspace of scratch_bytes
  int64_t scratch_bytes;
};

// How the scales of 4-bit groups are stored.
enum class ScaleType : int32_t { kF32 = 0, kF16 = 2 };

// y [M, N]: int4 weights in groups along K; see layout.h. With a = q_x - zero_point_x, per group g in order:
//   d = sum(a * q) - zero_point * sum(a)   (int32);   total += float(d) * scale_w[g];   total += min[g] * float(sum(a))
// then y = function(total * scale_x + bias) + residual. zero_point is 8 where there is neither a zero point nor a
// minimum. With multipliers instead of scales of groups the total is an integer, as that of 8-bit weights:
//   total += multiplier[g] * d;   y = function(float(total) * scale_x * scale_w + bias) + residual
struct LinearW4A8Args {
  const uint8_t* packed;
  const void* weight_scale;  // packed groups; with multipliers one fp32 value for each channel
  const uint8_t* weight_multiplier;  // packed groups or nullptr; multiplier * (q - zero_point) is a signed byte
  const uint8_t* weight_zero_point;  // packed groups or nullptr
  const void* weight_min;  // packed groups or nullptr, of scale_type
  ScaleType scale_type;
  const float* bias;  // [N] or nullptr
  int64_t n, k, group_size;  // group_size is a multiple of 8, or at least k
  Activation function;

  ActivationArgs act;
  int64_t m;
  void* y;
  DType y_dtype;
  int64_t y_stride;
  ResidualArgs residual;

  int threads;
  uint8_t* scratch;
};

// Weight-only Linear: y [M, N] = function(x [M, K] @ w [N, K]^T + bias) + residual, x and sums in floating point. One
// struct for both widths.
//
//   W8:  w[n, k] = scale[n] * q
//   W4:  w[n, k] = scale[n, g] * (q - zero_point[n, g])         zero_point absent: 8
//                  scale[n, g] * q + minimum[n, g]              with a minimum
//                  scale[n, g] * codebook[q]                    with a codebook;  g = k / group_size
struct LinearWxA16Args {
  const uint8_t* packed;  // layout.h: W8 or W4
  const void* weight_scale;  // W8: fp32 [N]; W4: packed groups of scale_type
  ScaleType scale_type;
  const uint8_t* weight_zero_point;  // W4: packed groups or nullptr
  const void* weight_min;  // W4: packed groups or nullptr, of scale_type
  const float* codebook;  // W4: [16] or nullptr
  const float* bias;  // [N] or nullptr
  const float* inv_smooth;  // [K], multiplied into x first, or nullptr
  Activation function;
  int64_t n, k, group_size;  // W4: group_size is a multiple of 8, or at least k

  const void* x;
  DType x_dtype;
  int64_t m, x_stride;  // elements between rows
  void* y;
  DType y_dtype;
  int64_t y_stride;  // elements between rows
  ResidualArgs residual;

  int threads;
  uint8_t* scratch;  // kernel workspace
};

// x seen as [outer, channels, inner], contiguous. One granule a channel, taken over outer and inner. With group > 0:
// outer is 1, channels are rows, and each row has ceil(inner / group) granules along inner. Zero points are those of
// the stored codes: within -128..127 for kInt8. Codes around zero in kUint8 are stored as 1..255.
struct QuantizeArgs {
  const void* x;
  DType x_dtype;
  int64_t outer, channels, inner, group;
  void* q;
  QKind kind;
  float* scale;  // [granules]; input when is_static, but for granules with NaN or Inf, whose scale becomes NaN
  int32_t* zero_point;  // [granules], or nullptr when symmetric; input when is_static
  bool symmetric, is_static;
  int threads;
};

// out [count, K] = scale[id] * table[id]: rows of an int8 table [N, K], canonical or packed as a W8 weight (layout.h).
struct EmbeddingArgs {
  const int8_t* table;
  bool packed;
  int64_t n, k;
  const float* scale;  // [N]
  const int64_t* ids;  // [count], each in [0, N)
  int64_t count;
  void* out;
  DType out_dtype;
  int threads;
};

// y [count] = function(x [count]), both contiguous.
struct ActivationFunctionArgs {
  const void* x;
  DType x_dtype;
  void* y;
  DType y_dtype;
  int64_t count;
  Activation function;
  int threads;
};

// y [M, K] = the layer norm or RMS norm of each row of x [M, K], of one dtype, y contiguous; see cpu/norm_impl.h.
struct NormArgs {
  const void* x;
  DType dtype;
  int64_t m, k, x_stride;  // elements between rows
  bool layer;
  float eps;
  const void* weight;  // [K] of dtype, or nullptr: ones
  const void* bias;  // [K] of dtype, or nullptr
  void* y;
  int threads;
};

// What a mask of attention says of a key: nothing; a byte that is not zero where the query sees it; a number of the
// queries' dtype that is added to the score.
enum class MaskKind : int32_t { kNone = 0, kBool = 1, kAdded = 2 };

// Elements from one index to the next; 0 where all share one.
struct AttentionSteps {
  int64_t batch, head, token;
};

// y [B, T, H, D] = softmax(scale * q k^T + mask) v over the keys a query sees, zeros where it sees none: q [B, H, T,
// D], k and v [B, G, L, D], mask [B, H, T, L], each with elements side by side in the last dimension; y contiguous. H
// is a multiple of G: neighbouring heads of queries share a head of keys. Causal: query t sees keys up to t.
struct AttentionArgs {
  const void *q, *k, *v, *mask;
  void* y;
  DType dtype;
  MaskKind mask_kind;
  int64_t batch, heads, key_heads, queries, keys, size;
  AttentionSteps q_step, k_step, v_step, mask_step;
  float scale;
  bool causal;
  int threads;
  uint8_t* scratch;  // kernel workspace
};

// Rotary embedding of q [B, H, T, D] and k [B, G, T, D], each operation rounded to the dtype:
//   y[i] = x[i] * cos[i] - x[i + D / 2] * sin[i]   for i < D / 2
//   y[i] = x[i] * cos[i] + x[i - D / 2] * sin[i]   for the others
// cos, sin: [B or 1, T, D], features side by side as in q and k; angle_step.head unused. Outputs lie [B, T, H or G, D]
// in memory of their own.
struct RotaryArgs {
  const void *q, *k, *cos, *sin;
  void *q_out, *k_out;
  DType dtype;
  int64_t batch, heads, key_heads, tokens, size;
  AttentionSteps q_step, k_step, angle_step;
  int threads;
};

struct DequantizeArgs {
  const void* q;
  QKind kind;
  int64_t outer, channels, inner, group;
  const float* scale;
  const int32_t* zero_point;  // nullptr: 0
  void* out;
  DType out_dtype;
  int threads;
};

}  // namespace qk
