// Up to 16 tokens of 16 bits by many warps (kManyWarps in tile_w4_sm90.cuh): each works its slabs off one after the
// other, and what it waits for the others of its scheduler hide. So it holds nothing for the next slab, and its
// registers leave room for a second CTA: that of the next product, whose first slabs come while this one ends. Of 8
// tokens they are sixteen warps of 16 channels; of 16, eight of 32, since shared memory would limit warps that each
// read all tokens for 16 channels alone (one warp's 16 channels and 128 k: 1 KB of codes, and 4 KB of tokens).
//
// Neither loop finds anything out twice: what a slab needs lies a step further than it did for the one before, or, at
// the end of the ring of stages, that much less all of the ring. A producer's lane is alone in its warp and has no
// other to hide behind; with what the compiler would work out anew it took longer for a slab than all consumers.
#pragma once

#include "share_w4_sm90.cuh"
#include "tensor_map.h"

namespace qk::cuda {
namespace {

// Starts the copies of this producer's slabs from `slab` on, up to `last`; those of `ahead` stages are under way but
// for their tokens. Where each slab is a group.
template <typename S>
__device__ __forceinline__ void copy_slabs(const Job& job, const CUtensorMap& x_map, const PackedSource<S>& source,
                                           int slab, int last, int m0, const Ring& ring, uint32_t packed,
                                           uint32_t tokens, uint32_t full, uint64_t policy, int ahead, int until_next) {
  static_assert(S::kManyWarps && S::kStageBoxes == 2 && S::kCluster == 1, "two boxes of tokens, for this CTA alone");
  const GroupRows& r = job.groups;
  const uint32_t channels = ptx::keep(source.channels), bytes = ptx::keep(source.bytes);
  const uint32_t codes_bytes = ptx::keep(channels * S::kCodeBytes), scale_bytes = ptx::keep(channels * r.value_bytes);
  const uint32_t packed_bytes = ptx::keep(job.packed_bytes), stages = ptx::keep(job.stages);
  const uint8_t *codes = source.codes, *scale = source.scale, *second = source.second;
  uint32_t packed_to = ptx::keep(packed + ring.stage * packed_bytes);
  uint32_t tokens_to = ptx::keep(tokens + ring.stage * S::kTokenBytes);
  uint32_t full_at = ptx::keep(full + 8 * ring.stage), parity = ring.parity;
  const uint32_t full_end = ptx::keep(full + 8 * stages);
  int column = slab * S::kRowBytes;
#pragma unroll 1
  for (; slab < last; slab += S::kProducers) {
    if (ahead > 0) {
      --ahead;
    } else {
      ptx::mbarrier_wait(full_at + kEmptyFromFull, parity);
      ptx::mbarrier_arrive_expect_tx(full_at, bytes);
      if (channels > 0) {
        const uint32_t row = packed_to + S::kChannels * S::kCodeBytes;
        ptx::bulk_load(packed_to, codes, codes_bytes, full_at, policy);
        ptx::bulk_load(row, scale, scale_bytes, full_at, policy);
        if (S::kZeros && second) ptx::bulk_load(row + S::kChannels * r.value_bytes, second, channels, full_at, policy);
      }
      codes += source.step, scale += source.scale_step;
      if (S::kZeros) second += source.second_step;
    }
    load_tokens<S>(x_map, tokens_to, column, m0, full_at);
    column += S::kRowBytes * S::kProducers;
    packed_to += packed_bytes * S::kProducers, tokens_to += S::kTokenBytes * S::kProducers;
    full_at += 8 * S::kProducers;
    if (full_at >= full_end) {
      full_at -= 8 * stages, packed_to -= packed_bytes * stages, tokens_to -= S::kTokenBytes * stages;
      parity ^= 1;
    }
    if (--until_next == 0) ptx::grid_launch_dependents();
  }
}

// Adds this phase's slabs of a tile, whose groups have 1 << kShift rows, to the totals of each of the warp's blocks.
// packed: the codes of the first stage; tokens: its tokens, as ldmatrix is to be told of them. Products of a block and
// eight tokens are one chain, since other warps, and blocks, have products of their own.
template <typename S, int kShift>
__device__ __forceinline__ void multiply_slabs(const Job& job, const Thread& t, const uint8_t* packed, uint32_t tokens,
                                               uint32_t full, Sums<S> (&sums)[S::kBlocks]) {
  const uint32_t full_end = full + 8 * job.stages;
  // From this thread's codes of a slab to its scales; a register each for the two would be one too many.
  const uint32_t to_scales =
      ptx::keep(S::kChannels * S::kCodeBytes - t.codes + t.channel * static_cast<uint32_t>(job.groups.value_bytes));
  Thread at_scales = t;
  packed += t.phase * job.packed_bytes + t.codes, tokens += t.phase * S::kTokenBytes, full += t.phase * 8;
  uint32_t left = static_cast<uint32_t>(job.slabs - t.phase + S::kPhases - 1) / S::kPhases * 2;  // the parity in bit 0
#pragma unroll 1
  do {
    ptx::mbarrier_wait(full, left & 1);
    const auto add_row = [&](int row) {
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        at_scales.channel = block * kW4Rows;
        promote<S>(load_factors<S>(job, at_scales, packed + to_scales + row * job.groups.row_bytes), sums[block]);
      }
    };
    // Side by side where nothing stands between halves; else there would be registers for it in no instance.
#pragma unroll(kShift == 0 ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      uint4 codes[S::kBlocks];
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        codes[block] = reinterpret_cast<const uint4*>(packed + block * kW4BlockBytes)[half * 32];
      }
      uint32_t b[2][S::kTokens / 8][4];  // of 32 k, two steps
      const auto load_tokens = [&](int part) {
#pragma unroll
        for (int j = 0; j < S::kTokens / 8; ++j) {
          ptx::ldmatrix_x4(b[part][j], ((tokens + half * S::kTokens * 128) ^ part * 64) + j * 1024);
        }
      };
      if (S::kBlocks == 1) load_tokens(0), load_tokens(1);  // nothing else hides what they take
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (S::kBlocks > 1) load_tokens(part);
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
          if (kShift == 2 || (part == 0 && (kShift == 1 || half == 0))) {
#pragma unroll
            for (int i = 0; i < S::kValues; ++i) sums[block].part[i] = 0;
          }
          Thread of_block = t;
          of_block.channel += block * kW4Rows;
          const uint4& v = codes[block];
          uint32_t f[S::kFragments / 2];
          unpack_quarter<S, kShift>(job, of_block, packed - t.codes, {part ? v.z : v.x, part ? v.w : v.y}, nullptr,
                                    2 * half + part, f);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int j = 0; j < S::kTokens / 8; ++j) {
              const uint32_t* a = f + 4 * s;
              multiply_few(typename S::T(), sums[block].part + 4 * j, {a[0], a[1], a[2], a[3]}, b[part][j] + 2 * s);
            }
          }
        }
        if (kShift == 2) add_row(2 * half + part);
      }
      if (kShift == 1) add_row(half);
    }
    if (kShift == 0) add_row(0);
    __syncwarp();  // everybody has read the stage
    if (t.lane == 0) ptx::mbarrier_arrive(full + kEmptyFromFull);
    packed += job.packed_bytes * S::kPhases, tokens += S::kTokenBytes * S::kPhases, full += 8 * S::kPhases;
    if (full >= full_end) {
      full -= 8 * job.stages, packed -= job.packed_bytes * job.stages, tokens -= S::kTokenBytes * job.stages;
      left ^= 1;
    }
    left -= 2;
  } while (left > 1);
}

// All that a consumer does: its phase's slabs of the CTA's only tile, and its part of the outputs.
template <typename S>
__device__ __forceinline__ void work_off_slabs(const Job& job, const OnlyTile& tile, const uint8_t* packed,
                                               uint32_t tokens, uint32_t full, Terms<S>& terms) {
  const Thread t(S::kWarps, true, S::kBits, S::kBlocks);
  if (!job.follows) ptx::grid_dependency_wait();
  terms.start(job, tile.m0, tile.channels.first, Terms<S>::member(t.phase));
  Sums<S> sums[S::kBlocks];
#pragma unroll
  for (int i = 0; i < S::kBlocks * S::kValues; ++i) sums[i / S::kValues].total[i % S::kValues] = 0;
  if (t.warp * S::kWarpRows < tile.channels.count) {
    for_row_shift(job.groups, [&](auto shift) {
      multiply_slabs<S, decltype(shift)::value>(job, t, packed, tokens + t.matrix, full, sums);
    });
  }
  const int warp = ptx::thread_x() >> 5, phase = warp / S::kWarps;  // no register to keep them in
  const int row = warp % S::kWarps * S::kWarpRows;
  uint8_t* ring = const_cast<uint8_t*>(packed) - job.stages * S::kTokenBytes;
  float4* meeting = reinterpret_cast<float4*>(ring + job.meeting);
  float total[S::kBlocks][S::kPartTokens / 2];
  if (!gather<S>(meeting, job.meeting == 0, phase, sums, total) || row >= tile.channels.count) return;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    store_tile<S, S::kPartTokens>(job, tile.m0, tile.channels.first, row + block * kW4Rows, phase * S::kPartTokens,
                                  terms, total[block]);
  }
}

}  // namespace
}  // namespace qk::cuda
