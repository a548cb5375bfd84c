// What stands between the Linears of an attention block while tokens are generated. Host only, as launch.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "args.h"

namespace qk::cuda {

// Where element 0 of (batch, head, token) lies, in elements from the first; the features of a head are contiguous.
struct HeadStrides {
  int64_t batch, head, token;
};

// Rotary embedding of queries and keys [batch, heads, tokens, size] in one launch, each operation rounded to the dtype:
//   y[i] = x[i] * cos[i] - x[i + size / 2] * sin[i]   for i < size / 2
//   y[i] = x[i] * cos[i] + x[i - size / 2] * sin[i]   for the others
// cos, sin: [batch or 1, tokens, size], contiguous features, `angles.head` unused.
struct RotaryArgs {
  DType dtype;
  int batch, heads, key_heads, tokens, size;
  const void *q, *k, *cos, *sin;
  void *q_out, *k_out;  // no part of what is read
  HeadStrides q_at, k_at, q_out_at, k_out_at, angles;
  bool dependent;  // the launch may overlap the end of the kernel before it
};

// softmax(scale * q k^T) v for few queries of a head: q [batch, heads, tokens, size], k and v [batch, key_heads,
// length, size], heads a multiple of key_heads; 16-bit floats. A query whose keys are all masked gets zeros.
struct AttentionArgs {
  DType dtype;  // bf16 or fp16
  int batch, heads, key_heads, tokens, size;
  int64_t length;  // keys
  const void *q, *k, *v;
  void* out;
  HeadStrides q_at, k_at, v_at, out_at;
  const uint8_t* mask;  // one byte per key, 0: not seen; or nullptr. Keys of a row are contiguous
  HeadStrides mask_at;
  float scale;
  int parts;  // CTAs that share the keys of one head
  int64_t part;  // keys of each, a multiple of kAttentionStep
  bool clustered;  // those CTAs are a cluster, and need nothing in memory; else, if parts > 1, as many as planned of:
  int32_t* counters;  // zero between launches, one for each head and 16 rows of queries
  float* partial;
  bool dependent;
};

constexpr int kAttentionRows = 16;  // queries of one CTA
constexpr int kAttentionStep = 64;  // keys of one step of a CTA

// How `length` keys are shared out. capability: 10 * major + minor.
struct AttentionPlan {
  int parts;
  int64_t part;
  int64_t counters, floats;  // what the launch needs of both; none of several parts: a cluster
};
AttentionPlan plan_attention(int batch, int heads, int key_heads, int tokens, int size, int64_t length, int capability,
                             int sms);

// Keys and values of new tokens [batch, heads, tokens, size] into caches [batch, heads, capacity, size], behind the
// `*length` tokens there are, which counts them. Bytes, whose meaning is the caller's; strides are in bytes too, and
// they and all addresses multiples of 16. More tokens than there is room for stop the kernel with an assertion.
struct AppendArgs {
  int batch, heads, tokens;
  int key_bytes, value_bytes;  // of a head's features
  const void *key, *value;
  void *keys, *values;
  HeadStrides key_at, value_at, keys_at, values_at;
  int64_t* length;  // on the device
  int64_t capacity;
  int32_t* counter;  // zero between launches
  bool dependent;
};

void rotary(const RotaryArgs& args, cudaStream_t stream);
void append(const AppendArgs& args, cudaStream_t stream);
// Throws std::invalid_argument for a size other than 64 and 128, and for fp32.
void attention(const AttentionArgs& args, cudaStream_t stream);

}  // namespace qk::cuda
