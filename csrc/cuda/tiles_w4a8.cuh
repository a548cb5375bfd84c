// What the kernels of W4A8 products by mma.sync share, whatever scales their groups have (gemm_w4a8_mma.cu and
// gemm_w4a8_multiplier_mma.cu): two kinds of tiles, the way of slabs into shared memory, and that of outputs out of it.
//
//     narrow   32 channels x 8 or 16 tokens: the eight warps of a CTA take slabs in turns, each with stages of its own
//     wide     128 channels x 64 or 128 tokens: warps as 4 along channels x 2 along tokens, all over the same stages
//
// A stage begins with the codes of a slab, then come its tokens, then what belongs to its groups.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "groups_w4.cuh"
#include "host.h"
#include "launch_w4.h"
#include "operands_w4a8.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Job {
  GemmW4A8Args a;
  Epilogue e;
  GroupRows groups;
  int32_t slabs, blocks_n, stage_bytes;
};

template <int kTokens_>
struct NarrowTile {
  static constexpr int kTokens = kTokens_, kBlocksM = kTokens / 8, kChannels = 32, kBlocksN = 2;
  static constexpr int kStages = kTokens == 8 ? 3 : 2;  // two CTAs fit an SM of 227 KB
  static constexpr int kWeightBytes = kChannels * kW4SlabK / 2;  // of a slab
  static constexpr int kOutputs = kChannels * kTokens, kPerThread = kOutputs / kThreads;
};

template <int kTokens_>
struct WideTile {
  static constexpr int kTokens = kTokens_, kChannels = 128, kBlocksN = 2, kBlocksM = kTokens / 16;
  static constexpr int kStages = kTokens == 64 ? 4 : 3;
  static constexpr int kWeightBytes = kChannels * kW4SlabK / 2;
};

// ---- Into shared memory --------------------------------------------------------------------------------------------

// Starts the copies of the codes of kChannels channels from n0 on in a slab; blocks that do not exist get the codes of
// others. `thread`: of kCopiers.
template <int kChannels, int kCopiers>
__device__ __forceinline__ void load_codes(const Job& job, uint32_t target, int slab, int n0, int thread) {
  const W4Weight& w = job.a.weight;
#pragma unroll
  for (int i = 0; i < kChannels / kW4Rows * kW4BlockBytes / 16 / kCopiers; ++i) {
    const int at = i * kCopiers + thread, block = min(n0 / kW4Rows + at / 64, job.blocks_n - 1);
    ptx::cp_async_16(target + at * 16, w.packed + (int64_t(slab) * w.blocks + block) * kW4BlockBytes + at % 64 * 16,
                     16);
  }
}

// The same of kTokens tokens from m0 on.
template <int kTokens, int kCopiers>
__device__ __forceinline__ void load_activations(const Job& job, uint32_t target, int slab, int m0, int thread) {
#pragma unroll
  for (int i = 0; i < kTokens * 8 / kCopiers; ++i) {
    load_token_chunk(job.a, target, i * (kCopiers / 8) + (thread >> 3), thread & 7, slab, m0);
  }
}

// Walks all slabs of a wide tile through a ring of kStages stages: load(address, slab) starts the copies of a slab into
// a stage, multiply(offset, slab) reads them where they have landed.
template <int kStages, typename Load, typename Multiply>
__device__ __forceinline__ void walk_slabs(const Job& job, uint32_t base, const Load& load, const Multiply& multiply) {
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < job.slabs) load(base + s * job.stage_bytes, s);
    ptx::cp_async_commit();
  }
  int at_stage = 0, free_stage = kStages - 1;
  for (int slab = 0; slab < job.slabs; ++slab) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the slab has landed for everybody, and everybody is done with the stage refilled below
    if (slab + kStages - 1 < job.slabs) load(base + free_stage * job.stage_bytes, slab + kStages - 1);
    ptx::cp_async_commit();
    multiply(at_stage * job.stage_bytes, slab);
    at_stage = at_stage + 1 == kStages ? 0 : at_stage + 1;
    free_stage = free_stage + 1 == kStages ? 0 : free_stage + 1;
  }
}

// ---- Out of a narrow tile ------------------------------------------------------------------------------------------

// A thread's outputs: words `threadIdx.x + i * kThreads` of the tile's fragments [kBlocksN][kBlocksM][lane][4].
template <typename S>
struct OwnOutputs {
  int channel[S::kPerThread], token[S::kPerThread];

  __device__ __forceinline__ OwnOutputs() {
#pragma unroll
    for (int i = 0; i < S::kPerThread; ++i) {
      const int word = threadIdx.x + i * kThreads, c = word & 3, l = (word >> 2) & 31, fragment = word >> 7;
      channel[i] = fragment / S::kBlocksM * 16 + (l >> 2) + 8 * (c >> 1);
      token[i] = fragment % S::kBlocksM * 8 + 2 * (l & 3) + (c & 1);
    }
  }

  // Stores value(i), through kOutputs floats of shared memory, so that neighbours store neighbouring channels.
  template <typename Value>
  __device__ __forceinline__ void store(const Epilogue& e, float* outputs, int n0, int m0, const Value& value) const {
#pragma unroll
    for (int i = 0; i < S::kPerThread; ++i) outputs[token[i] * S::kChannels + channel[i]] = value(i);
    __syncthreads();
    for (int at = threadIdx.x; at < S::kOutputs; at += kThreads) {
      const int m = m0 + at / S::kChannels, n = n0 + at % S::kChannels;
      if (m >= e.m || n >= e.n) continue;
      const int64_t to = int64_t(m) * e.y_stride + n;
      if (e.y_dtype == DType::kF32) {
        static_cast<float*>(e.y)[to] = outputs[at];
      } else {
        store_u16(e, to, pack_pair(e.y_dtype, outputs[at], 0.0f));
      }
    }
  }
};

// ---- Launches ------------------------------------------------------------------------------------------------------

template <typename S>
Job make_job(const GemmW4A8Args& args) {
  Job job = {};
  job.a = args;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.groups = make_group_rows(args.weight, S::kChannels);
  job.slabs = static_cast<int32_t>(w4_slabs(args.weight.k));
  job.blocks_n = static_cast<int32_t>(w4_blocks(args.weight.n));
  job.stage_bytes = S::kWeightBytes + S::kTokens * kTokenBytes + (job.groups.row_bytes << job.groups.row_shift);
  return job;
}

template <typename S>
void launch_narrow(void (*kernel)(Job), const Job& job, int shared_bytes, bool dependent, cudaStream_t stream,
                   const char* name) {
  LaunchShape shape;
  shape.grid = dim3(blocks(job.e.n, S::kChannels), blocks(job.e.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  shape.dependent = dependent;
  launch(kernel, shape, stream, name, job);
}

// Neighbours share weights. Not as a dependent launch: beside the quantizer's last CTAs its own would settle two to a
// multiprocessor while others stay idle.
template <typename S>
void launch_wide(void (*kernel)(Job), const Job& job, cudaStream_t stream, const char* name) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(kernel), S::kMostBytes, allowed);
  LaunchShape shape;
  shape.grid = dim3(blocks(job.e.m, S::kTokens), blocks(job.e.n, S::kChannels));
  shape.block = dim3(kThreads);
  shape.shared_bytes = static_cast<size_t>(S::kStages) * job.stage_bytes;
  launch(kernel, shape, stream, name, job);
}

// run(std::integral_constant<int, tokens>()) for a tile that there is.
template <typename Run>
void with_tile(const char* name, int32_t tokens, const Run& run) {
  switch (tokens) {
    case 8:
      return run(std::integral_constant<int, 8>());
    case 16:
      return run(std::integral_constant<int, 16>());
    case 64:
      return run(std::integral_constant<int, 64>());
    case 128:
      return run(std::integral_constant<int, 128>());
    default:
      throw std::invalid_argument(std::string(name) + ": expected a tile of 8, 16, 64 or 128 tokens, got " +
                                  std::to_string(tokens));
  }
}

}  // namespace
}  // namespace qk::cuda
