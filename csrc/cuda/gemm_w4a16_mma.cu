// y [M, N] = x [M, K] @ w [N, K]^T + bias by mma.sync m16n8k16: 4-bit weights, 16-bit activations, fp32 sums. sm_80 on.
//
// Weights are the 16-row operand, tokens the 8-column one. Warps own 16 channels each (up to 16 tokens) or 32 of a tile
// of 128 channels x kTokens, and walk K in slabs of 128 (w4.h): 8 KB of weights, which every lane copies for itself and
// reads back as its own fragments, so that only activations are shared. Codes become 16-bit floats without rounding
// (operands_w4a16.cuh) and the products are exact in fp32. Sums of a group (or of 128 k of a longer one) are multiplied
// by their scale in fp32 and added to the total, so weights are never rounded; only a codebook's entries are, to the
// activations' dtype. A minimum multiplies the sum of the activations, which one more mma against ones gives.
//
// Work is cut evenly ("stream-K"): the slabs of all tiles in a row are dealt out to the CTAs in equal runs.
//
//     tile   0 0 0 0 0 1 1 1 1 1 2 2 2 2 2        5 slabs a tile, 4 CTAs
//     CTA    0 0 0 0 1 1 1 1 2 2 2 2 3 3 3        tile 1: CTA 1 has its first three slabs, CTA 2 the rest
//
// CTAs that share a tile leave their sums in memory; whoever comes last adds them all in the order of K. So bits do not
// depend on timing, and nobody waits.
#include "epilogue.cuh"
#include "groups_w4.cuh"
#include "host.h"
#include "instances_w4a16.cuh"
#include "launch.h"
#include "launch_w4.h"
#include "operands_w4a16.cuh"

namespace qk::cuda {
namespace {

constexpr int kChannels = 128;
constexpr int kWeightBytes = kChannels * kW4SlabK / 2;  // of a slab of a tile
constexpr int kTokenBytes = kW4SlabK * 2;  // of a token in a slab

template <typename T_, int kTokens_, W4Kind kKind_>
struct Shape {
  using T = T_;
  static constexpr int kTokens = kTokens_, kBlocksM = kTokens / 8;
  static constexpr W4Kind kKind = kKind_;
  static constexpr int kBlocksN = kTokens == 32 ? 2 : 1;  // m16 blocks of a warp
  static constexpr int kThreads = kChannels / 16 / kBlocksN * 32;
  using Groups = GroupCopies<kChannels, kThreads>;
  // CTAs of an SM: twelve or sixteen warps hide each other's latency; 64 tokens have no registers for more than eight.
  static constexpr int kPerSm = kTokens == 32 ? 3 : 2;
  // In flight per CTA: 40 KB of weights for few tokens, 16 KB where the tensor cores are the limit.
  static constexpr int kStages = kTokens == 8 ? 7 : kTokens == 16 ? 6 : kTokens == 32 ? 4 : 3;
  // Four rows of fp32 scales and minima are the most a stage can have.
  static constexpr int kMostBytes = kStages * (kWeightBytes + kTokens * kTokenBytes + 4 * kChannels * 8);
  static_assert(kMostBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
  static constexpr int kTileFloats = kChannels * kTokens;
  // Sums that k-steps take in turns: an mma waits for the one before it on the same sums.
  static constexpr int kChains = kTokens == 8 ? 2 : 1;
};

struct Job {
  GemmW4A16Args a;
  Epilogue e;
  GroupRows groups;
  int32_t tiles_m, slabs, blocks_n;
  int32_t run, longer;  // slabs of a CTA; the first `longer` have one more
  int32_t stage_bytes;
};

__device__ __forceinline__ int begin_of(const Job& job, int cta) { return cta * job.run + min(cta, job.longer); }
// The CTA that has a slab.
__device__ __forceinline__ int owner_of(const Job& job, int unit) {
  const int head = job.longer * (job.run + 1);
  return unit < head ? unit / (job.run + 1) : job.longer + (unit - head) / job.run;
}

// A place in the row of all slabs.
struct Cursor {
  int tile, slab;
  int tile_m, tile_n;  // tile = tile_n * tiles_m + tile_m: neighbours share weights
  __device__ __forceinline__ void advance(const Job& job) {
    if (++slab < job.slabs) return;
    slab = 0, ++tile;
    if (++tile_m == job.tiles_m) tile_m = 0, ++tile_n;
  }
};

template <typename S>
__device__ __forceinline__ void load_weights(const Job& job, uint32_t stage, const Cursor& at) {
  const GemmW4A16Args& a = job.a;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // Channels that do not exist are copied from others: what they give is not stored.
  const uint32_t target = stage + warp * S::kBlocksN * kW4BlockBytes + lane * 16;
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int block = min(at.tile_n * (kChannels / kW4Rows) + warp * S::kBlocksN + i, job.blocks_n - 1);
    const uint8_t* source = a.weight.packed + (int64_t(at.slab) * a.weight.blocks + block) * kW4BlockBytes + lane * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::cp_async_16(target + i * kW4BlockBytes + half * 512, source + half * 512, 16);
    }
  }
}

template <typename S>
__device__ __forceinline__ void load_tokens_and_groups(const Job& job, const typename S::Groups& groups, uint32_t stage,
                                                       const Cursor& at) {
  const GemmW4A16Args& a = job.a;
  const int tid = threadIdx.x;
  const uint32_t tokens = stage + kWeightBytes;
  const int chunk = tid & 15, row0 = tid >> 4, k = at.slab * kW4SlabK + chunk * 8;
  const int bytes = max(0, min(16, (a.weight.k - k) * 2));
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + (bytes > 0 ? k : 0);
  constexpr int kRowsAtOnce = S::kThreads / 16;
#pragma unroll
  for (int i = 0; i < (S::kTokens + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + row0, m = min(at.tile_m * S::kTokens + row, a.m - 1);
    if (S::kTokens < kRowsAtOnce && row >= S::kTokens) break;
    // Eight rows further is the same place of the swizzle.
    ptx::cp_async_16(tokens + row0 * kTokenBytes + ((chunk ^ (row0 & 7)) << 4) + i * kRowsAtOnce * kTokenBytes,
                     x + int64_t(m) * a.x_stride, at.tile_m * S::kTokens + row < a.m ? bytes : 0);
  }
  groups.start(a.weight, job.groups, tokens + S::kTokens * kTokenBytes, at.slab, at.tile_n * kChannels);
}

template <typename S>
__device__ __forceinline__ void load_slab(const Job& job, const typename S::Groups& groups, uint32_t stage,
                                          const Cursor& at) {
  load_weights<S>(job, stage, at);
  load_tokens_and_groups<S>(job, groups, stage, at);
}

// The fragments b of k-step `step` of a slab. Eight tokens come two k-steps at a time: `pair` keeps the odd one's.
template <typename S>
__device__ __forceinline__ void load_tokens(uint32_t tokens, int step, int lane, uint32_t (&pair)[4],
                                            uint32_t (&b)[S::kBlocksM][2]) {
  if constexpr (S::kBlocksM == 1) {
    const int row = lane & 7, chunk = 2 * step + (lane >> 3), odd = step & 1;
    if (!odd) ptx::ldmatrix_x4(pair, tokens + row * kTokenBytes + ((chunk ^ row) << 4));
    b[0][0] = pair[2 * odd], b[0][1] = pair[2 * odd + 1];
  } else {
#pragma unroll
    for (int j = 0; j < S::kBlocksM / 2; ++j) {
      const int row = 16 * j + (lane & 7) + ((lane >> 4) << 3), chunk = 2 * step + ((lane >> 3) & 1);
      ptx::ldmatrix_x4(pair, tokens + row * kTokenBytes + ((chunk ^ (row & 7)) << 4));
      b[2 * j][0] = pair[0], b[2 * j][1] = pair[1], b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
    }
  }
}

template <typename S>
struct Sums {
  float total[S::kBlocksN][S::kBlocksM][4];
  float part[S::kChains][S::kBlocksN][S::kBlocksM][4];  // since the last scale
  float tokens[S::kKind == W4Kind::kMinimum ? S::kBlocksM : 1][4];  // of the activations alone
};

// kShift: the row_shift of the groups; -1: only known at run time.
template <typename S, int kShift>
__device__ __forceinline__ void multiply_slab(const Job& job, const uint8_t* stage, const uint32_t* book,
                                              Sums<S>& sums) {
  using T = typename S::T;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, channel = (warp * S::kBlocksN) * 16 + (lane >> 2);
  const uint8_t* rows = stage + kWeightBytes + S::kTokens * kTokenBytes;
  const uint32_t tokens = ptx::smem_u32(stage + kWeightBytes);
  const W4Weight& w = job.a.weight;
  const int shift = kShift >= 0 ? kShift : job.groups.row_shift;
  uint32_t offset[S::kBlocksN][2];  // what is subtracted from 128 + q (1024 + q), of channels g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[S::kBlocksN][4];
#pragma unroll
    for (int i = 0; i < S::kBlocksN; ++i) {
      const uint4 v =
          *reinterpret_cast<const uint4*>(stage + (warp * S::kBlocksN + i) * kW4BlockBytes + half * 512 + lane * 16);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int quarter = 2 * half + part, per_row = 4 >> shift;  // quarters of a slab
      const uint8_t* row = rows + (quarter >> (2 - shift)) * job.groups.row_bytes;
      if (S::kKind != W4Kind::kCodebook && (quarter & (per_row - 1)) == 0) {
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t zero = S::kKind == W4Kind::kMinimum ? 0u : 8u;
            if (S::kKind == W4Kind::kZeroPoint && w.zero_point) {
              zero = row[kChannels * job.groups.value_bytes + channel + 16 * i + 8 * e];
            }
            offset[i][e] = pair_offset<T>(zero);
          }
        }
      }
      uint32_t pair[4];
#pragma unroll
      for (int s = 2 * part; s < 2 * part + 2; ++s) {
        uint32_t b[S::kBlocksM][2];
        load_tokens<S>(tokens, 4 * half + s, lane, pair, b);
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) {
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if constexpr (S::kKind == W4Kind::kCodebook) {
              a[r] = pair_of(words[i][s], r, book);
            } else {
              a[r] = pair_of<T>(words[i][s], r, offset[i][r & 1]);
            }
          }
#pragma unroll
          for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_16(T(), sums.part[s % S::kChains][i][j], a, b[j][0], b[j][1]);
        }
        if constexpr (S::kKind == W4Kind::kMinimum) {
          const uint32_t ones[4] = {Pairs<T>::kOnes, Pairs<T>::kOnes, Pairs<T>::kOnes, Pairs<T>::kOnes};
#pragma unroll
          for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_16(T(), sums.tokens[j], ones, b[j][0], b[j][1]);
        }
      }
      if (((quarter + 1) & (per_row - 1)) == 0) {
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float scale = row_value(row, w.scale_type, channel + 16 * i + 8 * e);
            float low = 0.0f;
            if constexpr (S::kKind == W4Kind::kMinimum) {
              low = row_value(row + kChannels * job.groups.value_bytes, w.scale_type, channel + 16 * i + 8 * e);
            }
#pragma unroll
            for (int j = 0; j < S::kBlocksM; ++j) {
#pragma unroll
              for (int c = 2 * e; c < 2 * e + 2; ++c) {
                float& total = sums.total[i][j][c];
                float part = sums.part[0][i][j][c];
                if constexpr (S::kChains == 2) part = __fadd_rn(part, sums.part[1][i][j][c]);
                total = __fmaf_rn(part, scale, total);
                if constexpr (S::kKind == W4Kind::kMinimum) total = __fmaf_rn(sums.tokens[j][c], low, total);
#pragma unroll
                for (int p = 0; p < S::kChains; ++p) sums.part[p][i][j][c] = 0.0f;
              }
            }
          }
        }
        if constexpr (S::kKind == W4Kind::kMinimum) {
#pragma unroll
          for (int j = 0; j < S::kBlocksM; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sums.tokens[j][c] = 0.0f;
          }
        }
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void store_tile(const Job& job, const Cursor& at, const Sums<S>& sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = at.tile_m * S::kTokens;
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int n0 = at.tile_n * kChannels + (warp * S::kBlocksN + i) * 16, n = n0 + (lane >> 2);
    const float low = job.a.bias && n < job.e.n ? __ldg(job.a.bias + n) : -0.0f;
    const float high = job.a.bias && n + 8 < job.e.n ? __ldg(job.a.bias + n + 8) : -0.0f;
    store_blocks<S::kBlocksM>(job.e, n0, m0, lane, [&](int j, float (&v)[4]) {
      const float (&d)[4] = sums.total[i][j];
      v[0] = __fadd_rn(d[0], low), v[1] = __fadd_rn(d[1], low);
      v[2] = __fadd_rn(d[2], high), v[3] = __fadd_rn(d[3], high);
    });
  }
}

// Leaves this CTA's sums of a tile it shares; the last to come replaces its own by those of all, and gets true.
template <typename S>
__device__ __forceinline__ bool meet(const Job& job, int tile, bool from_first_slab, Sums<S>& sums) {
  __shared__ bool is_last;
  constexpr int kQuads = S::kBlocksN * S::kBlocksM;
  // A CTA enters at most one tile in its middle, and leaves at most one that it entered at its beginning.
  const auto slot = [&](int cta, bool first) {
    return reinterpret_cast<float4*>(job.a.partials + int64_t(2 * cta + (first ? 1 : 0)) * S::kTileFloats) +
           threadIdx.x;
  };
  float4* own = slot(blockIdx.x, from_first_slab);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float (&d)[4] = sums.total[q / S::kBlocksM][q % S::kBlocksM];
    __stcg(own + q * S::kThreads, make_float4(d[0], d[1], d[2], d[3]));
  }
  const int first = owner_of(job, tile * job.slabs), last = owner_of(job, (tile + 1) * job.slabs - 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(job.a.counters + tile, 1) == last - first;
    if (is_last) job.a.counters[tile] = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float (&d)[4] = sums.total[q / S::kBlocksM][q % S::kBlocksM];
    d[0] = d[1] = d[2] = d[3] = 0.0f;
  }
  // Loads take long, so several are on their way at once; the order of additions is the same.
  constexpr int kAtOnce = kQuads <= 2 ? 4 : kQuads <= 4 ? 2 : 1;
  for (int c0 = first; c0 <= last; c0 += kAtOnce) {
    float4 v[kAtOnce][kQuads];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      const int c = min(c0 + p, last);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) v[p][q] = __ldcg(slot(c, c == first) + q * S::kThreads);
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (c0 + p > last) break;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        float (&d)[4] = sums.total[q / S::kBlocksM][q % S::kBlocksM];
        d[0] = __fadd_rn(d[0], v[p][q].x), d[1] = __fadd_rn(d[1], v[p][q].y);
        d[2] = __fadd_rn(d[2], v[p][q].z), d[3] = __fadd_rn(d[3], v[p][q].w);
      }
    }
  }
  return true;
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kPerSm) gemm_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint32_t book[S::kKind == W4Kind::kCodebook ? 256 : 1];  // pairs of entries, by two codes
  const uint32_t base = ptx::smem_u32(shared);
  const int begin = begin_of(job, blockIdx.x), count = begin_of(job, blockIdx.x + 1) - begin;
  Cursor at;
  at.tile = begin / job.slabs, at.slab = begin - at.tile * job.slabs;
  at.tile_n = at.tile / job.tiles_m, at.tile_m = at.tile - at.tile_n * job.tiles_m;
  Cursor ahead = at;
  int first_slab = at.slab;
  const typename S::Groups groups(job.a.weight, job.groups);
  ptx::grid_dependency_wait();  // whatever wrote x or the weights, or shares the partial sums
  if constexpr (S::kKind == W4Kind::kCodebook) {
    fill_book<typename S::T>(book, job.a.weight.codebook, S::kThreads);
  }
#pragma unroll 1
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < count) {
      load_slab<S>(job, groups, base + s * job.stage_bytes, ahead);
      ahead.advance(job);
    }
    ptx::cp_async_commit();
  }
  Sums<S> sums = {};
  int stage = 0, free_stage = S::kStages - 1;
  for (int i = 0; i < count; ++i) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // slab i has landed for everybody, and everybody is done with the stage refilled below
    if (i + S::kStages - 1 < count) {
      load_slab<S>(job, groups, base + free_stage * job.stage_bytes, ahead);
      ahead.advance(job);
    }
    ptx::cp_async_commit();
    const uint8_t* landed = shared + stage * job.stage_bytes;
    if (job.groups.row_shift == 0) {  // a loop of its own for the common groups, of 128 k and more
      multiply_slab<S, 0>(job, landed, book, sums);
    } else {
      multiply_slab<S, -1>(job, landed, book, sums);
    }
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == S::kStages ? 0 : free_stage + 1;
    if (at.slab == job.slabs - 1 || i == count - 1) {
      const bool whole = first_slab == 0 && at.slab == job.slabs - 1;
      if (whole || meet<S>(job, at.tile, first_slab == 0, sums)) store_tile<S>(job, at, sums);
      sums = {};
      first_slab = 0;
    }
    at.advance(job);
  }
  ptx::grid_launch_dependents();
}

template <typename S>
void run(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  Job job = {};
  job.a = args;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.groups = make_group_rows(args.weight, kChannels);
  job.tiles_m = static_cast<int32_t>(blocks(args.m, S::kTokens));
  job.slabs = static_cast<int32_t>(w4_slabs(args.weight.k));
  job.blocks_n = static_cast<int32_t>(w4_blocks(args.weight.n));
  const int64_t units = int64_t(job.tiles_m) * blocks(args.weight.n, kChannels) * job.slabs;
  if (units > 0x7fffffff) throw std::invalid_argument("gemm_w4a16: expected less than 2^31 slabs of work");
  job.run = static_cast<int32_t>(units / plan.ctas), job.longer = static_cast<int32_t>(units % plan.ctas);
  job.stage_bytes = kWeightBytes + S::kTokens * kTokenBytes + (job.groups.row_bytes << job.groups.row_shift);
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_kernel<S>), S::kMostBytes, allowed);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.ctas));
  shape.block = dim3(S::kThreads);
  shape.shared_bytes = static_cast<size_t>(S::kStages) * job.stage_bytes;
  shape.dependent = dependent && device_capability() >= 90;
  launch(gemm_kernel<S>, shape, stream, "gemm_w4a16", job);
}

template <typename T, W4Kind kKind>
void run_tokens(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  switch (plan.tokens) {
    case 8:
      return run<Shape<T, 8, kKind>>(args, plan, dependent, stream);
    case 16:
      return run<Shape<T, 16, kKind>>(args, plan, dependent, stream);
    case 32:
      return run<Shape<T, 32, kKind>>(args, plan, dependent, stream);
    case 64:
      if constexpr (kKind != W4Kind::kMinimum) return run<Shape<T, 64, kKind>>(args, plan, dependent, stream);
      break;
    default:
      break;
  }
  throw std::invalid_argument("gemm_w4a16: expected a tile of 8, 16, 32 or (without minima) 64 tokens, got " +
                              std::to_string(plan.tokens));
}

}  // namespace

void gemm_w4a16_mma(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  for_type_and_kind(args, [&](auto type, auto kind) {
    run_tokens<decltype(type), decltype(kind)::value>(args, plan, dependent, stream);
  });
}

}  // namespace qk::cuda
