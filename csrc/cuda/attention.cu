// Attention of few queries over many keys, heads of queries sharing heads of keys: what a token costs in a cache.
//
// The queries that read one head of keys, heads x tokens, are the rows of mma.sync m16n8k16. Each warp takes 16 keys at
// a time and keeps maximum, sum and outputs of its own (online softmax, Milakov and Gimelshein 2018; partial results
// over parts of the keys, as in Flash-Decoding, Dao et al. 2023); they are joined first in the CTA, then, in the order
// of the parts, so that results repeat to the bit: on Hopper, of few parts, by the CTAs of a cluster, each for some of
// the outputs, which read one another's shared memory; else by the last CTA of a head to finish, through memory.
//
// Keys and values go from memory to registers in vectors of 16 bytes and never see shared memory: a product may take
// its features (and its outputs) in any order, so a lane's 8 neighbours count as features 2t, 2t + 1, 2t + 8, 2t + 9 of
// two steps. Steps that the mask hides, but for a warp's first, are not read: a static cache costs what is in it.
//
// Products are fp32 sums of 16-bit operands; exp2(score - maximum) is rounded to 16 bits for the product with values,
// not for the sum it is divided by.
//
// Limit: bytes of keys and values over the memory's rate.
#include <algorithm>

#include "attention.h"
#include "rows.cuh"

namespace qk::cuda {
namespace {

constexpr int kAttentionWarps = 4, kKeys = 16;  // keys of a warp's step
static_assert(kAttentionWarps * kKeys == kAttentionStep);
constexpr int kMostOfCluster = 8;  // parts
constexpr float kLog2E = 1.44269504f;

// exp2, 0 where there is nothing yet: -inf - -inf is no number.
__device__ __forceinline__ float weight_of(float score, float maximum) {
  return score == -INFINITY ? 0.0f : exp2f(__fsub_rn(score, maximum));
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// Row `row` of the queries that read one head of keys.
struct Query {
  int head, token;
};
__device__ __forceinline__ Query query_of(const AttentionArgs& a, int key_head, int row) {
  const int shared = a.heads / a.key_heads;
  return {key_head * shared + row % shared, row / shared};
}

template <typename T, int kSize>
struct Part {
  static constexpr int kHalves = kSize / 64, kTiles = kSize / 8;
  float out[kTiles][4];  // rows g and g + 8; columns of tile n: features 64 (n / 8) + 8 (2t + e) + n % 8
  float maximum[2], sum[2];
};

// What is joined: the warps of a CTA, then the parts of a head.
constexpr int kMostParts = 64;
template <int kSize>
struct Shared {
  float out[kAttentionWarps][kAttentionRows][kSize];
  float2 state[kMostParts][kAttentionRows];  // maximum and sum
  float weight[kMostParts][kAttentionRows];
  float2 joined[kAttentionRows];  // maximum and sum of all
  float2 own[kAttentionRows];  // the same of this CTA alone, for its cluster
  bool last;
};

template <typename T, int kSize>
__device__ __forceinline__ void attend(const AttentionArgs& a, int key_head, int first_row, int rows, int64_t begin,
                                       int64_t end, Part<T, kSize>& part) {
  constexpr int kHalves = Part<T, kSize>::kHalves, kTiles = Part<T, kSize>::kTiles, kQuarters = kSize / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, batch = blockIdx.z;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) part.out[n][0] = part.out[n][1] = part.out[n][2] = part.out[n][3] = 0.0f;
  part.maximum[0] = part.maximum[1] = -INFINITY, part.sum[0] = part.sum[1] = 0.0f;

  uint4 q[kQuarters][2];
  const uint8_t* seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool real = g + 8 * r < rows;
    const Query at = query_of(a, key_head, first_row + (real ? g + 8 * r : 0));
    const T* row = static_cast<const T*>(a.q) + batch * a.q_at.batch + at.head * a.q_at.head + at.token * a.q_at.token;
#pragma unroll
    for (int j = 0; j < kQuarters; ++j) {
      q[j][r] = real ? *reinterpret_cast<const uint4*>(row + 32 * j + 8 * t) : make_uint4(0, 0, 0, 0);
    }
    seen[r] = a.mask + batch * a.mask_at.batch + at.head * a.mask_at.head + at.token * a.mask_at.token;
  }
  const T* keys = static_cast<const T*>(a.k) + batch * a.k_at.batch + key_head * a.k_at.head;
  const T* values = static_cast<const T*>(a.v) + batch * a.v_at.batch + key_head * a.v_at.head;

  for (int64_t base = begin + warp * kKeys; base < end; base += kAttentionStep) {
    uint8_t sees[2][4];  // rows g, g + 8; keys 2t, 2t + 1 and those + 8
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t key = base + 8 * (e / 2) + 2 * t + e % 2;
        const bool there = key < end && g + 8 * r < rows;
        sees[r][e] = !there ? 0 : a.mask ? seen[r][key] : 1;
      }
    }
    // the first keys are asked for together with the mask, others where it shows them
    const bool first = base < begin + kAttentionStep;
    const auto hidden = [&] {
      bool any = false;
#pragma unroll
      for (int e = 0; e < 8; ++e) any |= sees[e / 4][e % 4] != 0;
      return !__any_sync(0xffffffffu, any);
    };
    if (!first && hidden()) continue;

    uint4 k[2][kQuarters], v[4][kHalves];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t key = base + 8 * i + g;
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        k[i][j] = key < end ? *reinterpret_cast<const uint4*>(keys + key * a.k_at.token + 32 * j + 8 * t)
                            : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t key = base + 8 * (i / 2) + 2 * t + i % 2;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        v[i][h] = key < end ? *reinterpret_cast<const uint4*>(values + key * a.v_at.token + 64 * h + 8 * g)
                            : make_uint4(0, 0, 0, 0);
      }
    }

    if (first && hidden()) continue;

    float score[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      score[i][0] = score[i][1] = score[i][2] = score[i][3] = 0.0f;
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        const uint32_t low[4] = {q[j][0].x, q[j][1].x, q[j][0].y, q[j][1].y};
        const uint32_t high[4] = {q[j][0].z, q[j][1].z, q[j][0].w, q[j][1].w};
        ptx::mma_16(T{}, score[i], low, k[i][j].x, k[i][j].y);
        ptx::mma_16(T{}, score[i], high, k[i][j].z, k[i][j].w);
      }
    }

    uint32_t weights[4];  // rows g, g + 8 of keys 2t, 2t + 1, then of those + 8
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float s[4], most = part.maximum[r];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float scaled = __fmul_rn(score[e / 2][2 * r + e % 2], __fmul_rn(a.scale, kLog2E));
        s[e] = sees[r][e] ? scaled : -INFINITY;
        most = fmaxf(most, s[e]);  // NaN comes back from the sum
      }
      most = quad_max(most);
      shrink[r] = weight_of(part.maximum[r], most);
      float p[4], sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[e] = weight_of(s[e], most);
        sum = __fadd_rn(sum, p[e]);
      }
      part.maximum[r] = most;
      part.sum[r] = __fadd_rn(__fmul_rn(part.sum[r], shrink[r]), quad_sum(sum));
      weights[r] = pack_pair<T>(p[0], p[1]);
      weights[2 + r] = pack_pair<T>(p[2], p[3]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int h = n / 8, word = n % 8 / 2;
      const auto select = [&](const uint4& w) { return word == 0 ? w.x : word == 1 ? w.y : word == 2 ? w.z : w.w; };
      const uint32_t order = n % 2 ? 0x7632 : 0x5410;
#pragma unroll
      for (int e = 0; e < 4; ++e) part.out[n][e] = __fmul_rn(part.out[n][e], shrink[e / 2]);
      ptx::mma_16(T{}, part.out[n], weights, __byte_perm(select(v[0][h]), select(v[1][h]), order),
                  __byte_perm(select(v[2][h]), select(v[3][h]), order));
    }
  }
}

// How much each of `count` partial results weighs in a row, and what the row adds up to: a warp per row.
template <int kSize>
__device__ __forceinline__ void weigh(Shared<kSize>& shared, int rows, int count) {
  __syncthreads();
  const int lane = threadIdx.x & 31;
  for (int row = threadIdx.x >> 5; row < rows; row += kAttentionWarps) {
    float2 of[kMostParts / 32];
    float maximum = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      of[j] = lane + 32 * j < count ? shared.state[lane + 32 * j][row] : make_float2(-INFINITY, 0.0f);
      maximum = fmaxf(maximum, of[j].x);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, step));
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      const float weight = weight_of(of[j].x, maximum);
      sum = __fadd_rn(sum, __fmul_rn(of[j].y, weight));
      if (lane + 32 * j < count) shared.weight[lane + 32 * j][row] = weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) shared.joined[row] = make_float2(maximum, sum);
  }
  __syncthreads();
}

// Four outputs of a row, joined in order; value(i) is what the i-th has for them.
template <int kSize, typename Value>
__device__ __forceinline__ float4 joined(const Shared<kSize>& shared, int row, int count, const Value& value) {
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float weight = shared.weight[i][row];
    const float4 v = value(i);
    out.x = __fmaf_rn(v.x, weight, out.x), out.y = __fmaf_rn(v.y, weight, out.y);
    out.z = __fmaf_rn(v.z, weight, out.z), out.w = __fmaf_rn(v.w, weight, out.w);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store(const AttentionArgs& a, int key_head, int row, int feature, float4 out,
                                      float sum) {
  const Query at = query_of(a, key_head, row);
  T* y = static_cast<T*>(a.out) + blockIdx.z * a.out_at.batch + at.head * a.out_at.head + at.token * a.out_at.token;
  const auto over = [&](float v) { return sum == 0.0f ? 0.0f : __fdividef(v, sum); };
  *reinterpret_cast<uint2*>(y + feature) =
      make_uint2(pack_pair<T>(over(out.x), over(out.y)), pack_pair<T>(over(out.z), over(out.w)));
}

// Every step-th of a head's outputs from `first` on, from all of its parts: state(p, row) is the maximum and sum of
// part p, value(p, i) four of its outputs.
template <typename T, int kSize, typename State, typename Value>
__device__ __forceinline__ void join_parts(const AttentionArgs& a, int key_head, int first_row, int rows,
                                           Shared<kSize>& shared, int first, int step, const State& state,
                                           const Value& value) {
  constexpr int kFours = kSize / 4;
  for (int i = threadIdx.x; i < rows * a.parts; i += blockDim.x) {
    shared.state[i / rows][i % rows] = state(i / rows, i % rows);
  }
  weigh(shared, rows, a.parts);
  for (int i = first; i < rows * kFours; i += step) {
    const float4 out = joined(shared, i / kFours, a.parts, [&](int p) { return value(p, i); });
    store<T>(a, key_head, first_row + i / kFours, i % kFours * 4, out, shared.joined[i / kFours].y);
  }
}

// This CTA's share of a head's outputs. The CTAs of the cluster have the head's parts, each its outputs in
// shared.out[0].
template <typename T, int kSize>
__device__ __forceinline__ void join_cluster(const AttentionArgs& a, int key_head, int first_row, int rows,
                                             Shared<kSize>& shared) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x < rows) shared.own[threadIdx.x] = shared.joined[threadIdx.x];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const uint32_t own = ptx::smem_u32(shared.own), out = ptx::smem_u32(shared.out[0]);
  join_parts<T>(
      a, key_head, first_row, rows, shared, blockIdx.x + a.parts * threadIdx.x, a.parts * blockDim.x,
      [&](int p, int row) { return ptx::load_there_2(ptx::cluster_address(own, p) + row * sizeof(float2)); },
      [&](int p, int i) { return ptx::load_there_4(ptx::cluster_address(out, p) + i * sizeof(float4)); });
  __syncwarp();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();  // nobody leaves while others read
#endif
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kAttentionWarps * 32, 2) attention_kernel(const AttentionArgs a) {
  ptx::grid_launch_dependents();  // a product that follows fetches weights, which nothing here writes
  ptx::grid_dependency_wait();
  __shared__ Shared<kSize> shared;
  const int tiles = gridDim.y / a.key_heads, key_head = blockIdx.y / tiles;
  const int first_row = blockIdx.y % tiles * kAttentionRows;
  const int rows = min(kAttentionRows, a.heads / a.key_heads * a.tokens - first_row);
  const int64_t begin = blockIdx.x * a.part, end = min(a.length, begin + a.part);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  {
    Part<T, kSize> part;
    attend<T, kSize>(a, key_head, first_row, rows, begin, end, part);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      if (row >= rows) continue;
      shared.state[warp][row] = make_float2(part.maximum[r], part.sum[r]);
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        float* to = &shared.out[warp][row][64 * (n / 8) + n % 8];
        to[16 * t] = part.out[n][2 * r], to[16 * t + 8] = part.out[n][2 * r + 1];
      }
    }
  }
  weigh(shared, rows, kAttentionWarps);

  // of a head and part: outputs [row][feature], then maximum and sum of each row
  constexpr int kFours = kSize / 4, kOutputs = kAttentionRows * kSize, kPartial = kOutputs + 2 * kAttentionRows;
  const int64_t of_head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  float* parts = a.partial + of_head * a.parts * kPartial;
  float* partial = parts + blockIdx.x * kPartial;
  for (int i = threadIdx.x; i < rows * kFours; i += blockDim.x) {
    const int row = i / kFours, feature = i % kFours * 4;
    const float4 out = joined(shared, row, kAttentionWarps,
                              [&](int w) { return *reinterpret_cast<const float4*>(&shared.out[w][row][feature]); });
    if (a.parts == 1) {
      store<T>(a, key_head, first_row + row, feature, out, shared.joined[row].y);
    } else if (a.clustered) {
      *reinterpret_cast<float4*>(&shared.out[0][row][feature]) = out;  // no other thread has read what was there
    } else {
      reinterpret_cast<float4*>(partial)[i] = out;
    }
  }
  if (a.parts == 1) return;
  if (a.clustered) return join_cluster<T>(a, key_head, first_row, rows, shared);
  if (threadIdx.x < rows) reinterpret_cast<float2*>(partial + kOutputs)[threadIdx.x] = shared.joined[threadIdx.x];

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(a.counters + of_head, 1) == a.parts - 1;
    if (shared.last) a.counters[of_head] = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  const auto part = [&](int p) { return parts + p * kPartial; };
  join_parts<T>(
      a, key_head, first_row, rows, shared, threadIdx.x, blockDim.x,
      [&](int p, int row) { return __ldcg(reinterpret_cast<const float2*>(part(p) + kOutputs) + row); },
      [&](int p, int i) { return __ldcg(reinterpret_cast<const float4*>(part(p)) + i); });
}

int row_tiles(int heads, int key_heads, int tokens) {
  return (heads / key_heads * tokens + kAttentionRows - 1) / kAttentionRows;
}

template <typename T, int kSize>
void run(const AttentionArgs& a, cudaStream_t stream) {
  LaunchShape shape;
  const unsigned rows = static_cast<unsigned>(a.key_heads * row_tiles(a.heads, a.key_heads, a.tokens));
  shape.grid = dim3(static_cast<unsigned>(a.parts), rows, static_cast<unsigned>(a.batch));
  shape.block = dim3(kAttentionWarps * 32);
  shape.dependent = a.dependent;
  if (a.clustered) shape.cluster_x = a.parts;
  launch(attention_kernel<T, kSize>, shape, stream, "attention", a);
}

template <typename T>
void run(const AttentionArgs& a, cudaStream_t stream) {
  if (a.size == 64) return run<T, 64>(a, stream);
  if (a.size == 128) return run<T, 128>(a, stream);
  throw std::invalid_argument("attention: expected heads of 64 or 128 features");
}

}  // namespace

// Twice as many CTAs as multiprocessors are enough to read at the memory's rate, also where a mask hides half of the
// keys (four times as many took 2 to 8 % longer); a part is at least one step. Clusters where a step each is enough for
// them, while they find room at once (32 heads over 8 of keys on an H200: 192 keys 6.0 -> 5.3 us, 512 6.6 -> 6.1; but
// of batches of 8 192 keys 7.7 -> 6.8, 256 8.4 -> 11.7).
AttentionPlan plan_attention(int batch, int heads, int key_heads, int tokens, int size, int64_t length, int capability,
                             int sms) {
  const int64_t head_tiles = int64_t(batch) * key_heads * row_tiles(heads, key_heads, tokens);
  const int64_t steps = std::max<int64_t>(1, (length + kAttentionStep - 1) / kAttentionStep);
  const int64_t most = std::min<int64_t>(steps, kMostParts), fill = 2 * sms / std::max<int64_t>(1, head_tiles);
  const int64_t wanted = std::min(std::max<int64_t>(fill, 1), most);
  const int64_t of_part = (steps + wanted - 1) / wanted, parts = (steps + of_part - 1) / of_part;
  const bool clustered =
      capability == 90 && has_sm90a() && steps <= kMostOfCluster && 2 * head_tiles * steps <= 3 * sms;
  AttentionPlan plan = {};
  plan.parts = static_cast<int>(parts), plan.part = of_part * kAttentionStep;
  if (parts > 1 && !clustered) {
    plan.counters = head_tiles, plan.floats = head_tiles * parts * kAttentionRows * (size + 2);
  }
  return plan;
}

void attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.batch == 0 || args.tokens == 0 || args.heads == 0) return;
  if (args.dtype == DType::kBF16) return run<__nv_bfloat16>(args, stream);
  if (args.dtype == DType::kF16) return run<__half>(args, stream);
  throw std::invalid_argument("attention: expected bfloat16 or float16");
}

}  // namespace qk::cuda
