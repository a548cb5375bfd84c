// How a tile of gemm_w4_sm90.cuh ends: the meeting of phases and of clusters that share it, and the way out.
#pragma once

#include "copies_w4_sm90.cuh"

namespace qk::cuda {
namespace {

// What sets the totals right where activations have zero points, which takes one sum over all K.
template <int kTokens, int kWidth>
struct ShiftTerms {
  alignas(8) int32_t zero[kTokens];  // of tokens
  int32_t colsum[kWidth];
};
struct NoShiftTerms {};

// What the outputs of a tile are multiplied by and added to: on its way from memory while the products run, since each
// read at their end would take as long as half a slab. One for each group of 64 channels.
template <typename S>
struct Terms : std::conditional<S::kMultiplier, ShiftTerms<S::kTokens, S::kChannels / S::kGroups>, NoShiftTerms>::type {
  static constexpr int kWidth = S::kChannels / S::kGroups;
  static constexpr int kOfPhase = S::kPhaseThreads / S::kGroups, kThreads = kOfPhase * S::kPhases;
  alignas(8) float x_scale[S::kBytes ? S::kTokens : 1];
  float scale[S::kOneSum ? kWidth : 1], bias[kWidth];

  // This thread's number among those of its channels, of all phases.
  static __device__ __forceinline__ int member(int phase) {
    const int thread = static_cast<int>(threadIdx.x);
    return S::kGroups == 1 ? thread % kThreads : phase * kOfPhase + thread % kOfPhase;
  }

  // Starts the copies for the tile that begins at token m0 and, for this group, at channel n0. What does not exist gets
  // what others have.
  __device__ __forceinline__ void start(const Job& job, int m0, int n0, int member) {
    const Epilogue& e = job.e;
    const auto copy = [&](auto* to, const auto* from, int first, int count, int end) {
#pragma unroll
      for (int i = member; i < count; i += kThreads) {
        ptx::cp_async_4(ptx::smem_u32(to + i), from + min(first + i, end - 1));
      }
    };
    if constexpr (S::kBytes) copy(x_scale, e.x_scale, m0, S::kTokens, e.m);
    if constexpr (S::kOneSum) copy(scale, e.weight_scale, n0, kWidth, e.n);
    if (e.bias) copy(bias, e.bias, n0, kWidth, e.n);
    if constexpr (S::kMultiplier) {
      if (e.x_zero_point) {
        copy(this->zero, e.x_zero_point, m0, S::kTokens, e.m);
        copy(this->colsum, e.colsum, n0, kWidth, e.n);
      }
    }
  }
};

// The running totals of a tile on their way from one phase to the next: integers are to be added in the order of K.
// They lie in one place, [quad][thread] float4, and go in pieces, so that the next phase adds to the first ones while
// this one is at the others.
template <typename S>
struct Relay {
  static constexpr int kPieceQuads = S::kQuads <= 4 ? S::kQuads : S::kQuads / 2;
  static constexpr int kPieces = S::kQuads / kPieceQuads;
  static_assert(!S::kRelays || kPhaseBarrier + S::kPhases * kPieces <= kGatherBarrier, "named barriers");
  float4* own;  // of this thread's outputs
  __device__ __forceinline__ explicit Relay(float4* exchange) : own(exchange + threadIdx.x % S::kPhaseThreads) {}
  static __device__ __forceinline__ int barrier(int phase, int piece) {
    return kPhaseBarrier + phase * kPieces + piece;
  }

  // Zeros, to phase 0.
  __device__ __forceinline__ void start() const {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) own[q * S::kPhaseThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) ptx::named_barrier_arrive(barrier(0, piece), 2 * S::kPhaseThreads);
  }

  // Adds what comes of one row of a slab's scales: receives with the first, sends with the last one, but not after the
  // last slab.
  __device__ __forceinline__ void add(int phase, bool first_row, bool last_row, bool last_slab,
                                      const float (&step)[S::kValues], Sums<S>& sums) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first_row) ptx::named_barrier(barrier(phase, piece), 2 * S::kPhaseThreads);
      const int q0 = piece * kPieceQuads;
      if (first_row || !S::kHoldsTotal) {
#pragma unroll
        for (int q = q0; q < q0 + kPieceQuads; ++q) {
          const float4 v = own[q * S::kPhaseThreads];
          float* d = sums.total + 4 * q;
          d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
        }
      }
#pragma unroll
      for (int i = 4 * q0; i < 4 * (q0 + kPieceQuads); ++i) sums.total[i] = __fadd_rn(sums.total[i], step[i]);
      if (last_row || !S::kHoldsTotal) {
#pragma unroll
        for (int q = q0; q < q0 + kPieceQuads; ++q) {
          const float* d = sums.total + 4 * q;
          own[q * S::kPhaseThreads] = make_float4(d[0], d[1], d[2], d[3]);
        }
      }
      if (last_row && !last_slab) {
        ptx::named_barrier_arrive(barrier((phase + 1) % S::kPhases, piece), 2 * S::kPhaseThreads);
      }
    }
  }
};

// Totals of either type as four words that memory holds, and such words added to totals.
__device__ __forceinline__ float4 four_of(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ float4 four_of(const int32_t* v) {
  return make_float4(__int_as_float(v[0]), __int_as_float(v[1]), __int_as_float(v[2]), __int_as_float(v[3]));
}
__device__ __forceinline__ void add_four(float* d, float4 v) {
  d[0] = __fadd_rn(d[0], v.x), d[1] = __fadd_rn(d[1], v.y);
  d[2] = __fadd_rn(d[2], v.z), d[3] = __fadd_rn(d[3], v.w);
}
__device__ __forceinline__ void add_four(int32_t* d, float4 v) {
  d[0] += __float_as_int(v.x), d[1] += __float_as_int(v.y);
  d[2] += __float_as_int(v.z), d[3] += __float_as_int(v.w);
}
__device__ __forceinline__ void take_four(float* d, float4 v) { d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w; }
__device__ __forceinline__ void take_four(int32_t* d, float4 v) {
  d[0] = __float_as_int(v.x), d[1] = __float_as_int(v.y), d[2] = __float_as_int(v.z), d[3] = __float_as_int(v.w);
}

// The totals of the tokens kPartTokens * phase ... of a tile whose phases are through; but for a relay's, everybody's
// are added up, floats in the order of the phases. in_ring: they meet in the stages. False: no part is left for this
// phase.
template <typename S>
__device__ __forceinline__ bool gather(float4* exchange, bool in_ring, int phase, const Sums<S> (&sums)[S::kBlocks],
                                       typename S::Total (&total)[S::kBlocks][S::kPartTokens / 2]) {
  constexpr int kPartQuads = S::kPartTokens / 8;
  const auto place = [&](int of, int block, int q) {
    return exchange + ((of * S::kBlocks + block) * S::kQuads + q) * S::kPhaseThreads + threadIdx.x % S::kPhaseThreads;
  };
  if constexpr (S::kGathers) {
    if (in_ring) ptx::named_barrier(kGatherBarrier, S::kConsumers);  // nobody reads a stage any more
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
      for (int q = 0; q < S::kQuads; ++q) *place(phase, block, q) = four_of(sums[block].total + 4 * q);
    }
  }
  ptx::cp_async_wait_all();
  ptx::named_barrier(kGatherBarrier, S::kConsumers);  // everybody's sums, and the terms
  if (phase >= S::kParts) return false;
#pragma unroll
  for (int p = 0; p < (S::kGathers ? S::kPhases : 1); ++p) {
#pragma unroll
    for (int i = 0; i < S::kBlocks * kPartQuads; ++i) {
      const int block = i / kPartQuads, q = i % kPartQuads;
      const float4 v = *place(p, block, phase * kPartQuads + q);
      if (p == 0) {
        take_four(total[block] + 4 * q, v);
      } else {
        add_four(total[block] + 4 * q, v);
      }
    }
  }
  return true;
}

// How many clusters, those behind this one, have the rest of a tile that it has begun.
__device__ __forceinline__ int helpers_of(const Job& job, const Segment& s, int cluster) {
  if (s.first > 0 || s.last == job.slabs || s.last == 0) return 0;
  return owner_of(job, (s.tile - job.whole + 1) * job.slabs - 1) - cluster;
}

// A tile that clusters share belongs to the one that has its first slabs, as the last thing it does. The others, which
// begin with theirs, leave their totals in memory when they are through, long before as a rule, and raise a flag; the
// owner's producers fetch them into the ring of stages behind its last slabs. There is a place and a flag for each
// warpgroup, since no cluster leaves more than one tile's totals.
template <typename S>
struct Handover {
  static constexpr int kBytes = 64 * S::kTokens * 4;  // of a warpgroup, [quad][thread] float4
  static constexpr int kPieces = kBytes / S::kTokenBytes;  // stages that they fill
  static_assert(!S::kShares || kPieces * S::kTokenBytes == kBytes, "whole stages");
  static_assert(!S::kShares || kPieces == 1 || S::kProducers == 1, "who fetches the last piece takes the flag down");
  static constexpr int kStages = 2 * kPieces;  // of a helper
  static constexpr int kPieceQuads = S::kQuads / kPieces;

  static __device__ __forceinline__ int place(int cluster, int rank, int group) {
    return (cluster * S::kCluster + rank) * 2 + group;
  }
  static __device__ __forceinline__ float* sums_at(const Job& job, int place) {
    return job.partials + int64_t(place) * (kBytes / 4);
  }

  // By a warpgroup of a helper. A release takes as long as a slab: a warp that has nothing else to do raises the flags
  // where there is one.
  static __device__ __forceinline__ void leave(const Job& job, int cluster, int rank, const Sums<S>& sums) {
    const int group = threadIdx.x >> 7, member = threadIdx.x & 127, here = place(cluster, rank, group);
    float4* to = reinterpret_cast<float4*>(sums_at(job, here)) + member;
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) __stcg(to + q * 128, four_of(sums.total + 4 * q));
    if constexpr (S::kSpareWarps) {
      ptx::named_barrier_arrive(kLeaveBarrier, S::kConsumers + 32);
    } else {
      ptx::named_barrier(1 + group, 128);
      if (member == 0) ptx::store_release(job.counters + here, 1);
    }
  }
  // By that warp.
  static __device__ __forceinline__ void raise_flags(const Job& job, int cluster, int rank) {
    const int begin = begin_of(job, cluster);
    if (begin == begin_of(job, cluster + 1) || begin % job.slabs == 0) return;  // begins no tile in its middle
    ptx::named_barrier(kLeaveBarrier, S::kConsumers + 32);
    const int lane = threadIdx.x & 31;
    if (lane < 2) ptx::store_release(job.counters + place(cluster, rank, lane), 1);
  }

  // By the owner's producer: starts the copy of what the stage `number` behind the last slab is for.
  static __device__ __forceinline__ void fetch(const Job& job, int cluster, int rank, int number, uint32_t to,
                                               uint32_t bar) {
    const int piece = number % kPieces, there = place(cluster + 1 + number / kStages, rank, number / kPieces % 2);
    while (ptx::load_acquire(job.counters + there) == 0) {
    }
    ptx::fence_proxy_async_global();
    ptx::mbarrier_arrive_expect_tx(bar, S::kTokenBytes);
    ptx::bulk_load(to, sums_at(job, there) + piece * (S::kTokenBytes / 4), S::kTokenBytes, bar, ptx::kEvictFirst);
    if (piece == kPieces - 1) job.counters[there] = 0;
  }
  // Those of `stages` behind the last slab that are this producer's, the first one `skip` behind it.
  static __device__ __forceinline__ void fetch_all(const Job& job, int cluster, int rank, int skip, int stages,
                                                   uint32_t tokens, uint32_t full, uint32_t empty, Ring& ring) {
#pragma unroll 1
    for (int i = skip; i < stages; i += S::kProducers) {
      ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity);
      fetch(job, cluster, rank, i, tokens + ring.stage * S::kTokenBytes, full + 8 * ring.stage);
      ring.advance(job.stages, S::kProducers);
    }
  }

  // By a warpgroup of the owner: adds what the stage `number` of a helper holds, if it is this warpgroup's.
  static __device__ __forceinline__ void add(int number, const uint8_t* stage, Sums<S>& sums) {
    const int group = threadIdx.x >> 7, member = threadIdx.x & 127, piece = number % kPieces;
    if (number / kPieces != group) return;
    const float4* from = reinterpret_cast<const float4*>(stage) + member;
#pragma unroll
    for (int q = 0; q < kPieceQuads; ++q) add_four(sums.total + 4 * (piece * kPieceQuads + q), from[q * 128]);
  }
  // The same of all helpers, in the order of K.
  template <typename Release>
  static __device__ __forceinline__ void add_all(int helpers, const Job& job, const uint8_t* tokens, uint32_t full,
                                                 Ring& ring, const Release& release, Sums<S>& sums) {
#pragma unroll 1
    for (; helpers > 0; --helpers) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity);
        add(i, tokens + ring.stage * S::kTokenBytes, sums);
        release(ring.stage);
        ring.advance(job.stages);
      }
    }
  }
};

// Totals of kTokens tokens, and of a block of kW4Rows channels, of the tile that begins at token m0 and channel n0:
// from `first` and `first_row` on. They lose what the shift of activations with zero points added to them.
template <typename S, int kTokens>
__device__ __forceinline__ void store_tile(const Job& job, int m0, int n0, int first_row, int first,
                                           const Terms<S>& terms, typename S::Total (&total)[kTokens / 2]) {
  const int lane = threadIdx.x & 31;
  const Epilogue& e = job.e;
  // The first of two channels, the other is 8 further.
  const int channel = first_row % Terms<S>::kWidth + (lane >> 2), token = first + 2 * (lane & 3);
  const float low = e.bias ? terms.bias[channel] : -0.0f, high = e.bias ? terms.bias[channel + 8] : -0.0f;
  [[maybe_unused]] float low_scale, high_scale;
  if constexpr (S::kOneSum) low_scale = terms.scale[channel], high_scale = terms.scale[channel + 8];
  if constexpr (S::kMultiplier) {
    if (e.x_zero_point) {
      const int32_t low_sum = terms.colsum[channel], high_sum = terms.colsum[channel + 8];
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const int2 zero = *reinterpret_cast<const int2*>(terms.zero + token + 8 * j);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          total[4 * j + c] -= ((c & 1 ? zero.y : zero.x) - kZeroShift) * (c < 2 ? low_sum : high_sum);
        }
      }
    }
  }
  store_blocks<kTokens / 8>(e, n0 + first_row, m0 + first, lane, [&](int j, float (&v)[4]) {
    [[maybe_unused]] float2 x_scale;
    if constexpr (S::kBytes) x_scale = *reinterpret_cast<const float2*>(terms.x_scale + token + 8 * j);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float y = static_cast<float>(total[4 * j + c]);  // to nearest
      if constexpr (S::kBytes) y = __fmul_rn(y, c & 1 ? x_scale.y : x_scale.x);
      if constexpr (S::kOneSum) y = __fmul_rn(y, c < 2 ? low_scale : high_scale);
      if constexpr (S::kBits == 8) y *= OffsetBytes<typename S::T>::kUnit;  // last, where nothing overflows early
      v[c] = __fadd_rn(y, c < 2 ? low : high);
    }
  });
}

}  // namespace
}  // namespace qk::cuda
