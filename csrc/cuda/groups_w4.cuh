// Scales, zero points and minima of 4-bit groups on their way through shared memory, for tiles of channels and slabs of
// 128 k. A slab has 1, 2 or 4 rows of them, one per 128, 64 or 32 k, whichever a group is a multiple of:
//
//     row p:  scale [channels] | minimum [channels] | zero point [channels]      each as it is stored
#pragma once

#include <type_traits>

#include "numeric.cuh"
#include "ptx.cuh"
#include "w4.h"

namespace qk::cuda {

// What the host works out about a weight's groups.
struct GroupRows {
  int32_t row_shift;  // a slab has 1 << row_shift rows
  uint32_t steps, magic;  // kW4GroupStep steps of a group; magic divides by it, 0: a single group
  int32_t pitch;  // values from one stored row to the next
  int32_t width;  // values of a stored row that are this weight's
  int32_t value_bytes, row_bytes;  // of a scale, of all values of a row in shared memory
};

inline GroupRows make_group_rows(const W4Weight& w, int channels) {
  GroupRows r = {};
  const bool single = w.group >= w.k;
  r.row_shift = single || w.group % 128 == 0 ? 0 : w.group % 64 == 0 ? 1 : 2;
  r.steps = static_cast<uint32_t>(single ? 0 : w.group / kW4GroupStep);
  // Exact below 2^32 / steps, and K / 32 times the steps of a group is less than that for K up to 2^18.
  r.magic = single || r.steps == 1 ? 0 : static_cast<uint32_t>(((uint64_t(1) << 32) + r.steps - 1) / r.steps);
  r.pitch = w.blocks * kW4Rows;
  r.width = static_cast<int32_t>(w4_blocks(w.n) * kW4Rows);
  r.value_bytes = w.scale_type == ScaleType::kF32 ? 4 : 2;
  r.row_bytes = channels * (r.value_bytes * (w.minimum ? 2 : 1) + (w.zero_point ? 1 : 0));
  return r;
}

// run(std::integral_constant<int, row_shift>()).
template <typename Run>
__device__ __forceinline__ void for_row_shift(const GroupRows& r, const Run& run) {
  if (r.row_shift == 0) {
    run(std::integral_constant<int, 0>());
  } else if (r.row_shift == 1) {
    run(std::integral_constant<int, 1>());
  } else {
    run(std::integral_constant<int, 2>());
  }
}

// The group that holds k, a multiple of kW4GroupStep.
__device__ __forceinline__ uint32_t group_of(const GroupRows& r, uint32_t k) {
  const uint32_t step = k / kW4GroupStep;
  return r.steps == 1 ? step : __umulhi(step, r.magic);
}

// What one thread copies of the rows of every slab, at most kPieces pieces of 16 bytes.
template <int kChannels, int kThreads>
struct GroupCopies {
  static constexpr int kPieces = (4 * kChannels * 8 / 16 + kThreads - 1) / kThreads;
  struct Piece {
    const uint8_t* source;  // of group 0 and tile 0; nullptr: none
    int32_t k, channel;  // from the beginning of slab and tile
    int32_t shift;  // log2 of the bytes of a value
  } pieces[kPieces];

  __device__ __forceinline__ GroupCopies(const W4Weight& w, const GroupRows& r) {
    const int value_chunks = kChannels * r.value_bytes / 16, per_row = r.row_bytes / 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = i * kThreads + threadIdx.x;  // a division would take longer than the first copies
      const int row = (at >= per_row) + (at >= 2 * per_row) + (at >= 3 * per_row) + (at >= 4 * per_row);
      int chunk = at - row * per_row;
      Piece& p = pieces[i];
      p.source = row >> r.row_shift ? nullptr : static_cast<const uint8_t*>(w.scale);
      p.k = row * (kW4SlabK >> r.row_shift), p.shift = r.value_bytes == 4 ? 2 : 1;
      if (chunk >= value_chunks && p.source) {
        chunk -= value_chunks;
        p.source = w.minimum ? static_cast<const uint8_t*>(w.minimum) : w.zero_point;
        if (!w.minimum) p.shift = 0;
      }
      p.channel = (chunk * 16) >> p.shift;
    }
  }

  // Starts the copies of the rows of slab `slab` for the channels from n0 on; channels that do not exist get the values
  // of others.
  __device__ __forceinline__ void start(const W4Weight& w, const GroupRows& r, uint32_t target, int slab,
                                        int n0) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Piece& p = pieces[i];
      if (p.source == nullptr) break;
      const uint32_t group = group_of(r, static_cast<uint32_t>(min(slab * kW4SlabK + p.k, w.k - 1)));
      const uint32_t index = group * static_cast<uint32_t>(r.pitch) + min(n0 + p.channel, r.width - (16 >> p.shift));
      ptx::cp_async_16(target + (i * kThreads + threadIdx.x) * 16, p.source + (int64_t(index) << p.shift), 16);
    }
  }
};

// A value of a group in global memory.
__device__ __forceinline__ float group_value(const void* values, ScaleType type, int64_t at) {
  return type == ScaleType::kF32 ? __ldg(static_cast<const float*>(values) + at)
                                 : __half2float(__ldg(static_cast<const __half*>(values) + at));
}

// A value of a row in shared memory; `base` is where its scales, or its minima, begin.
__device__ __forceinline__ float row_value(const uint8_t* base, ScaleType type, int channel) {
  return type == ScaleType::kF32 ? reinterpret_cast<const float*>(base)[channel]
                                 : __half2float(reinterpret_cast<const __half*>(base)[channel]);
}

}  // namespace qk::cuda
