// What the kernels of 4-bit weights are told, and the packed weight they read. Plain types, for host and device.
//
// Packed weight ("fragment slabs"): codes [N, K], two per byte, become [ceil(K/128)][ceil(N/16)][2][32][16] bytes,
// padded with zero codes:
//
//     slab of 128 k -> block of 16 channels -> half of 64 k -> lane of a warp -> 16 bytes = 4 words
//
// A lane's word s is its part of the m16 fragment A of k-step s, with g = lane / 4, t = lane % 4, so that one 16-byte
// load feeds the tensor cores for 64 k. Nibble i of word s (bits 4i .. 4i + 3) is code (channel, k) of its half:
//
//   kHalf (16-bit activations, mma m16n8k16): register r = i % 4 is a[r], low or high half e = i / 4:
//       channel g + 8 * (r % 2), k = 16 * s + 8 * (r / 2) + 2 * t + e
//     so that (word >> 4r) & 0x000f000f holds the two codes of a[r].
//   kByte (8-bit activations, mma m16n8k32): step s / 2, k half s % 2; byte b = i / 2, row r = i % 2:
//       channel g + 8 * r, k = 32 * (s / 2) + 16 * (s % 2) + 4 * t + b
//     so that word & 0x0f0f0f0f is a[2 * (s % 2)] and (word >> 4) & 0x0f0f0f0f is a[2 * (s % 2) + 1].
//
// What belongs to groups, scales and zero points and minima [N, G], is transposed: [G][round_up(N, 16)].
//
// Weights that read one input may lie side by side, block after block in slabs of all their blocks, and so may what
// belongs to their groups. From multiples of 16 channels on, each is still a weight of this layout, but for the
// distance of its slabs and groups.
#pragma once

#include <cstdint>

#include "args.h"

#ifdef __CUDACC__
#define QK_W4_HOST_DEVICE __host__ __device__
#else
#define QK_W4_HOST_DEVICE
#endif

namespace qk::cuda {

constexpr int kW4SlabK = 128;  // k per slab
constexpr int kW4Rows = 16;  // channels per block
constexpr int kW4BlockBytes = kW4Rows * kW4SlabK / 2;
constexpr int kW4GroupStep = 32;  // groups are a multiple of it, or the whole row

enum class W4Order : int32_t { kHalf = 0, kByte = 1 };

// The value of a code: scale * (q - zero), scale * q + min, scale * book[q]; or, scales of groups being multiples of
// one per channel, channel_scale * (multiplier * (q - zero)), of which the part in brackets is a signed byte.
enum class W4Kind : int32_t { kZeroPoint = 0, kMinimum = 1, kCodebook = 2, kMultiplier = 3 };

struct W4Weight {
  const uint8_t* packed;  // fragment slabs, 16-byte aligned
  int32_t blocks;  // from one slab to the next: w4_blocks(n), or more; 16 times as many values from group to group
  const void* scale;  // [G][16 * blocks], 16-byte aligned, as the other two; kMultiplier: 16 bits that say the
                      // multiplier and, in the high byte, 128 - multiplier * zero
  const uint8_t* zero_point;  // or nullptr: 8 for kZeroPoint, 0 else
  const void* minimum;  // of scale_type, or nullptr
  const float* codebook;  // [16] on the device, or nullptr
  const float* channel_scale;  // kMultiplier: [N]
  ScaleType scale_type;
  W4Kind kind;
  W4Order order;
  int32_t n, k;
  int32_t group;  // k of a group, a multiple of kW4GroupStep; at least k: one group
};

QK_W4_HOST_DEVICE constexpr int64_t w4_blocks(int64_t n) { return (n + kW4Rows - 1) / kW4Rows; }
QK_W4_HOST_DEVICE constexpr int64_t w4_slabs(int64_t k) { return (k + kW4SlabK - 1) / kW4SlabK; }
constexpr int64_t packed_w4_bytes(int64_t n, int64_t k) { return w4_slabs(k) * w4_blocks(n) * kW4BlockBytes; }

// y [M, N] = x [M, K] @ w^T + bias, 16-bit x.
struct GemmW4A16Args {
  W4Weight weight;
  const void* x;
  DType x_dtype;  // kBF16 or kF16
  int64_t x_stride;  // elements between rows, a multiple of 8; x is 16-byte aligned
  const float* bias;  // [N] or nullptr
  int32_t m;
  void* y;
  DType y_dtype;
  int64_t y_stride;
  int32_t* counters;  // as W4Plan says
  float* partials;
};

// Which kernel runs a product, and how its work is cut.
enum class W4Kernel : int32_t {
  kMma = 0,  // mma.sync, sm_80 and up
  kWgmma = 1,  // wgmma, weights in registers, or mma.sync for few tokens; sm_90a
};
struct W4Plan {
  W4Kernel kernel;
  int32_t tokens;  // of a tile
  int32_t phases;  // kWgmma: groups of warps that take the slabs of a tile in turns (w4_channels)
  int32_t ctas;  // that share all slabs in equal runs; kWgmma: clusters. Without meaning to W4A8 by mma.sync
  int64_t counters;  // int32 zeros that the kernel is to be given, and leaves as zeros; kWgmma: 0: tiles are not shared
  int64_t partial_floats;  // of memory for the sums of tiles that several share
  // kWgmma of kMultiplier: the first channels, which a launch before the rest serves in whole waves of wide tiles
  int32_t head_channels, head_tokens;
};

// Whether two phases have all channels, for kWgmma, where there are registers for them: of up to 32 tokens of 16 bits
// by 4-bit codes, and of 32 or 64 of 8 bits by those with multipliers (of fewer, two CTAs of 64 channels each run
// beside one another). bits: of a code.
constexpr bool w4_two_have_all(bool bytes, int bits, int tokens) {
  return bytes ? tokens == 32 || tokens == 64 : bits == 4 && tokens <= 32;
}
// kWgmma: channels of a CTA's tile, by the groups of warps that share its slabs.
constexpr int w4_channels(bool bytes, int bits, int tokens, int phases) {
  if (phases == 2 && w4_two_have_all(bytes, bits, tokens)) return 128;
  return phases == 8 ? 32 : phases > 1 ? 64 : 128;
}
// CTAs of a cluster that fetch a tile of tokens together, for kWgmma.
constexpr int w4_cluster(bool bytes, int tokens, int phases) {
  if (bytes && (phases == 1 || (phases == 2 && w4_two_have_all(bytes, 4, tokens)))) return tokens >= 128 ? 2 : 1;
  return tokens >= 32 || (!bytes && tokens >= 16 && phases == 1) ? 2 : 1;
}
// Whether many warps share a tile of few tokens of 16 bits, one slab each at a time, for kWgmma. bits: of a code.
constexpr bool w4_many_warps(bool bytes, int bits, int tokens, int phases) {
  return !bytes && bits == 4 && tokens <= 16 && phases >= 2;
}
// CTAs of a multiprocessor, for kWgmma: two where their sums leave registers for them.
constexpr int w4_per_sm(bool bytes, int bits, int tokens, W4Kind kind, int phases) {
  if (w4_many_warps(bytes, bits, tokens, phases)) return 2;
  return tokens <= 16 && phases <= 2 && (bytes || kind != W4Kind::kMinimum) ? 2 : 1;
}
// Whether many warps' tiles of 128 channels, of which a multiprocessor holds two, all run at a time: then they are cut
// evenly.
constexpr bool w4_is_even(int64_t n, int sms) { return n <= int64_t(sms) * 2 * 128; }
// The instances of kWgmma. Minima need registers for the sums of tokens; phases are for scales and zero points alone.
constexpr bool w4_has_tile(bool bytes, W4Kind kind, int tokens, int phases) {
  const bool is_power = tokens == 8 || tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128 || tokens == 256;
  const bool two_sums = bytes && kind != W4Kind::kMultiplier;  // of a group, and the total
  // 16-bit activations by 4-bit codes alone have these yet (8-bit ones: w8a16_has_tile).
  if (tokens == 96) return !bytes && phases == 1 && kind != W4Kind::kMinimum;
  if (!is_power && tokens != 192) return false;
  if (phases == 1) return tokens <= (kind == W4Kind::kMinimum ? 64 : two_sums ? 128 : 256);
  if (kind != W4Kind::kZeroPoint && kind != W4Kind::kMultiplier) return false;
  if (phases == 4) return tokens <= (kind == W4Kind::kMultiplier ? 64 : 32);
  if (phases == 8) return tokens <= 16;
  return phases == 2 && tokens <= (two_sums ? 16 : 128);
}

// y [M, N] from int8 activations: total = sum over groups in order of float(d_g) * scale_g (+ min_g * float(sum_g)),
// y = round(total * x_scale + bias), each step rounded once; d_g = sum (q - zero) * a and sum_g = sum a in int32, with
// a = xq, or xq - (x_zero_point - 128). kMultiplier: d = sum multiplier * (q - zero) * a over all K, and
// y = round(float(d) * x_scale * channel_scale + bias), as 8-bit weights have it.
struct GemmW4A8Args {
  W4Weight weight;
  const int8_t* xq;  // [M, K], 16-byte aligned; q, or q - 128 where x_zero_point is given
  int64_t x_stride;  // bytes between rows, a multiple of 16
  const float* x_scale;  // [M]
  const int32_t* x_zero_point;  // [M], 0..255, or nullptr; kMma only, but for kMultiplier
  const int32_t* channel_sum;  // kMultiplier, beside x_zero_point: [N], sum of multiplier * (q - zero) over all K
  const float* bias;  // [N] or nullptr
  int32_t m;
  void* y;
  DType y_dtype;
  int64_t y_stride;
  bool follows;  // the launch before serves this product's head: it has waited for whatever writes xq
};

}  // namespace qk::cuda
