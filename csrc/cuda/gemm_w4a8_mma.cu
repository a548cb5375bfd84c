// y [M, N] = (sum over groups in order of float(d_g) * scale_g (+ min_g * float(sum_g))) * x_scale + bias by mma.sync
// m16n8k32: 4-bit weights, int8 activations. sm_80 on. Equal to the definition bit for bit: d_g is exact in int32, and
// the groups of an output are added by one thread in the order of K, each step rounded once.
//
// Weights are the 16-row operand; how codes become its fragments stands in operands_w4a8.cuh.
//
// Activations with zero points ("shifted") have instances of their own, whose sums shift_w4a8.cuh sets right.
//
// Few tokens ("narrow"): a CTA owns 32 channels x 8 or 16 tokens and its eight warps take the slabs of 128 k in turns,
// so that one CTA per 32 channels is enough to keep the memory busy. Every warp leaves the integers of its blocks (the
// parts of a slab that lie in one group) in shared memory, and after each round of eight slabs every thread adds up its
// own output in order:
//
//     round 0:  warp 0: slab 0   warp 1: slab 1  ...  warp 7: slab 7   | d of all blocks | total += float(d) * scale
//     round 1:  warp 0: slab 8   ...
//
// More tokens ("wide"): 128 channels x 64 or 128 tokens, eight warps as 4 along channels x 2 along tokens, each walking
// all of K with its totals in registers.
#include <type_traits>

#include "epilogue.cuh"
#include "groups_w4.cuh"
#include "host.h"
#include "launch_w4.h"
#include "operands_w4a8.cuh"
#include "shift_w4a8.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Job {
  GemmW4A8Args a;
  Epilogue e;
  GroupRows groups;
  int32_t slabs, blocks_n, stage_bytes;
};

// Adds the products of 32 k, from `k` on. `blocks`: the warp's blocks of weights in the stage of the slab; `zeros`:
// their zero points, one in every byte.
template <typename S, int kOnesM, int kWeightsN>
__device__ __forceinline__ void multiply_quarter(const uint8_t* blocks, uint32_t tokens, int quarter, int lane, int k,
                                                 int end, const uint32_t (&zeros)[S::kBlocksN][2],
                                                 int32_t (&acc)[S::kBlocksN][S::kBlocksM][4],
                                                 int32_t (&ones)[kOnesM][4], int32_t (&weights)[kWeightsN][4]) {
  uint32_t b[S::kBlocksM][2];
  load_tokens<S::kBlocksM>(tokens, quarter, lane, b);
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const uint2 v =
        *reinterpret_cast<const uint2*>(blocks + i * kW4BlockBytes + quarter / 2 * 512 + lane * 16 + quarter % 2 * 8);
    const uint32_t f[4] = {low_bytes(v.x, zeros[i][0]), high_bytes(v.x, zeros[i][1]), low_bytes(v.y, zeros[i][0]),
                           high_bytes(v.y, zeros[i][1])};
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_s8(acc[i][j], f, b[j][0], b[j][1]);
    if constexpr (S::kShifted) add_weights(weights[i], f, k, end, lane);
  }
  if constexpr (S::kKind == W4Kind::kMinimum) {
    const uint32_t f[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_s8(ones[j], f, b[j][0], b[j][1]);
  }
}

// ---- Few tokens ----------------------------------------------------------------------------------------------------

template <int kTokens_, W4Kind kKind_, bool kShifted_>
struct Narrow {
  static constexpr int kTokens = kTokens_, kBlocksM = kTokens / 8, kChannels = 32, kBlocksN = 2;
  static constexpr int kStages = kTokens == 8 ? 3 : 2;  // two CTAs fit an SM of 227 KB
  static constexpr W4Kind kKind = kKind_;
  static constexpr bool kShifted = kShifted_;
  static constexpr int kWeightBytes = kChannels * kW4SlabK / 2;  // of a slab
  static constexpr int kStageBytes = kWeightBytes + kTokens * kTokenBytes;  // of a warp
  static constexpr int kOutputs = kChannels * kTokens, kPerThread = kOutputs / kThreads;
  // Integers of a block: those of the outputs, then the sums of the tokens.
  static constexpr int kBlockInts = kOutputs + (kKind == W4Kind::kMinimum ? kTokens : 0);
  static constexpr int shared_bytes(int row_shift) {
    return kWarps * kStages * kStageBytes + ((kWarps * kBlockInts * 4) << row_shift);
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) narrow_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmW4A8Args& a = job.a;
  const W4Weight& w = a.weight;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int n0 = blockIdx.x * S::kChannels, m0 = blockIdx.y * S::kTokens;
  const int rounds = (job.slabs + kWarps - 1) / kWarps, shift = job.groups.row_shift, block_k = kW4SlabK >> shift;
  uint8_t* own = shared + warp * S::kStages * S::kStageBytes;
  const uint32_t own_address = ptx::smem_u32(own);
  int32_t* ints = reinterpret_cast<int32_t*>(shared + kWarps * S::kStages * S::kStageBytes);

  const auto load_weights = [&](int round) {
    const int slab = min(round * kWarps + warp, job.slabs - 1);  // copied without need where there is none
    const uint32_t target = own_address + round % S::kStages * S::kStageBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < S::kBlocksN; ++i) {
      const int block = min(n0 / kW4Rows + i, job.blocks_n - 1);
      const uint8_t* source = w.packed + (int64_t(slab) * w.blocks + block) * kW4BlockBytes + lane * 16;
      ptx::cp_async_16(target + i * kW4BlockBytes, source, 16);
      ptx::cp_async_16(target + i * kW4BlockBytes + 512, source + 512, 16);
    }
  };
  const auto load_x = [&](int round) {
    const int slab = min(round * kWarps + warp, job.slabs - 1);
    const uint32_t target = own_address + round % S::kStages * S::kStageBytes + S::kWeightBytes;
#pragma unroll
    for (int i = 0; i < S::kTokens / 4; ++i) load_token_chunk(a, target, 4 * i + (lane >> 3), lane & 7, slab, m0);
  };

  for (int r = 0; r < S::kStages - 1; ++r) {
    if (r < rounds) load_weights(r);
  }
  ptx::grid_dependency_wait();  // the quantizer's rows; weights were there before
  for (int r = 0; r < S::kStages - 1; ++r) {
    if (r < rounds) load_x(r);
    ptx::cp_async_commit();
  }

  [[maybe_unused]] int32_t shifts[S::kShifted ? S::kBlocksM : 1][2];
  if constexpr (S::kShifted) {
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) load_shift(a, m0 + 8 * j + 2 * (lane & 3), shifts[j]);
  }

  // This thread's outputs: word `tid + i * kThreads` of the fragments as blocks hold them.
  int channel[S::kPerThread], token[S::kPerThread];
  int32_t d[S::kPerThread] = {}, sum[S::kPerThread] = {};
  float total[S::kPerThread] = {};
#pragma unroll
  for (int i = 0; i < S::kPerThread; ++i) {
    const int word = tid + i * kThreads, c = word & 3, l = (word >> 2) & 31, fragment = word >> 7;
    channel[i] = fragment / S::kBlocksM * 16 + (l >> 2) + 8 * (c >> 1);
    token[i] = fragment % S::kBlocksM * 8 + 2 * (l & 3) + (c & 1);
  }

  // Scales (and minima) of the next eight blocks from k on: asked for before the products, wanted after them.
  constexpr int kAhead = kWarps;
  float scale[kAhead][S::kPerThread], low[S::kKind == W4Kind::kMinimum ? kAhead : 1][S::kPerThread];
  const auto fetch = [&](int k) {
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
      const uint32_t group = group_of(job.groups, min(k + p * block_k, w.k - 1));
#pragma unroll
      for (int i = 0; i < S::kPerThread; ++i) {
        const uint32_t at = group * job.groups.pitch + min(n0 + channel[i], job.groups.width - 1);
        scale[p][i] = group_value(w.scale, w.scale_type, at);
        if constexpr (S::kKind == W4Kind::kMinimum) low[p][i] = group_value(w.minimum, w.scale_type, at);
      }
    }
  };

  for (int round = 0; round < rounds; ++round) {
    fetch((round << shift) * kAhead * block_k);
    ptx::cp_async_wait<S::kStages - 2>();
    __syncwarp();
    const int slab = round * kWarps + warp;
    if (slab < job.slabs) {
      const uint8_t* stage = own + round % S::kStages * S::kStageBytes;
      const uint32_t tokens = ptx::smem_u32(stage + S::kWeightBytes);
      int32_t acc[S::kBlocksN][S::kBlocksM][4] = {}, ones[S::kBlocksM][4] = {};
      [[maybe_unused]] int32_t weights[S::kShifted ? S::kBlocksN : 1][4] = {};
      uint32_t zeros[S::kBlocksN][2];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int mask = (4 >> shift) - 1, k = slab * kW4SlabK + quarter * 32;
        if ((quarter & mask) == 0) {
#pragma unroll
          for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              uint32_t zero = S::kKind == W4Kind::kMinimum ? 0u : 8u;
              if (S::kKind == W4Kind::kZeroPoint && w.zero_point) {
                const int n = min(n0 + 16 * i + 8 * e + (lane >> 2), job.groups.width - 1);
                const int64_t group = group_of(job.groups, min(k, w.k - 1));
                zero = __ldg(w.zero_point + group * job.groups.pitch + n);
              }
              zeros[i][e] = zero * kOnes;
            }
          }
        }
        multiply_quarter<S>(stage, tokens, quarter, lane, k, w.k, zeros, acc, ones, weights);
        if (((quarter + 1) & mask) == 0) {
          if constexpr (S::kShifted) {
            const int first = slab * kW4SlabK + (quarter & ~mask) * 32, width = max(0, min(block_k, w.k - first));
            take_shift_off<S::kKind == W4Kind::kMinimum>(acc, ones, shifts, weights, width);
          }
          int32_t* out = ints + ((warp << shift) + (quarter >> (2 - shift))) * S::kBlockInts;
#pragma unroll
          for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
            for (int j = 0; j < S::kBlocksM; ++j) {
              int32_t (&v)[4] = acc[i][j];
              reinterpret_cast<int4*>(out)[(i * S::kBlocksM + j) * 32 + lane] = make_int4(v[0], v[1], v[2], v[3]);
              v[0] = v[1] = v[2] = v[3] = 0;
            }
          }
          if constexpr (S::kKind == W4Kind::kMinimum) {
#pragma unroll
            for (int j = 0; j < S::kBlocksM; ++j) {
              if (lane < 4) {
                reinterpret_cast<int2*>(out + S::kOutputs)[j * 4 + lane] = make_int2(ones[j][0], ones[j][1]);
              }
              ones[j][0] = ones[j][1] = ones[j][2] = ones[j][3] = 0;
            }
          }
        }
      }
    }
    __syncwarp();  // everybody has read the stage that is refilled
    if (round + S::kStages - 1 < rounds) {
      load_weights(round + S::kStages - 1);
      load_x(round + S::kStages - 1);
    }
    ptx::cp_async_commit();
    __syncthreads();
    for (int part = 0; part < 1 << shift; ++part) {
      const int first = (round << shift) * kAhead * block_k + part * kAhead * block_k;
      if (part > 0) fetch(first);
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        const int k = first + p * block_k, block = part * kAhead + p;
        if (k >= w.k) break;
        const bool ends = k + block_k >= w.k || group_of(job.groups, k + block_k) != group_of(job.groups, k);
#pragma unroll
        for (int i = 0; i < S::kPerThread; ++i) {
          d[i] += ints[block * S::kBlockInts + tid + i * kThreads];
          if constexpr (S::kKind == W4Kind::kMinimum) sum[i] += ints[block * S::kBlockInts + S::kOutputs + token[i]];
          if (ends) {
            total[i] = __fadd_rn(total[i], __fmul_rn(__int2float_rn(d[i]), scale[p][i]));
            d[i] = 0;
            if constexpr (S::kKind == W4Kind::kMinimum) {
              total[i] = __fadd_rn(total[i], __fmul_rn(low[p][i], __int2float_rn(sum[i])));
              sum[i] = 0;
            }
          }
        }
      }
    }
    __syncthreads();  // the integers may be overwritten
  }
  ptx::grid_launch_dependents();

  // Through shared memory, so that neighbours store neighbouring channels.
  float* outputs = reinterpret_cast<float*>(ints);
#pragma unroll
  for (int i = 0; i < S::kPerThread; ++i) {
    const int n = min(n0 + channel[i], w.n - 1), m = min(m0 + token[i], a.m - 1);
    const float bias = a.bias ? __ldg(a.bias + n) : -0.0f;
    outputs[token[i] * S::kChannels + channel[i]] = __fadd_rn(__fmul_rn(total[i], a.x_scale[m]), bias);
  }
  __syncthreads();
  for (int at = tid; at < S::kOutputs; at += kThreads) {
    const int m = m0 + at / S::kChannels, n = n0 + at % S::kChannels;
    if (m >= a.m || n >= w.n) continue;
    const int64_t to = int64_t(m) * a.y_stride + n;
    if (a.y_dtype == DType::kF32) {
      static_cast<float*>(a.y)[to] = outputs[at];
    } else {
      store_u16(job.e, to, pack_pair(a.y_dtype, outputs[at], 0.0f));
    }
  }
}

// ---- More tokens ---------------------------------------------------------------------------------------------------

template <int kTokens_, W4Kind kKind_, bool kShifted_>
struct Wide {
  static constexpr int kTokens = kTokens_, kChannels = 128, kBlocksN = 2, kBlocksM = kTokens / 16;
  static constexpr W4Kind kKind = kKind_;
  static constexpr bool kShifted = kShifted_;
  static constexpr int kStages = kTokens == 64 ? 4 : 3;
  static constexpr int kPerSm = kTokens == 64 && kKind != W4Kind::kMinimum && !kShifted ? 2 : 1;  // CTAs
  static constexpr int kWeightBytes = kChannels * kW4SlabK / 2;
  static constexpr int kMostBytes = kStages * (kWeightBytes + kTokens * kTokenBytes + 4 * kChannels * 8);
  static_assert(kMostBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
};
using Groups = GroupCopies<128, kThreads>;

template <typename S>
__device__ __forceinline__ void load_slab(const Job& job, const Groups& groups, uint32_t stage, int slab, int m0,
                                          int n0) {
  const GemmW4A8Args& a = job.a;
  const int tid = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = i * kThreads + tid, block = min(n0 / kW4Rows + at / 64, job.blocks_n - 1);
    ptx::cp_async_16(stage + at * 16,
                     a.weight.packed + (int64_t(slab) * a.weight.blocks + block) * kW4BlockBytes + at % 64 * 16, 16);
  }
  const uint32_t tokens = stage + S::kWeightBytes;
#pragma unroll
  for (int i = 0; i < S::kTokens * 8 / kThreads; ++i) {
    load_token_chunk(a, tokens, i * (kThreads / 8) + (tid >> 3), tid & 7, slab, m0);
  }
  groups.start(a.weight, job.groups, tokens + S::kTokens * kTokenBytes, slab, n0);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kPerSm) wide_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmW4A8Args& a = job.a;
  const W4Weight& w = a.weight;
  const uint32_t base = ptx::smem_u32(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_n = warp & 3, warp_m = warp >> 2;
  const int n0 = blockIdx.y * S::kChannels, m0 = blockIdx.x * S::kTokens;  // neighbours share weights
  const int channel = warp_n * 32 + (lane >> 2), shift = job.groups.row_shift;
  const Groups groups(w, job.groups);
  int32_t acc[S::kBlocksN][S::kBlocksM][4] = {}, ones[S::kKind == W4Kind::kMinimum ? S::kBlocksM : 1][4] = {};
  float total[S::kBlocksN][S::kBlocksM][4] = {};
  [[maybe_unused]] int32_t weights[S::kShifted ? S::kBlocksN : 1][4] = {}, shifts[S::kShifted ? S::kBlocksM : 1][2];

  // One slab. kShift: the row_shift of the groups, -1: only known at run time; most groups are 128 k or more.
  const auto multiply = [&](auto fixed, const uint8_t* stage, int slab) {
    constexpr int kShift = decltype(fixed)::value;
    const int rows_shift = kShift >= 0 ? kShift : shift;
    const uint32_t tokens = ptx::smem_u32(stage + S::kWeightBytes) + warp_m * (S::kTokens / 2) * kTokenBytes;
    const uint8_t* rows = stage + S::kWeightBytes + S::kTokens * kTokenBytes;
    uint32_t zeros[S::kBlocksN][2];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int mask = (4 >> rows_shift) - 1, k = slab * kW4SlabK + quarter * 32, next = k + 32;
      const uint8_t* row = rows + (quarter >> (2 - rows_shift)) * job.groups.row_bytes;
      if ((quarter & mask) == 0) {
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t zero = S::kKind == W4Kind::kMinimum ? 0u : 8u;
            if (S::kKind == W4Kind::kZeroPoint && w.zero_point) {
              zero = row[S::kChannels * job.groups.value_bytes + channel + 16 * i + 8 * e];
            }
            zeros[i][e] = zero * kOnes;
          }
        }
      }
      multiply_quarter<S>(stage + warp_n * S::kBlocksN * kW4BlockBytes, tokens, quarter, lane, k, w.k, zeros, acc, ones,
                          weights);
      if (((quarter + 1) & mask) != 0) continue;
      if (slab * kW4SlabK + (quarter & ~mask) * 32 >= w.k) continue;  // nothing but padding
      if (next < w.k && group_of(job.groups, k) == group_of(job.groups, next)) continue;
      if constexpr (S::kShifted) {
        // Steps of no group but a single one are 0, and it begins at 0.
        const int first = group_of(job.groups, k) * job.groups.steps * kW4GroupStep, width = min(next, w.k) - first;
        take_shift_off<S::kKind == W4Kind::kMinimum>(acc, ones, shifts, weights, width);
      }
#pragma unroll
      for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float scale = row_value(row, w.scale_type, channel + 16 * i + 8 * e);
          [[maybe_unused]] float low = 0.0f;
          if constexpr (S::kKind == W4Kind::kMinimum) {
            low = row_value(row + S::kChannels * job.groups.value_bytes, w.scale_type, channel + 16 * i + 8 * e);
          }
#pragma unroll
          for (int j = 0; j < S::kBlocksM; ++j) {
#pragma unroll
            for (int c = 2 * e; c < 2 * e + 2; ++c) {
              float& t = total[i][j][c];
              t = __fadd_rn(t, __fmul_rn(__int2float_rn(acc[i][j][c]), scale));
              if constexpr (S::kKind == W4Kind::kMinimum) {
                t = __fadd_rn(t, __fmul_rn(low, __int2float_rn(ones[j][c])));
              }
              acc[i][j][c] = 0;
            }
          }
        }
      }
      if constexpr (S::kKind == W4Kind::kMinimum) {
#pragma unroll
        for (int j = 0; j < S::kBlocksM; ++j) ones[j][0] = ones[j][1] = ones[j][2] = ones[j][3] = 0;
      }
    }
  };

  ptx::grid_dependency_wait();
  if constexpr (S::kShifted) {
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) {
      load_shift(a, m0 + (warp_m * S::kBlocksM + j) * 8 + 2 * (lane & 3), shifts[j]);
    }
  }
#pragma unroll 1
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < job.slabs) load_slab<S>(job, groups, base + s * job.stage_bytes, s, m0, n0);
    ptx::cp_async_commit();
  }
  int at_stage = 0, free_stage = S::kStages - 1;
  for (int slab = 0; slab < job.slabs; ++slab) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // the slab has landed for everybody, and everybody is done with the stage refilled below
    if (slab + S::kStages - 1 < job.slabs) {
      load_slab<S>(job, groups, base + free_stage * job.stage_bytes, slab + S::kStages - 1, m0, n0);
    }
    ptx::cp_async_commit();
    const uint8_t* landed = shared + at_stage * job.stage_bytes;
    if (shift == 0) {
      multiply(std::integral_constant<int, 0>(), landed, slab);
    } else {
      multiply(std::integral_constant<int, -1>(), landed, slab);
    }
    at_stage = at_stage + 1 == S::kStages ? 0 : at_stage + 1;
    free_stage = free_stage + 1 == S::kStages ? 0 : free_stage + 1;
  }
  ptx::grid_launch_dependents();
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int n = n0 + (warp_n * S::kBlocksN + i) * 16, low_n = n + (lane >> 2);
    const float low = a.bias && low_n < w.n ? __ldg(a.bias + low_n) : -0.0f;
    const float high = a.bias && low_n + 8 < w.n ? __ldg(a.bias + low_n + 8) : -0.0f;
    const int m = m0 + warp_m * S::kBlocksM * 8;
    store_blocks<S::kBlocksM>(job.e, n, m, lane, [&](int j, float (&v)[4]) {
      const int even = m + 8 * j + 2 * (lane & 3);
      const float scale[2] = {even < a.m ? a.x_scale[even] : 0.0f, even + 1 < a.m ? a.x_scale[even + 1] : 0.0f};
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = __fadd_rn(__fmul_rn(total[i][j][c], scale[c & 1]), c < 2 ? low : high);
    });
  }
}

// ---- Launches ------------------------------------------------------------------------------------------------------

Job make_job(const GemmW4A8Args& args, int channels) {
  Job job = {};
  job.a = args;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.groups = make_group_rows(args.weight, channels);
  job.slabs = static_cast<int32_t>(w4_slabs(args.weight.k));
  job.blocks_n = static_cast<int32_t>(w4_blocks(args.weight.n));
  return job;
}

// Not as a dependent launch: beside the quantizer's last CTAs its own would settle two to a multiprocessor while others
// stay idle.
template <typename S>
void run_wide(const GemmW4A8Args& args, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(wide_kernel<S>), S::kMostBytes, allowed);
  Job job = make_job(args, S::kChannels);
  job.stage_bytes = S::kWeightBytes + S::kTokens * kTokenBytes + (job.groups.row_bytes << job.groups.row_shift);
  LaunchShape shape;
  shape.grid = dim3(blocks(args.m, S::kTokens), blocks(args.weight.n, S::kChannels));
  shape.block = dim3(kThreads);
  shape.shared_bytes = static_cast<size_t>(S::kStages) * job.stage_bytes;
  launch(wide_kernel<S>, shape, stream, "gemm_w4a8 wide", job);
}

template <typename S>
void run_narrow(const GemmW4A8Args& args, bool dependent, cudaStream_t stream) {
  const Job job = make_job(args, S::kChannels);
  static const int limit = shared_memory_limit();
  // Blocks of 32 k are too many for the shared memory of sm_86 and sm_89.
  if (S::shared_bytes(job.groups.row_shift) > limit) return run_wide<Wide<64, S::kKind, S::kShifted>>(args, stream);
  LaunchShape shape;
  shape.grid = dim3(blocks(args.weight.n, S::kChannels), blocks(args.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = static_cast<size_t>(S::shared_bytes(job.groups.row_shift));
  shape.dependent = dependent;
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(narrow_kernel<S>), static_cast<size_t>(limit), allowed);
  launch(narrow_kernel<S>, shape, stream, "gemm_w4a8 narrow", job);
}

template <W4Kind kKind, bool kShifted>
void run_tokens(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  switch (tokens) {
    case 8:
      return run_narrow<Narrow<8, kKind, kShifted>>(args, dependent, stream);
    case 16:
      return run_narrow<Narrow<16, kKind, kShifted>>(args, dependent, stream);
    case 64:
      return run_wide<Wide<64, kKind, kShifted>>(args, stream);
    case 128:
      return run_wide<Wide<128, kKind, kShifted>>(args, stream);
    default:
      throw std::invalid_argument("gemm_w4a8: expected a tile of 8, 16, 64 or 128 tokens, got " +
                                  std::to_string(tokens));
  }
}

template <W4Kind kKind>
void run_kind(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  if (args.x_zero_point) return run_tokens<kKind, true>(args, tokens, dependent, stream);
  return run_tokens<kKind, false>(args, tokens, dependent, stream);
}

}  // namespace

void gemm_w4a8_mma(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  if (args.weight.kind == W4Kind::kMinimum) return run_kind<W4Kind::kMinimum>(args, tokens, dependent, stream);
  return run_kind<W4Kind::kZeroPoint>(args, tokens, dependent, stream);
}

}  // namespace qk::cuda
