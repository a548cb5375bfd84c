// W4A8: int4 weights in groups along K times int8 activations; the equation stands at LinearW4A8Args.
//
// Activations are stored as int8 rows on every tier, the raw 4-bit codes are the unsigned operand: no zero point is
// subtracted from any weight. Per row and group the sum of the activations is kept; the zero points meet it once a
// group.
//
//   chunk of rows, quantized first, then a barrier
//     block of row tiles
//       superblock of 64 columns
//         group of K
//           unpack the group's codes into a panel of bytes in L1 (W8 layout), once for all row tiles of the block
//             column tile x row tile: int32 sums, then total += float(d) * scale, in the order of the groups
//
// Multipliers in place of scales (kWhole): totals are int32. Where the tiles multiply any unsigned bytes
// (kJoinsGroups), multiplier * (q - zero point) + 128 goes into the panel, and each panel is one group, whose zero
// point is 128.
//
// Few rows (direct_rows) skip the panel: codes are unpacked in registers, for kDirectRows rows at a time, from a group
// that stays in L1. K is never split between threads, so tiers and thread counts agree to the bit.
//
// A tier provides, beside what linear_w8a8_impl.h asks for: tile4 (as tile, u8 weights and s8 activations, depth in
// lines of 4 k), tile4_direct (rows <= kDirectRows, c [rows, 64], straight from packed lines of 8 k), direct_rows(group
// size, whether weights come from memory) (so many rows beat a panel, measured), and, where kFusesGroups, tile4_groups
// (sums of groups, of at least the columns that are there, go to the totals, float or int32, without a stop in memory),
// kFusedK (deepest panel of several groups) and kSumsAreFloats (whether it takes sums that are the bits of floats, see
// tile_avx512vnni.h).
#pragma once

#include <cstring>
#include <type_traits>

#include "../args.h"
#include "../layout.h"
#include "activation.h"
#include "ahead.h"
#include "quantize_rows.h"
#include "row_chunks.h"
#include "store_row.h"
#include "team.h"

namespace qk {
namespace {

constexpr int64_t kPanelK = 512;  // deepest panel: 32 KiB
constexpr int64_t kLineK = 2 * kPackK, kLineBytes = kBlockN * kPackK;
constexpr int64_t kTotalsRows = 96;  // rows of a block: their float totals are 24 KiB a superblock
// Fewer where K is so long that their codes would not stay in L2 from superblock to superblock, though a panel serves
// fewer rows then (14336 x 4096 at 1024 rows on a Xeon with 2 MiB of L2: 6 % faster).
constexpr int64_t kBlockCodes = 1 << 20, kLeastRows = 48;

constexpr float kOrigin = 12582912.0f;  // 1.5 * 2^23: the floats around it are whole numbers, one bit apart
constexpr int32_t kOriginBits = 0x4B400000;

inline int64_t w4a8_row_bytes(int64_t k, int64_t groups) {
  return row_bytes(k) + round_up(groups * static_cast<int64_t>(sizeof(int32_t)), kAlign);
}

template <class V>
int64_t linear_w4a8_scratch_bytes(int64_t m, int64_t k, int64_t groups, int threads) {
  const int64_t panels = ceil_div(k, kPanelK);
  return row_chunks_bytes<V>(m, k, {w4a8_row_bytes(k, groups > panels ? groups : panels)}, threads);
}

// kWhole: scales of groups are multipliers, totals integers.
template <class V, bool kWhole>
class LinearW4A8 {
 public:
  explicit LinearW4A8(const LinearW4A8Args& args)  // a panel of multipliers takes longer
      : LinearW4A8(args, args.group_size, V::kJoinsGroups,
                   V::direct_rows(kWhole ? kMaxK : args.group_size, kWhole || streams(args))) {}

  void run() const {
    for_row_chunks<V>(
        p_.m, p_.n, p_.k, streams(p_), {stride_}, p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) { quantize_rows(row, range, q, scales); },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          gemm(row, rows, q, scales, team);
        });
  }

 protected:  // the AMX tier has loops of its own over these
  using F = typename V::F;
  using I = typename V::I;
  using Total = typename std::conditional<kWhole, int32_t, float>::type;

  // Whether the weights are too many to have stayed in a cache.
  static bool streams(const LinearW4A8Args& args) { return args.n * args.k / 2 >= kUncachedBytes; }

  LinearW4A8(const LinearW4A8Args& args, int64_t group_size, bool joins, int64_t direct_rows = 0)
      : p_(args),
        direct_rows_(direct_rows),
        joins_(kWhole && joins && args.m > direct_rows),
        group_(joins_                ? kPanelK
               : group_size < args.k ? group_size
                                     : args.k),
        groups_(args.k > 0 ? ceil_div(args.k, group_) : 1),
        stride_(w4a8_row_bytes(args.k, groups_)),
        fuses_(V::kFusesGroups && args.m > direct_rows && args.act.symmetric && group_ <= kPanelK &&
               (joins_ || (!args.weight_zero_point && !args.weight_min))),
        zero_bits_(joins_ ? 7 : 3),
        floats_(V::kSumsAreFloats && !kWhole && fuses_ && args.scale_type == ScaleType::kF16) {}

  // A row of scratch: int8 activations, zeros up to row_bytes(k), then the sum of each group, or what the accumulators
  // of fused groups start at.
  const int32_t* group_sums(const uint8_t* row) const {
    return reinterpret_cast<const int32_t*>(row + row_bytes(p_.k));
  }
  int32_t group_sum(const uint8_t* row, int64_t g) const {
    const int32_t kept = group_sums(row)[g];
    return fuses_ ? (origin() - kept) >> zero_bits_ : kept;
  }
  int32_t origin() const { return floats_ ? kOriginBits : 0; }

  void quantize_rows(int64_t row, Range range, uint8_t* q, RowScale* scales) const {
    for (int64_t r = range.begin; r < range.end; ++r) {
      uint8_t* out = q + r * stride_;
      scales[r] = quantize(row + r, out);
      sum_groups(out, reinterpret_cast<int32_t*>(out + row_bytes(p_.k)));
    }
  }

  RowScale quantize(int64_t row, uint8_t* out) const {
    const RowScale scale = quantize_row<V>(p_.act, row, p_.m, p_.k, 0, out);
    std::memset(out + p_.k, 0, static_cast<size_t>(row_bytes(p_.k) - p_.k));
    return scale;
  }

  void sum_groups(const uint8_t* row, int32_t* sums) const {
    const int8_t* a = reinterpret_cast<const int8_t*>(row);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t end = (g + 1) * group_ < p_.k ? (g + 1) * group_ : p_.k;
      int32_t sum = 0;
      for (int64_t i = g * group_; i < end; ++i) sum += a[i];
      sums[g] = fuses_ ? origin() - sum * (1 << zero_bits_) : sum;
    }
  }

  void gemm(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) const {
    const int64_t fit = kBlockCodes / stride_, block_rows = fit < kLeastRows ? kLeastRows : fit;
    const int64_t tiles = ceil_div(rows, V::kTileM),
                  blocks = ceil_div(rows, block_rows < kTotalsRows ? block_rows : kTotalsRows);
    // A panel is unpacked once for each call.
    for_tiles(team, ceil_div(p_.n, kBlockN), p_.k, {rows, tiles, blocks, rows <= direct_rows_ ? 1 : kPanelRows},
              [&](int64_t nb, Range range, bool more) {
                const Range block{range.begin * rows / tiles, range.end * rows / tiles};
                superblock(nb, row, block, more, q, scales);
              });
  }

  // What the 64 columns of a superblock share within a group.
  struct Group {
    alignas(kAlign) Total scale[kBlockN];  // or multipliers
    alignas(kAlign) float min[kBlockN];
    alignas(kAlign) int32_t zero_point[kBlockN];
    alignas(kAlign) int32_t code_sum[kBlockN];  // of the codes; asymmetric activations only
  };

  void load_floats(const void* packed, int64_t at, float* out) const {
    for (int j = 0; j < kBlockN; j += V::kLanes)
      V::store_f(out + j, p_.scale_type == ScaleType::kF32 ? V::template load<DType::kF32>(packed, at + j)
                                                           : V::template load<DType::kF16>(packed, at + j));
  }

  void load_scales(int64_t at, Total* scale) const {
    if constexpr (kWhole) {
      if (joins_)
        for (int j = 0; j < kBlockN; ++j) scale[j] = 1;
      else
        for (int j = 0; j < kBlockN; ++j) scale[j] = p_.weight_multiplier[at + j];
    } else {
      load_floats(p_.weight_scale, at, scale);
    }
  }

  void load_group(int64_t nb, int64_t g, Group& group) const {
    const int64_t at = (nb * groups_ + g) * kBlockN;
    load_scales(at, group.scale);
    if (joins_) {
      for (int j = 0; j < kBlockN; ++j) group.zero_point[j] = 128;
      return;
    }
    if (p_.weight_min) load_floats(p_.weight_min, at, group.min);
    for (int j = 0; j < kBlockN; ++j)
      group.zero_point[j] = p_.weight_zero_point ? p_.weight_zero_point[at + j] : p_.weight_min ? 0 : 8;
  }

  // `lines` packed lines of 8 k to 2 * lines lines of 4 k, then zero lines up to the depth a tile works in.
  static void unpack(const uint8_t* packed, int64_t lines, int64_t padded_lines, uint8_t* panel) {
    constexpr int64_t kLine = kBlockN * kPackK;
    for (int64_t l = 0; l < lines; ++l) {
      const uint8_t* in = packed + l * kLine;
      uint8_t* out = panel + 2 * l * kLine;
      for (int64_t i = 0; i < kLine; ++i) out[i] = in[i] & 15;
      for (int64_t i = 0; i < kLine; ++i) out[kLine + i] = in[i] >> 4;
    }
    if (padded_lines > lines)
      std::memset(panel + 2 * lines * kLine, 0, static_cast<size_t>(2 * (padded_lines - lines) * kLine));
  }

  // The panel of `depth` k from k0 on, `steps` lines of 4 k.
  void unpack_panel(int64_t nb, const uint8_t* codes, int64_t k0, int64_t depth, int64_t steps, uint8_t* panel) const {
    const uint8_t* packed = codes + k0 / kLineK * kBlockN * kPackK;
    if (joins_) return unpack_multiplied(nb, packed, k0, depth, steps, panel);
    unpack(packed, ceil_div(depth, kLineK), steps / 2, panel);
  }
  // multiplier * (q - zero point) + 128, two bytes at a time: neither product nor sum leaves its byte.
  void unpack_multiplied(int64_t nb, const uint8_t* packed, int64_t k0, int64_t depth, int64_t steps,
                         uint8_t* panel) const {
    using Pair __attribute__((may_alias)) = uint16_t;
    constexpr int64_t kLine = kBlockN * kPackK, kPairs = kLine / 2;
    const int64_t size = p_.group_size < p_.k ? p_.group_size : p_.k, groups = ceil_div(p_.k, size);
    alignas(kAlign) uint16_t multiplier[kPairs], offset[kPairs];
    for (int64_t l = 0, begins = k0; l < ceil_div(depth, kLineK); ++l) {
      const int64_t k = k0 + l * kLineK;
      if (k >= begins) {
        const int64_t g = k / size, at = (nb * groups + g) * kBlockN;
        for (int64_t j = 0; j < kBlockN; ++j) {
          const int m = p_.weight_multiplier[at + j], zero = p_.weight_zero_point ? p_.weight_zero_point[at + j] : 8;
          multiplier[2 * j] = multiplier[2 * j + 1] = static_cast<uint16_t>(m);
          offset[2 * j] = offset[2 * j + 1] = static_cast<uint16_t>(((128 - m * zero) & 255) * 0x0101);
        }
        begins = (g + 1) * size;
      }
      const Pair* in = reinterpret_cast<const Pair*>(packed + l * kLine);
      Pair* out = reinterpret_cast<Pair*>(panel + 2 * l * kLine);
      for (int64_t i = 0; i < kPairs; ++i) out[i] = static_cast<uint16_t>((in[i] & 0x0f0f) * multiplier[i] + offset[i]);
      for (int64_t i = 0; i < kPairs; ++i)
        out[kPairs + i] = static_cast<uint16_t>(((in[i] >> 4) & 0x0f0f) * multiplier[i] + offset[i]);
    }
    // Beyond K there are zeros.
    for (int64_t l = depth / kPackK; l < steps; ++l) {
      const int64_t there = depth - l * kPackK;
      uint8_t* line = panel + l * kLine;
      if (there <= 0) {
        std::memset(line, 0, static_cast<size_t>(kLine));
        continue;
      }
      for (int64_t j = 0; j < kBlockN; ++j)
        std::memset(line + j * kPackK + there, 0, static_cast<size_t>(kPackK - there));
    }
  }

  // more: whether the thread goes on to the next one.
  void superblock(int64_t nb, int64_t row, Range block, bool more, const uint8_t* q, const RowScale* scales) const {
    const int64_t rows = block.size(), tiles = ceil_div(rows, V::kTileM);
    const bool direct = !joins_ && rows <= direct_rows_;
    const int64_t columns =
        p_.n - nb * kBlockN < kBlockN ? p_.n - nb * kBlockN : kBlockN;  // tiles of padding are left out
    const uint8_t* a = q + block.begin * stride_;
    const int64_t code_bytes = padded_k(p_.k) / kLineK * kLineBytes;
    const uint8_t* codes = p_.packed + nb * code_bytes;
    const int64_t direct_tiles = ceil_div(rows, V::kDirectRows < 1 ? 1 : V::kDirectRows);
    const LookAhead look_ahead(codes + code_bytes, code_bytes, direct ? direct_tiles : kBlockN / V::kTileN * tiles,
                               direct ? kLineBytes : kLineBytes / 2);
    alignas(kAlign) Total totals[kTotalsRows * kBlockN];
    alignas(kAlign) uint8_t panel[kPanelK * kBlockN];
    alignas(kAlign) int32_t sums[(kTotalsRows + V::kTileM) * kBlockN];
    std::memset(totals, 0, static_cast<size_t>(rows * kBlockN) * sizeof(Total));
    // What `finish` adds to rows of the block.
    const auto prefetch = [&](Range of) {
      prefetch_residual(p_.residual, p_.y_dtype, row + block.begin + of.begin, of.size(), nb * kBlockN, kBlockN);
    };
    const auto finish = [&](Range of) {
      for (int64_t r = of.begin; r < of.end; ++r)
        finish_row(row + block.begin + r, scales[block.begin + r].scale, totals + r * kBlockN, nb * kBlockN, kBlockN);
    };
    if constexpr (V::kFusesGroups) {
      if (fuses_ && !direct && p_.k > 0)
        return fused_groups(nb, columns, tiles, rows, a, codes, panel, totals, more ? &look_ahead : nullptr, prefetch,
                            finish);
    }
    Group group;
    for (int64_t g = 0; g < (p_.k > 0 ? groups_ : 0); ++g) {
      const int64_t begin = g * group_, end = begin + group_ < p_.k ? begin + group_ : p_.k;
      load_group(nb, g, group);
      if (!p_.act.symmetric) sum_codes(nb, codes, begin, end, panel, group);
      if (direct) {
        for (int64_t r = 0; r < rows; r += V::kDirectRows) {
          const Range tile{r, r + V::kDirectRows < rows ? r + V::kDirectRows : rows};
          const uint8_t* from = codes + begin / kLineK * kLineBytes;
          const int64_t lines = ceil_div(end - begin, kLineK);
          V::tile4_direct(static_cast<int>(tile.end - r), a + r * stride_ + begin, stride_, from, lines, sums,
                          direct_tiles == 1 ? streams(p_) ? ahead_in_stream(from) : Ahead{}
                          : more            ? look_ahead.of(begin / kLineK * kLineBytes, r / V::kDirectRows, lines)
                                            : Ahead{});
          finish_group(g, end - begin, tile, a, scales + block.begin, sums, kBlockN, 0, group, totals);
        }
        continue;
      }
      for (int64_t k0 = begin; k0 < end; k0 += kPanelK) {
        const int64_t depth = end - k0 < kPanelK ? end - k0 : kPanelK;
        const int64_t steps = round_up(depth, V::kDepthAlign) / kPackK;
        unpack_panel(nb, codes, k0, depth, steps, panel);
        int32_t* c = sums;
        for (int j = 0; j < columns; j += V::kTileN) {
          for (int64_t t = 0; t < tiles; ++t) {
            const Range tile = share(rows, static_cast<int>(t), static_cast<int>(tiles));
            V::tile4(static_cast<int>(tile.size()), a + tile.begin * stride_ + k0, stride_,
                     reinterpret_cast<const int8_t*>(panel) + j * kPackK, steps, c, k0 > begin,
                     more ? look_ahead.of(k0 / kLineK * kLineBytes, j / V::kTileN * tiles + t, steps) : Ahead{});
            if (k0 + depth == end)
              finish_group(g, end - begin, tile, a, scales + block.begin, c, V::kTileN, j, group, totals);
            if (end - begin > kPanelK) c += V::kTileM * V::kTileN;
          }
        }
      }
    }
    prefetch({0, rows});
    finish({0, rows});
  }

  // Groups whose zero points are all 8, or 128, and which fit in a panel: the accumulators start at minus that times
  // sum(a) and end in the totals. Short groups share a panel, so that a tile has more to do at a time. Few tiles take
  // half as much, since unpacking overlaps with products at the seams alone. Each tile is finished behind its last
  // group: its stores wait for lines of y while the next tile multiplies.
  template <class Prefetch, class Finish>
  void fused_groups(int64_t nb, int64_t columns, int64_t tiles, int64_t rows, const uint8_t* a, const uint8_t* codes,
                    uint8_t* panel, Total* totals, const LookAhead* look_ahead, const Prefetch& prefetch,
                    const Finish& finish) const {
    alignas(kAlign) Total scale[V::kFusedK / kLineK * kBlockN], origin[V::kFusedK / kLineK * kBlockN];
    const int64_t most = (tiles < 6 ? V::kFusedK / 2 : V::kFusedK) / group_;
    for (int64_t g = 0, count = 1; g < groups_; g += count) {
      const int64_t begin = g * group_, whole = (p_.k - begin) / group_;
      count = most < whole ? most : whole;
      count = count < 1 ? 1 : count;
      const int64_t depth = p_.k - begin < count * group_ ? p_.k - begin : count * group_;
      const int64_t steps = round_up(depth, V::kDepthAlign) / kPackK;  // more than one group has whole lines
      unpack_panel(nb, codes, begin, depth, steps, panel);
      for (int64_t i = 0; i < count; ++i) load_scales((nb * groups_ + g + i) * kBlockN, scale + i * kBlockN);
      for (int64_t i = 0; floats_ && i < count * kBlockN; ++i) origin[i] = static_cast<Total>(kOrigin * scale[i]);
      for (int64_t t = 0; t < tiles; ++t) {
        const Range tile = share(rows, static_cast<int>(t), static_cast<int>(tiles));
        const uint8_t* from = a + tile.begin * stride_;
        const bool last = g + count == groups_;
        if (last) prefetch(tile);
        V::tile4_groups(
            static_cast<int>(tile.size()), from + begin, stride_, reinterpret_cast<const int8_t*>(panel), columns,
            steps / count, count, group_sums(from) + g, scale, floats_ ? origin : nullptr,
            totals + tile.begin * kBlockN,
            look_ahead ? look_ahead->of(begin / kLineK * kLineBytes, t, kBlockN / V::kTileN * steps) : Ahead{});
        if (last) finish(tile);
      }
    }
  }

  // code_sum[j] = sum of the group's codes of column j: what a row of ones would give.
  void sum_codes(int64_t nb, const uint8_t* codes, int64_t begin, int64_t end, uint8_t* panel, Group& group) const {
    alignas(kAlign) uint8_t ones[kPanelK];
    alignas(kAlign) int32_t sums[V::kTileM * kBlockN];
    std::memset(ones, 1, sizeof(ones));
    std::memset(group.code_sum, 0, sizeof(group.code_sum));
    for (int64_t k0 = begin; k0 < end; k0 += kPanelK) {
      const int64_t depth = end - k0 < kPanelK ? end - k0 : kPanelK, lines = ceil_div(depth, kLineK);
      const uint8_t* packed = codes + k0 / kLineK * kBlockN * kPackK;
      if (V::kDirectRows > 0 && !joins_) {
        V::tile4_direct(1, ones, 0, packed, lines, sums, Ahead{});
        for (int j = 0; j < kBlockN; ++j) group.code_sum[j] += sums[j];
        continue;
      }
      const int64_t steps = round_up(depth, V::kDepthAlign) / kPackK;
      unpack_panel(nb, codes, k0, depth, steps, panel);
      for (int64_t j = 0; j < kBlockN; j += V::kTileN) {
        V::tile4(1, ones, 0, reinterpret_cast<const int8_t*>(panel) + j * kPackK, steps, sums, false, Ahead{});
        for (int i = 0; i < V::kTileN; ++i) group.code_sum[j + i] += sums[i];
      }
    }
  }

  // totals += float(d) * scale (+ min * float(sum of a)) for the rows of a tile and columns [j, j + pitch) of c.
  void finish_group(int64_t g, int64_t depth, Range tile, const uint8_t* a, const RowScale* scales, const int32_t* c,
                    int pitch, int j, const Group& group, Total* totals) const {
    for (int64_t r = tile.begin; r < tile.end; ++r, c += pitch) {
      // With x = stored - zp: sum(x * q) = sum(stored * q) - zp * sum(q), and sum(x) = sum(stored) - zp * depth.
      const int32_t zp = scales[r].zero_point, stored = group_sum(a + r * stride_, g);
      const int32_t sum = stored - zp * static_cast<int32_t>(depth);
      const I all = V::set_i(sum), x_zero = V::set_i(zp);
      const F fsum = V::to_f(all);
      Total* total = totals + r * kBlockN + j;
      for (int i = 0; i < pitch; i += V::kLanes) {
        const int at = j + i;
        I d = V::load_i(c + i);
        if (zp != 0) d = V::sub_i(d, V::mul_i(x_zero, V::load_i(group.code_sum + at)));
        if (!p_.weight_min) d = V::sub_i(d, V::mul_i(all, V::load_i(group.zero_point + at)));
        if constexpr (kWhole) {
          V::store_i(total + i, V::add_i(V::load_i(total + i), V::mul_i(d, V::load_i(group.scale + at))));
        } else {
          F t = V::add(V::load_f(total + i), V::mul(V::to_f(d), V::load_f(group.scale + at)));
          if (p_.weight_min) t = V::add(t, V::mul(V::load_f(group.min + at), fsum));
          V::store_f(total + i, t);
        }
      }
    }
  }

  // Columns [n0, n0 + columns) of y, as far as there are any. kStreams: see store_row.h.
  template <bool kStreams = false, class T>
  void finish_row(int64_t row, float scale, const T* totals, int64_t n0, int64_t columns) const {
    switch (p_.y_dtype) {
      case DType::kF32:
        return finish_row_as<DType::kF32, kStreams>(row, scale, totals, n0, columns);
      case DType::kBF16:
        return finish_row_as<DType::kBF16, kStreams>(row, scale, totals, n0, columns);
      default:
        return finish_row_as<DType::kF16, kStreams>(row, scale, totals, n0, columns);
    }
  }

  template <DType D, bool kStreams, class T>
  void finish_row_as(int64_t row, float scale, const T* totals, int64_t n0, int64_t columns) const {
    const int64_t y = row * p_.y_stride + n0, residual = row * p_.residual.stride + n0;
    const int width = static_cast<int>(p_.n - n0 < columns ? p_.n - n0 : columns);
    const F scale_x = V::set(scale);
    store_row<V, D, kStreams>(p_.y, y, width, [&](int i, int n) QK_INLINE {
      F v = V::mul(load_total(totals + i), scale_x);
      if constexpr (kWhole) v = V::mul(v, V::load_f(channel_scales() + n0 + i));
      if (p_.bias) v = V::add(v, n == V::kLanes ? V::load_f(p_.bias + n0 + i) : V::load_f_part(p_.bias + n0 + i, n));
      if (p_.function != Activation::kNone) v = Activations<V>::apply(p_.function, v);
      if (p_.residual.rows) v = plus_residual<V, D>(p_.residual, residual + i, n, v);
      return v;
    });
  }

  static F load_total(const float* p) { return V::load_f(p); }
  static F load_total(const int32_t* p) { return V::to_f(V::load_i(p)); }
  // Of whole blocks of 64 channels.
  const float* channel_scales() const { return static_cast<const float*>(p_.weight_scale); }

  const LinearW4A8Args& p_;
  const int64_t direct_rows_;  // of a block, at most
  const bool joins_;
  const int64_t group_, groups_, stride_;
  const bool fuses_;
  const int zero_bits_;  // the zero point of fused groups is 1 << zero_bits_
  const bool floats_;  // whether their sums are the bits of floats
};

// Returns the tier that ran.
template <class V>
const char* linear_w4a8(const LinearW4A8Args& args) {
  if (args.weight_multiplier)
    LinearW4A8<V, true>(args).run();
  else
    LinearW4A8<V, false>(args).run();
  return V::kIsa;
}

}  // namespace
}  // namespace qk
