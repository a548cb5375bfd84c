// The last step of an epilogue: a row's columns go to y, through the caches or past them.
//
// A store through the caches reads the line first and evicts what the product is about to need. Past them, a full line
// goes to memory by itself, but whoever reads y next has to fetch it from there, so only outputs that L2 would not keep
// go that way.
#pragma once

#include <cstdint>

#include "../args.h"
#include "../layout.h"

namespace qk {
namespace {

// Bytes of y a thread. Of the 2 MiB of L2 of a core with AMX, a block of activations and a superblock's weights leave
// less than this.
constexpr int64_t kStreamedBytes = 1 << 20;

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline bool is_streamed(int64_t m, int64_t n, DType dtype, int threads) {
  return m * n * bytes_of(dtype) > kStreamedBytes * threads;
}

// Whether 32 columns from any multiple of 32 on are lines of their own in every row.
inline bool has_whole_lines(const void* y, DType dtype, int64_t stride) {
  return reinterpret_cast<uintptr_t>(y) % kAlign == 0 && stride * bytes_of(dtype) % kAlign == 0;
}

// Elements [at, at + width) of y; value(i, lanes) are those from at + i on. kStreams: pairs of vectors past the caches,
// which asks for whole lines and for V::stream_fence() before another thread may read them.
template <class V, DType D, bool kStreams, class Value>
QK_INLINE inline void store_row(void* y, int64_t at, int width, const Value& value) {
  constexpr int kW = V::kLanes;
  int i = 0;
  if constexpr (kStreams) {
    for (; i + 2 * kW <= width; i += 2 * kW) V::template stream<D>(y, at + i, value(i, kW), value(i + kW, kW));
  }
  for (; i < width; i += kW) {
    const int lanes = width - i < kW ? width - i : kW;
    if (lanes == kW)
      V::template store<D>(y, at + i, value(i, lanes));
    else
      V::template store_part<D>(y, at + i, value(i, lanes), lanes);
  }
}

}  // namespace
}  // namespace qk
