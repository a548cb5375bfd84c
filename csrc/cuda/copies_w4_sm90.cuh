// What producers of gemm_w4_sm90.cuh do: a tile's codes and group values on their way to a ring of stages.
#pragma once

#include "tensor_map.h"
#include "tile_w4_sm90.cuh"

namespace qk::cuda {
namespace {

// Where the producer finds a tile's codes and group values: worked out once for each run of slabs, since one lane
// starts all copies of a CTA, and what it computes for each delays them.
template <typename S>
struct PackedSource {
  const uint8_t *codes, *scale, *second;  // of the next slab; of group 0; minima or zero points, or nullptr
  int64_t step;  // bytes from one slab's codes to those of this producer's next one
  int64_t scale_step, second_step;  // kManyWarps, where each slab is a group: the same, and scale is of the next slab
  uint32_t channels;  // of the tile that are stored; the others keep what the stage held, and what they give is dropped
  uint32_t bytes;  // of a slab, and of tokens of a stage

  __device__ __forceinline__ PackedSource(const Job& job, Channels tile, int slab) {
    const int channel0 = tile.first;
    const W4Weight& w = job.weight;
    const GroupRows& r = job.groups;
    channels = static_cast<uint32_t>(max(0, min(tile.count, r.width - channel0)));
    step = job.slab_bytes * S::kProducers;
    codes = w.packed + slab * job.slab_bytes + int64_t(channel0) * S::kCodeBytes;
    scale = static_cast<const uint8_t*>(w.scale) + int64_t(channel0) * r.value_bytes;
    second = S::kMinimum                 ? static_cast<const uint8_t*>(w.minimum) + int64_t(channel0) * r.value_bytes
             : S::kZeros && w.zero_point ? w.zero_point + channel0
                                         : nullptr;
    if constexpr (S::kManyWarps) {
      scale_step = r.steps * kW4GroupStep == kW4SlabK ? int64_t(r.pitch) * r.value_bytes : 0;
      second_step = second && scale_step > 0 ? r.pitch : 0;
      scale += slab * scale_step;
      if (second) second += slab * second_step;
      scale_step *= S::kProducers, second_step *= S::kProducers;
    }
    const uint32_t row_bytes = r.value_bytes + (second ? second_bytes(r) : 0);
    bytes = token_bytes(job) + channels * (S::kCodeBytes + (S::kBits == 4 ? row_bytes << r.row_shift : 0));
  }
  static __device__ __forceinline__ uint32_t token_bytes(const Job& job) {
    return job.box_rows * S::kCluster * S::kStageBoxes * 128;
  }
  static __device__ __forceinline__ uint32_t second_bytes(const GroupRows& r) {
    return S::kMinimum ? r.value_bytes : 1;
  }

  // Starts the copies of the next slab, which is `slab`, but for its tokens; `bar` expects those as well.
  __device__ __forceinline__ void load(const Job& job, int slab, uint32_t target, uint32_t bar, uint64_t policy) {
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    if (channels == 0) return;
    ptx::bulk_load(target, codes, channels * S::kCodeBytes, bar, policy);
    codes += step;
    if constexpr (S::kBits == 8) return;
    const GroupRows& r = job.groups;
    uint32_t row = target + S::kChannels * S::kCodeBytes;
    if constexpr (S::kManyWarps) {
      if (scale_step > 0) {
        ptx::bulk_load(row, scale, channels * r.value_bytes, bar, policy);
        if (S::kZeros && second) ptx::bulk_load(row + S::kChannels * r.value_bytes, second, channels, bar, policy);
        scale += scale_step, second += second_step;
        return;
      }
    }
    int k = slab * kW4SlabK;
#pragma unroll 1
    for (int p = 0; p < 1 << r.row_shift; ++p, row += r.row_bytes, k += kW4SlabK >> r.row_shift) {
      const uint32_t at = group_of(r, min(k, job.weight.k - 1)) * static_cast<uint32_t>(r.pitch);
      ptx::bulk_load(row, scale + at * r.value_bytes, channels * r.value_bytes, bar, ptx::kEvictNormal);
      if ((S::kMinimum || S::kZeros) && second) {
        ptx::bulk_load(row + S::kChannels * r.value_bytes, second + at * second_bytes(r), channels * second_bytes(r),
                       bar, ptx::kEvictNormal);
      }
    }
  }
};

// Of halves: where the next slab's codes are.
template <typename S>
__device__ __forceinline__ int next_codes(int codes) {
  return codes + 1 == S::kCodeStages ? 0 : codes + 1;
}

// The tokens from m0 on and the bytes from `column` on of a stage, for this CTA or for all of its cluster.
template <typename S>
__device__ __forceinline__ void load_tokens(const CUtensorMap& x_map, uint32_t target, int column, int m0,
                                            uint32_t bar) {
#pragma unroll
  for (int b = 0; b < S::kStageBoxes; ++b) {
    const uint32_t box = target + b * S::kTokens * 128;
    if constexpr (S::kCluster > 1) {
      ptx::tensor_load_2d_multicast(box, &x_map, column + b * 128, m0, bar, (1 << S::kCluster) - 1, ptx::kEvictNormal);
    } else {
      ptx::tensor_load_2d(box, &x_map, column + b * 128, m0, bar, ptx::kEvictNormal);
    }
  }
}

// The place in the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages, int by = 1) {
    if ((stage += by) >= stages) stage -= stages, parity ^= 1;
  }
};

// While a producer fills the ring for the first time, before the tokens of a stage: waits until its stage before is
// here. All CTAs begin with the same tokens as soon as the kernel before has ended; had they asked for a whole ring of
// them at once, some would get their first stage behind what others need much later, and their tiles would end last (64
// rows of 4096 x 14336 on an H200: first stages 0.6 to 2.2 us after the kernel before, 17.9 us a product, 17.5 so). Few
// tokens are soon here.
template <typename S>
__device__ __forceinline__ void wait_for_stage_before(const Ring& ring, uint32_t full) {
  if (!S::kFew && ring.stage >= S::kProducers) ptx::mbarrier_wait(full + 8 * (ring.stage - S::kProducers), 0);
}

}  // namespace
}  // namespace qk::cuda
