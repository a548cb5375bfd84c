// What consumers of gemm_w4_sm90.cuh do with a tile: codes to fragments, products, sums times scales. Its end is in
// share_w4_sm90.cuh.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "groups_w4.cuh"
#include "launch_w4.h"
#include "operands_w4a16.cuh"
#include "operands_w4a8.cuh"
#include "wgmma.cuh"
#include "work_w4_sm90.cuh"

namespace qk::cuda {
namespace {

constexpr int kAlignment = 1024;
constexpr int kMostStages = 24;
constexpr int kLead = 24;  // slabs that a CTA of kManyWarps has yet to ask for when the next kernel may begin
constexpr uint32_t kEmptyFromFull = 8 * kMostStages;  // bytes from a stage's barrier of one kind to the other

// Named barriers: 1 and 2 are the warpgroups' own, 3 and 4 their turns, 5 where they leave sums to others; or from 1 on
// those between phases, and that of all of them.
constexpr int kTurnBarrier = 3, kLeaveBarrier = 5, kPhaseBarrier = 1, kGatherBarrier = 15;

// kZeros_: zero points are read, where there are any, and scales may be of fp32. Else zero points are 8, and scales
// fp16 unless there are minima or a codebook.
// kPhases_: groups of warps that take the slabs of a tile in turns (gemm_w4_sm90.cuh).
// kBits_: of a code. Bytes are multiplied by 16-bit activations; they lie in K slabs (w8a8.h), their scales are of
// channels.
// kOnePerSm_: the launch has no more CTAs than there are multiprocessors.
template <typename T_, int kTokens_, W4Kind kKind_, bool kZeros_, int kCluster_, int kPhases_, int kBits_ = 4,
          bool kOnePerSm_ = false>
struct Shape {
  using T = T_;
  static constexpr bool kBytes = std::is_same<T, int8_t>::value;
  using Sum = typename std::conditional<kBytes, int32_t, float>::type;
  static constexpr int kTokens = kTokens_, kCluster = kCluster_;
  static constexpr W4Kind kKind = kKind_;
  static constexpr bool kMinimum = kKind == W4Kind::kMinimum, kCodebook = kKind == W4Kind::kCodebook;
  static constexpr bool kMultiplier = kKind == W4Kind::kMultiplier;
  static constexpr bool kZeros = kZeros_;
  // By mma.sync: wgmma's products wait 90 cycles for one another, and few tokens hide nothing of it.
  static constexpr bool kFew = kTokens <= 16;
  // Room for one set of sums alone: they are of all of K, in units of the scale that they are multiplied by next.
  static constexpr bool kWide = kTokens > 128 && kBits_ == 4 && !kMultiplier;
  static_assert(!kWide || (!kBytes && !kMinimum), "a single sum of floats");
  static constexpr int kBits = kBits_, kCodeBytes = kW4SlabK * kBits / 8;  // of a channel in a slab
  // The products of all of K add to the same sums, and that is all.
  static constexpr bool kOneSum = kBits == 8 || kMultiplier;
  static_assert(!kOneSum || kBytes == kMultiplier, "codes of 8 bits are multiplied as floats, multiples as bytes");
  using Total = typename std::conditional<kOneSum, Sum, float>::type;
  static constexpr bool kPlain = kKind == W4Kind::kZeroPoint && !kZeros;
  // Integer products are 16 times the true ones (operands_w4a8.cuh).
  static constexpr bool kSixteenfold = kBytes && kPlain;
  static constexpr int kPhases = kPhases_;
  // One slab at a time by many warps (slabs_w4_sm90.cuh).
  static constexpr bool kManyWarps = w4_many_warps(kBytes, kBits, kTokens, kPhases);
  static constexpr int kChannels = w4_channels(kBytes, kBits, kTokens, kPhases);
  static constexpr int kGroups = kChannels > 64 && !kManyWarps ? kChannels / 64 : 1;
  // Blocks of kW4Rows channels of a warp: with two, what is read from shared memory of 16 tokens serves both.
  static constexpr int kBlocks = kManyWarps && kTokens == 16 ? 2 : 1, kWarpRows = kBlocks * kW4Rows;
  static constexpr int kWarps = kChannels / kWarpRows;  // of a phase; all of them read a stage
  static constexpr int kPhaseThreads = kWarps * 32;
  static constexpr int kConsumerWarps = kWarps * kPhases, kConsumers = kConsumerWarps * 32;
  static constexpr int kRowBytes = kW4SlabK * static_cast<int>(sizeof(T));  // of a token in a slab
  static constexpr int kBoxes = kRowBytes / 128;
  // Two stages of 256 tokens, or three of 192, leave little time for a copy: tokens come by halves of a slab, a stage
  // each, and codes by slabs, with the first of them. Where there is room for half 2p, half 2p - kHalfStages and those
  // before it were given back, and with the last one of slab p - kCodeStages whatever holds its codes.
  static constexpr bool kHalves = kBits_ == 8 && kTokens > 128;
  static constexpr int kStageBoxes = kHalves ? 1 : kBoxes, kStagesOfSlab = kBoxes / kStageBoxes;
  static constexpr int kHalfStages = kTokens == 256 ? 5 : 6, kCodeStages = (kHalfStages + 2) / 2;
  static constexpr int kTokenBytes = kTokens * 128 * kStageBoxes;  // of a stage
  static constexpr int kPart = kTokens / kCluster;  // tokens that a CTA of the cluster fetches
  static_assert(kPart % 8 == 0, "whole swizzle atoms");
  static constexpr int kSteps = kRowBytes / 32;  // products of a slab
  static constexpr int kFragments = kSteps / 2 * 4;  // registers of half a slab
  static constexpr int kValues = kTokens / 2;  // sums of a thread
  static constexpr int kPerSm = w4_per_sm(kBytes, kBits, kTokens, kKind, kPhases);
  // Warps: what one lane computes and waits for between its copies would limit small tiles; few stages of many tokens
  // fit. Of kManyWarps, four where registers allow and a multiprocessor has one such CTA (one row on an H200: 14336 x
  // 4096 10.8 -> 9.0 us, 8192 x 8192 9.7 -> 9.3); two CTAs of them are slower (4096 x 14336 9.4 -> 9.7).
  static constexpr bool kFourProducers = kBlocks == 1 && !kZeros && (kPhases == 8 || kOnePerSm_);
  static constexpr int kProducers = kManyWarps ? (kFourProducers ? 4 : 2) : kPhases >= 4 ? 4 : kTokens > 128 ? 1 : 2;
  // Few tokens leave registers for two CTAs, which hide each other's latency. With more, the producer's registers go to
  // the consumers, and it is a whole warpgroup since setmaxnreg works on those: 168 a thread at launch, or 96 beside
  // four warpgroups of consumers.
  static constexpr bool kMovesRegisters = kPerSm == 1 ? kPhases == 1 || kTokens >= 32 : kTokens >= 64;
  static constexpr int kThreads = kConsumers + (kMovesRegisters ? 128 : 32 * kProducers);
  // What phases tell one another: a running total, or everybody's sums, in the ring of stages where they are many; of
  // kManyWarps there or behind it (Job::meeting).
  static constexpr bool kRelays = kBytes && !kOneSum && kPhases > 1, kGathers = !kRelays && kPhases > 1;
  static constexpr bool kGathersInRing = kGathers && kTokens >= 32;
  static constexpr int kQuads = kTokens / 8;  // float4 of a thread, if it holds all tokens
  static constexpr int kMeetingBytes = kConsumers * kBlocks * kQuads * 16;  // of everybody's sums
  static constexpr int kExchange = kRelays                                      ? kPhaseThreads * kQuads
                                   : kGathers && !kGathersInRing && !kManyWarps ? kMeetingBytes / 16
                                                                                : 1;
  // Tiles whose slabs several clusters deal out among themselves: those of floats alone, since totals over groups of
  // integers have an order.
  static constexpr bool kShares = !kBytes && kPhases == 1;
  static constexpr bool kSpareWarps = kMovesRegisters && kProducers < 4;  // beside the producers
  static constexpr bool kHoldsTotal = kTokens <= 32;  // while rows of a slab are added to it; else it stays where it is
  // Of a tile whose sums are complete, the phases take parts to the output.
  static constexpr int kParts = kPhases < kQuads ? kPhases : kQuads, kPartTokens = kTokens / kParts;
  // The warpgroups take turns to start a slab's products, lest they finish, and leave the tensor cores idle, together.
  // Bytes of 64 tokens are over too soon for it (2 % slower so on an H200), and 192 tokens keep them busy (1 to 2 %).
  static constexpr bool kTurns = kTokens >= (kBytes ? 128 : 64) && kTokens != 192 && kPhases == 1 && !kOneSum;
  // An instruction with a register operand waits for the one before it, so products hold a warp up. Where sums of
  // integers take as long to add up, nothing comes between the products of a row: one warpgroup is in its products
  // while the other unpacks and adds.
  static constexpr bool kApart = kBytes && kTokens >= 64 && kPhases == 1 && !kOneSum;
  // A product takes the address of its tokens from uniform registers: one shuffle gets all of a slab's there, where
  // they would go one by one. It delays the first product, which two warpgroups of many tokens do not hide (measured on
  // an H200: 3 to 6 % less time with 32 and, of 16 bits, 64 tokens, 1 % more elsewhere), but those of 8-bit codes do (3
  // % less with 128 on an H100).
  static constexpr bool kUniform = !kFew && (kTokens == 32 || kBits_ == 8 || (!kBytes && kTokens != 128));
  static constexpr int kProducerRegisters = kPerSm == 2 ? 48 : kConsumers > 256 ? 64 : 56;
  static constexpr int kConsumerRegisters = kPerSm == 2 ? 96 : kConsumers > 256 ? 104 : 224;
  // Registers only move within what the CTA was launched with; one more, and its consumers would wait for ever.
  static_assert(!kMovesRegisters || kConsumerRegisters * kConsumers + kProducerRegisters * 128 <=
                                        65536 / kPerSm / kThreads / 8 * 8 * kThreads,
                "more registers than the CTA has");
};

// What a consumer thread needs again and again.
struct Thread {
  int lane, warp;  // warp of the channels
  int phase;
  int channel;  // of the tile: the first of its two, the other is 8 further
  uint32_t codes;  // bytes from the stage's codes on to this thread's; of 8 bits, to the row that it names to ldmatrix
  uint32_t matrix;  // of few tokens: bytes from those of a stage on to the row that this thread names to ldmatrix
  __device__ __forceinline__ Thread(int warps, bool phases, int bits, int blocks = 1)
      : lane(static_cast<int>(ptx::keep(threadIdx.x & 31))),
        warp(static_cast<int>(ptx::uniform(threadIdx.x >> 5)) % warps),
        phase(phases ? static_cast<int>(ptx::uniform(threadIdx.x >> 5)) / warps : 0),
        channel(static_cast<int>(ptx::keep(warp * blocks * kW4Rows + (lane >> 2)))),
        codes(ptx::keep(bits == 4 ? warp * blocks * kW4BlockBytes + lane * 16
                                  : (warp * kW4Rows + (lane & 15)) * kSlabK + (((lane >> 4) ^ (lane & 7)) << 4))),
        matrix(ptx::keep((lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4))) {}
};

// This thread's codes of half a slab (64 k).
__device__ __forceinline__ uint4 load_codes(const Thread& t, const uint8_t* packed, int half) {
  return *reinterpret_cast<const uint4*>(packed + t.codes + half * 512);
}

template <typename S>
__device__ __forceinline__ ScaleType scale_type(const Job& job) {
  return S::kPlain ? ScaleType::kF16 : job.weight.scale_type;
}

// Wide sums cannot be in units of a scale that is zero or nearly so: its weights are taken as zeros. NaN is not.
__device__ __forceinline__ bool is_live(float scale) { return !(fabsf(scale) < 0x1p-100f); }
__device__ __forceinline__ float live_or(float scale, float other) { return is_live(scale) ? scale : other; }

// The two words of codes of a quarter of a slab, 32 k, as wgmma fragments. packed: the stage's codes, with the rows of
// its groups behind them.
template <typename S, int kShift>
__device__ __forceinline__ void unpack_quarter(const Job& job, const Thread& t, const uint8_t* packed,
                                               const uint32_t (&words)[2], const uint32_t* book, int quarter,
                                               uint32_t* f) {
  uint32_t zero[2] = {S::kMinimum ? 0u : 8u, S::kMinimum ? 0u : 8u};  // of channels g and g + 8
  const uint8_t* row = packed + S::kChannels * S::kCodeBytes + (quarter >> (2 - kShift)) * job.groups.row_bytes;
  if (S::kZeros && job.weight.zero_point) {
    const uint8_t* zeros = row + S::kChannels * job.groups.value_bytes;
    zero[0] = zeros[t.channel], zero[1] = zeros[t.channel + 8];
  }
  if constexpr (S::kBytes) {
    if constexpr (S::kSixteenfold) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        f[2 * i] = low_bytes_sixteenfold(words[i]);
        f[2 * i + 1] = high_bytes_sixteenfold(words[i]);
      }
    } else {
      const uint32_t z0 = zero[0] * kOnes, z1 = zero[1] * kOnes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (S::kMinimum) {
          f[2 * i] = words[i] & 0x0f0f0f0fu;
          f[2 * i + 1] = (words[i] >> 4) & 0x0f0f0f0fu;
        } else {
          f[2 * i] = low_bytes(words[i], z0);
          f[2 * i + 1] = high_bytes(words[i], z1);
        }
      }
    }
  } else {
    using T = typename S::T;
    [[maybe_unused]] uint32_t factor[2], offset[2], kept[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      using N = Nibbles<T>;
      factor[e] = e ? N::kOddFactor : N::kFactor;
      offset[e] = S::kMinimum ? (e ? N::kOddZero : N::kZero) : (e ? N::kOddEight : N::kEight);
      if (S::kZeros && job.weight.zero_point) offset[e] = nibble_offset<T>(e, zero[e]);
      if constexpr (S::kWide) {
        const bool live = is_live(row_value(row, scale_type<S>(job), t.channel + 8 * e));
        kept[e] = live ? ~0u : 0u;
        if (!live) factor[e] = offset[e] = 0u;
      }
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t& to = f[4 * s + r];
        if constexpr (S::kCodebook) {
          to = pair_of(words[s], r, book);
          if constexpr (S::kWide) to &= kept[r & 1];
        } else {
          to = pair_of_nibbles<T>(words[s], r, factor[r & 1], offset[r & 1]);
        }
      }
    }
  }
}

// The same of half a slab.
template <typename S, int kShift>
__device__ __forceinline__ void unpack_half(const Job& job, const Thread& t, const uint8_t* packed, const uint4& v,
                                            const uint32_t* book, int half, uint32_t (&f)[S::kFragments]) {
  unpack_quarter<S, kShift>(job, t, packed, {v.x, v.y}, book, 2 * half, f);
  unpack_quarter<S, kShift>(job, t, packed, {v.z, v.w}, book, 2 * half + 1, f + S::kFragments / 2);
}

// A register of ones as the activations' operand.
template <typename T>
struct OnesOf {
  static constexpr uint32_t kValue = Pairs<T>::kOnes;
};
template <>
struct OnesOf<int8_t> {
  static constexpr uint32_t kValue = kOnes;
};

// Of a code of the thread's second channel, whose fragments are in these units (operands_w4a16.cuh).
template <typename S>
__host__ __device__ constexpr float odd_unit() {
  if constexpr (S::kBytes || S::kCodebook) {
    return 1.0f;
  } else {
    return Nibbles<typename S::T>::kOddUnit;
  }
}

template <typename S>
struct Sums {
  typename S::Sum part[S::kWide || S::kOneSum ? 1 : S::kValues];  // since the last scale
  typename S::Sum odd[S::kFew ? S::kValues : 1];  // of every other step, of few tokens: two chains of products
  typename S::Sum tokens[S::kMinimum ? S::kValues : 1];  // of the activations alone
  typename S::Total total[S::kValues];
};

__device__ __forceinline__ void multiply_few(int8_t, int32_t* d, const uint32_t (&a)[4], const uint32_t* b) {
  ptx::mma_s8(*reinterpret_cast<int32_t (*)[4]>(d), a, b[0], b[1]);
}
template <typename T>
__device__ __forceinline__ void multiply_few(T type, float* d, const uint32_t (&a)[4], const uint32_t* b) {
  ptx::mma_16(type, *reinterpret_cast<float (*)[4]>(d), a, b[0], b[1]);
}

// The same as multiply() below, of few tokens and done when it returns.
template <typename S, int kFirst, int kCount, int kPerRow>
__device__ __forceinline__ void multiply_few(const uint32_t* f, uint32_t tokens, bool fresh, Sums<S>& sums) {
  using T = typename S::T;
  constexpr uint32_t kOne = OnesOf<T>::kValue;
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
  uint32_t b[S::kTokens / 8][4];  // of two steps
  typename S::Sum* even = sums.part;
  if constexpr (S::kOneSum) even = sums.total;
#pragma unroll
  for (int step = kFirst; step < kFirst + kCount; ++step) {
    const int of_row = step % kPerRow, pair = step / 2;
    if (of_row == 0 && !S::kOneSum && !(S::kBytes && !fresh)) {
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) sums.part[i] = 0;
      if constexpr (S::kMinimum) {
#pragma unroll
        for (int i = 0; i < S::kValues; ++i) sums.tokens[i] = 0;
      }
    }
    if (of_row == 1 && !S::kOneSum) {
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) sums.odd[i] = 0;
    }
    const uint32_t a[4] = {f[4 * (step - kFirst)], f[4 * (step - kFirst) + 1], f[4 * (step - kFirst) + 2],
                           f[4 * (step - kFirst) + 3]};
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; ++j) {
      if (step == kFirst || step % 2 == 0) {
        ptx::ldmatrix_x4(b[j], (tokens ^ (pair % 2 * 64)) + pair / 2 * S::kTokens * 128 + j * 1024);
      }
      multiply_few(T(), (of_row % 2 ? sums.odd : even) + 4 * j, a, b[j] + step % 2 * 2);
      if constexpr (S::kMinimum) multiply_few(T(), sums.tokens + 4 * j, ones, b[j] + step % 2 * 2);
    }
    if (kPerRow > 1 && of_row == kPerRow - 1 && !S::kOneSum) {
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) sums.part[i] += sums.odd[i];
    }
  }
}

// Starts the products of k-steps kFirst ... kFirst + kCount - 1 of a slab, whose fragments are f. Sums begin anew with
// each row of scales, of kPerRow steps, but integers only if `fresh`; those of all of K only with a `fresh` slab.
template <typename S, int kFirst, int kCount, int kPerRow>
__device__ __forceinline__ void multiply(const uint32_t* f, uint32_t tokens, bool fresh, Sums<S>& sums) {
  if constexpr (S::kFew) return multiply_few<S, kFirst, kCount, kPerRow>(f, tokens, fresh, sums);
  constexpr uint32_t kOne = OnesOf<typename S::T>::kValue;
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
  ptx::wgmma_fence();
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const int step = kFirst + s;
    const uint64_t b = ptx::wgmma_descriptor(tokens + step / 4 * S::kTokens * 128) + 2 * (step % 4);
    if constexpr (S::kWide || S::kOneSum) {
      WgmmaRegisters<typename S::T, S::kTokens>::run(sums.total, f + 4 * s, b, step > 0 || !fresh);
    } else {
      const int accumulate = step % kPerRow != 0 || (S::kBytes && !fresh);
      WgmmaRegisters<typename S::T, S::kTokens>::run(sums.part, f + 4 * s, b, accumulate);
      if constexpr (S::kMinimum) WgmmaRegisters<typename S::T, S::kTokens>::run(sums.tokens, ones, b, accumulate);
    }
  }
  ptx::wgmma_commit();
}

// Starts the products of two steps, which add to the sums of all K.
template <typename S>
__device__ __forceinline__ void multiply_two(const uint32_t* f, uint32_t tokens, int step, bool fresh, Sums<S>& sums) {
  ptx::wgmma_fence();
#pragma unroll
  for (int s = step; s < step + 2; ++s, f += 4) {
    const uint64_t b = ptx::wgmma_descriptor(tokens + s / 4 * S::kTokens * 128) + 2 * (s % 4);
    WgmmaRegisters<typename S::T, S::kTokens>::run(sums.total, f, b, s > 0 || !fresh);
  }
  ptx::wgmma_commit();
}

// The same for all steps of a row, by which half and which part of it they are in.
template <typename S, int kPerRow>
__device__ __forceinline__ void multiply_row(int row, const uint32_t* even, const uint32_t* odd, uint32_t tokens,
                                             bool fresh, Sums<S>& sums) {
  if constexpr (kPerRow == S::kSteps / 2) {
    if (row == 0) multiply<S, 0, kPerRow, kPerRow>(even, tokens, fresh, sums);
    if (row == 1) multiply<S, kPerRow, kPerRow, kPerRow>(odd, tokens, fresh, sums);
  } else {
    if (row == 0) multiply<S, 0, kPerRow, kPerRow>(even, tokens, fresh, sums);
    if (row == 1) multiply<S, kPerRow, kPerRow, kPerRow>(even + 4 * kPerRow, tokens, fresh, sums);
    if (row == 2) multiply<S, 2 * kPerRow, kPerRow, kPerRow>(odd, tokens, fresh, sums);
    if (row == 3) multiply<S, 3 * kPerRow, kPerRow, kPerRow>(odd + 4 * kPerRow, tokens, fresh, sums);
  }
}

// A row of scales (and minima) as a thread's two channels need it.
struct Factors {
  float scale[2], low[2];
};
template <typename S>
__device__ __forceinline__ Factors load_factors(const Job& job, const Thread& t, const uint8_t* row) {
  const ScaleType type = scale_type<S>(job);
  Factors f;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    f.scale[e] = row_value(row, type, t.channel + 8 * e);
    if (e == 1 && odd_unit<S>() != 1.0f) f.scale[e] *= odd_unit<S>();
    f.low[e] = 0.0f;
    if constexpr (S::kMinimum) {
      f.low[e] = row_value(row + S::kChannels * job.groups.value_bytes, type, t.channel + 8 * e);
    }
  }
  return f;
}

// total += part * scale (+ tokens * minimum). Integers: each step rounded once.
template <typename S>
__device__ __forceinline__ void promote(Factors f, Sums<S>& sums) {
  if constexpr (S::kSixteenfold) f.scale[0] *= 0.0625f, f.scale[1] *= 0.0625f;  // exact for what fp16 holds
#pragma unroll
  for (int i = 0; i < S::kValues; ++i) {
    const int e = (i >> 1) & 1;
    float& total = sums.total[i];
    if constexpr (S::kBytes) {
      total = __fadd_rn(total, __fmul_rn(__int2float_rn(sums.part[i]), f.scale[e]));
      if constexpr (S::kMinimum) total = __fadd_rn(total, __fmul_rn(f.low[e], __int2float_rn(sums.tokens[i])));
    } else {
      total = __fmaf_rn(sums.part[i], f.scale[e], total);
      if constexpr (S::kMinimum) total = __fmaf_rn(sums.tokens[i], f.low[e], total);
    }
  }
}

// Of integers: what promote() adds to the totals. A row of padding, whose tokens are zeros, gives zeros that change no
// total, whatever its scale is.
template <typename S>
__device__ __forceinline__ void scale_parts(Factors f, bool padding, const Sums<S>& sums, float (&step)[S::kValues]) {
  static_assert(S::kBytes && !S::kMinimum, "a single term");
  if constexpr (S::kSixteenfold) f.scale[0] *= 0.0625f, f.scale[1] *= 0.0625f;
  if (padding) f.scale[0] = f.scale[1] = -0.0f;
#pragma unroll
  for (int i = 0; i < S::kValues; ++i) step[i] = __fmul_rn(__int2float_rn(sums.part[i]), f.scale[(i >> 1) & 1]);
}

// Wide sums, from units of `scale` to those of what follows; or to what they are, at the end.
template <typename S>
__device__ __forceinline__ void rescale(const float (&scale)[2], const float (&next)[2], bool end, Sums<S>& sums) {
  float factor[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) factor[e] = end ? scale[e] : __fdividef(scale[e], next[e]);
#pragma unroll
  for (int i = 0; i < S::kValues; ++i) sums.total[i] *= factor[(i >> 1) & 1];
}

}  // namespace
}  // namespace qk::cuda
