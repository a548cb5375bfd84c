// W4A8 on AMX: quantization and the last steps of a row are those of linear_w4a8_impl.h, the loops the tier's own.
//
//   chunk of rows, quantized into tile order, then a barrier
//     block of row tiles
//       superblock of 64 columns
//         depth of at most kPanelSteps tiles
//           unpack the codes into a panel of int8 tiles, zero points subtracted, once for all row tiles of the block
//             column tiles x row tiles: two groups' products, while the vector units add the two before to the totals
//
// A panel tile holds 64 k of one group: a group that ends or begins within them has zeros in the others' places, so
// activations need no order of their own for each group size. Two groups at a time, since the totals then travel half
// as often; each of them is still added in its turn.
#pragma once

#include "linear_w4a8_impl.h"
#include "tiles_amx.h"

namespace qk {
namespace {

template <class V>
class LinearW4A8Amx : LinearW4A8<V> {
 public:
  using Base = LinearW4A8<V>;

  explicit LinearW4A8Amx(const LinearW4A8Args& args) : Base(args), steps_(padded_k(args.k) / 64) {}

  static int64_t scratch_bytes(int64_t m, int64_t k, int64_t groups, int threads) {
    return workspaces(m, k, groups, threads) + threads * static_cast<int64_t>(sizeof(Workspace));
  }

  void run() const {
    for_row_chunks<V>(
        p_.m, p_.n, p_.k, stride(p_.m, p_.k, this->groups_), p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) {
          alignas(kAlign) uint8_t buffer[kMaxK + kRowPad + kMaxK / kLineK * sizeof(int32_t) + kAlign];
          int32_t* sums = reinterpret_cast<int32_t*>(q + sums_at(row));
          for (int64_t r = range.begin; r < range.end; ++r) {
            this->quantize_rows(row + r, {0, 1}, buffer, scales + r);
            store_tile_row(buffer, p_.k, r, q);
            std::memcpy(sums + r * this->groups_, this->group_sums(buffer),
                        static_cast<size_t>(this->groups_) * sizeof(int32_t));
          }
        },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, int thread, int team) {
          multiply(row, rows, q, scales, thread, team);
        });
  }

 private:
  using Base::p_;
  using typename Base::F;
  using typename Base::I;

  static constexpr int64_t kPanelSteps = 64;  // of 2 KiB and both halves of a superblock: 256 KiB
  static constexpr int64_t kFewTilesSteps = 16;  // where few row tiles share a panel it had better be near
  static constexpr int64_t kBlockTiles = V::kMaxBlockTiles;
  static constexpr int64_t kSpan = 64;  // k of a tile
  static constexpr int64_t kBytesPerK = kBlockN / 2, kPackedLine = kLineK * kBytesPerK;  // of a superblock's codes

  // What a panel holds of one group.
  struct Span {
    int64_t group, depth;  // of the whole group
    int64_t step, steps;  // of the activations
    bool begins, ends;  // whether the group's first and last k are among them: of a larger group only a panel's first
                        // span is the end, and only its only span anything else
  };
  struct Workspace {
    alignas(kAlign) int8_t panel[2][kPanelSteps * kPairBytes];
    alignas(kAlign) float scale[kPanelSteps][kBlockN], min[kPanelSteps][kBlockN];
    alignas(kAlign) int32_t weight_sum[kPanelSteps][kBlockN];  // over a group's k; asymmetric activations only
    alignas(kAlign) int32_t sums[2][2][kPairSums];  // of two groups, while the two before are added
    alignas(kAlign) float totals[2][kBlockTiles][kPairSums];
    alignas(kAlign) int32_t carried[2][kBlockTiles][kPairSums];  // of a group that ends in a later panel
    Span spans[kPanelSteps];
    int64_t span_count;
  };

  // ---- scratch: rows of tiles and their group sums | RowScale | a workspace for each thread -------------------

  static int64_t stride(int64_t m, int64_t k, int64_t groups) {
    return tile_stride(m, k, groups * static_cast<int64_t>(sizeof(int32_t)));
  }
  static int64_t workspaces(int64_t m, int64_t k, int64_t groups, int threads) {
    return round_up(row_chunks_bytes<V>(m, k, stride(m, k, groups), threads), kAlign);
  }
  // Where the sums of the chunk's groups begin, [rows][groups]; `row` is the chunk's first.
  int64_t sums_at(int64_t row) const {
    const int64_t chunk = chunk_rows(p_.m, p_.k), rows = p_.m - row < chunk ? p_.m - row : chunk;
    return round_up(rows, kPairRows) * padded_k(p_.k);
  }

  // ---- a panel ---------------------------------------------------------------------------------------------------

  // Spans from k on that a panel of `most` steps holds: whole groups, or a piece of one that is larger. Returns where
  // they end.
  int64_t plan(int64_t k, int64_t most, Workspace& ws) const {
    ws.span_count = 0;
    for (int64_t used = 0; k < p_.k;) {
      const int64_t group = k / this->group_, begin = group * this->group_;
      const int64_t end = begin + this->group_ < p_.k ? begin + this->group_ : p_.k;
      const int64_t step = k / kSpan, all = ceil_div(end, kSpan) - step;
      const bool whole = used + all <= most;
      if (!whole && used > 0) break;
      const int64_t steps = whole ? all : most;
      ws.spans[ws.span_count++] = {group, end - begin, step, steps, k == begin, whole};
      used += steps;
      k = whole ? end : (step + steps) * kSpan;
      if (!whole) break;
    }
    return k;
  }

  void unpack_span(const uint8_t* codes, const Span& span, int64_t nb, int64_t at, Workspace& ws) const {
    const int64_t begin = span.group * this->group_, end = begin + span.depth;
    typename Base::Group group;
    this->load_group(nb, span.group, group);
    const bool sums_codes = !p_.act.symmetric;
    const __m512i nibble = _mm512_set1_epi8(15), bytes = _mm512_set1_epi32(0x01010101);
    for (int64_t j = 0; j < kBlockN; j += V::kLanes) {
      I zero_point = p_.weight_min ? V::set_i(0) : V::load_i(group.zero_point + j);
      I code_sum = V::set_i(0);
      const I zeros = V::mul_i(zero_point, bytes);
      int8_t* out = ws.panel[j / kPairRows] + at * kPairBytes + j % kPairRows / kTileRows * kTileBytes;
      const uint8_t* in = codes + span.step * (kSpan / kLineK) * kPackedLine + j * kPackK;
      for (int64_t k = span.step * kSpan; k < (span.step + span.steps) * kSpan;) {
        for (int64_t l = 0; l < kSpan / kLineK; ++l, k += kLineK, in += kPackedLine, out += 128) {
          if (k < begin || k >= end) {
            _mm512_store_si512(out, V::set_i(0));
            _mm512_store_si512(out + 64, V::set_i(0));
            continue;
          }
          const __m512i both = _mm512_load_si512(in), low = _mm512_and_si512(both, nibble),
                        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          if (sums_codes) code_sum = V::dot4(V::dot4(code_sum, low, bytes), high, bytes);
          _mm512_store_si512(out, _mm512_sub_epi8(low, zeros));
          _mm512_store_si512(out + 64, _mm512_sub_epi8(high, zeros));
        }
        out += kPairBytes - kTileBytes;
      }
      if (!sums_codes) continue;
      // Codes beyond K are zero, so that they count for nothing but their zero points.
      int32_t* sum = ws.weight_sum[&span - ws.spans] + j;
      if (span.begins)
        code_sum = V::sub_i(code_sum, V::mul_i(zero_point, V::set_i(static_cast<int32_t>(span.depth))));
      else
        code_sum = V::add_i(code_sum, V::load_i(sum));
      V::store_i(sum, code_sum);
    }
    const int64_t index = &span - ws.spans;
    std::memcpy(ws.scale[index], group.scale, sizeof(group.scale));
    if (p_.weight_min) std::memcpy(ws.min[index], group.min, sizeof(group.min));
  }

  // ---- totals ----------------------------------------------------------------------------------------------------

  // One or two groups of a block whose sums wait to be added.
  struct Pending {
    int64_t rows = 0;
    int groups = 0;
    const int32_t* c = nullptr;  // [groups][32, 32]
    const float *scale = nullptr, *min = nullptr;  // [groups][64] columns, of which these are 32
    const int32_t* weight_sum = nullptr;
    const int32_t* row_sums = nullptr;  // of the first row; this->groups_ apart
    const Span* spans = nullptr;
    float* totals = nullptr;
    bool first = false, last = false;  // of all groups
    int64_t row = 0, n0 = 0;  // of y
    const RowScale* scales = nullptr;
  };

  // Symmetric activations, no minimum: total + float(d) * scale.
  static F plus_group(F total, const int32_t* c, F scale) {
    return V::add(total, V::mul(V::to_f(V::load_i(c)), scale));
  }

  // Group g of the two: x = stored - zp, as in finish_group, but that zero points have met the weights before.
  F plus_group(const Pending& p, F total, int g, int64_t r, int64_t j) const {
    I d = V::load_i(p.c + g * kPairSums + r * kPairRows + j);
    const int32_t zp = p.scales[r].zero_point;
    if (zp != 0) d = V::sub_i(d, V::mul_i(V::set_i(zp), V::load_i(p.weight_sum + g * kBlockN + j)));
    total = V::add(total, V::mul(V::to_f(d), V::load_f(p.scale + g * kBlockN + j)));
    if (!p_.weight_min) return total;
    const int32_t sum = p.row_sums[r * this->groups_ + p.spans[g].group] - zp * static_cast<int32_t>(p.spans[g].depth);
    return V::add(total, V::mul(V::load_f(p.min + g * kBlockN + j), V::to_f(V::set_i(sum))));
  }

  // Rows [from, to) of what waits; s0-s1 are the scales of the first group, s2-s3 those of the second.
  template <bool kPlain>
  QK_INLINE void add_rows(const Pending& p, int64_t from, int64_t to, F s0, F s1, F s2, F s3) const {
    const bool two = p.groups == 2;
    const __mmask16 old = p.first ? 0 : 0xFFFF;
    const int32_t* c = p.c + from * kPairRows;
    float* t = p.totals + from * kPairRows;
    for (int64_t r = from; r < to; ++r, c += kPairRows, t += kPairRows) {
      F v = _mm512_maskz_loadu_ps(old, t), w = _mm512_maskz_loadu_ps(old, t + 16);
      if constexpr (kPlain) {
        v = plus_group(v, c, s0);
        w = plus_group(w, c + 16, s1);
        if (two) {
          v = plus_group(v, c + kPairSums, s2);
          w = plus_group(w, c + kPairSums + 16, s3);
        }
      } else {
        for (int g = 0; g < p.groups; ++g) {
          v = plus_group(p, v, g, r, 0);
          w = plus_group(p, w, g, r, 16);
        }
      }
      V::store_f(t, v);
      V::store_f(t + 16, w);
    }
    if (p.last) finish(p, from, to);
  }
  QK_NOINLINE void finish(const Pending& p, int64_t from, int64_t to) const {
    for (int64_t r = from; r < to; ++r)
      this->finish_row(p.row + r, p.scales[r].scale, p.totals + r * kPairRows, p.n0, kPairRows);
  }
  template <bool kPlain>
  QK_NOINLINE void add_rest(const Pending& p, int64_t from) const {
    if (from >= p.rows) return;
    const int64_t second = p.groups == 2 ? kBlockN : 0;
    add_rows<kPlain>(p, from, p.rows, V::load_f(p.scale), V::load_f(p.scale + 16), V::load_f(p.scale + second),
                     V::load_f(p.scale + second + 16));
  }

  // ---- products --------------------------------------------------------------------------------------------------

  // What a block of 32 x 32 is told: activations from k = 0 on, the panel's half.
  struct Block {
    const uint8_t* a;
    const int8_t* b;
    int32_t* carried;
    Pending pending;  // what its groups will need, but for what tells them apart
  };
  struct Ahead {
    const uint8_t *next, *end;  // L2 prefetch
  };

  template <bool kPlain, int kTiles>
  QK_NOINLINE void multiply_block(const Block& block, Workspace& ws, Pending& pending, int& parity,
                                  Ahead& ahead) const {
    const int8_t* b = block.b;
    store_fence();
    for (int64_t s = 0; s < ws.span_count; s += 2) {
      const Span* span = ws.spans + s;
      const int count = s + 1 < ws.span_count ? 2 : 1;
      const int64_t steps = span[0].steps + (count == 2 ? span[1].steps : 0);
      const int64_t rows = ceil_div(kTileRows, steps);  // after every other product
      const float* scale = pending.rows > 0 ? pending.scale : ws.scale[0];
      const int64_t second = pending.groups == 2 ? kBlockN : 0;
      const F s0 = V::load_f(scale), s1 = V::load_f(scale + 16), s2 = V::load_f(scale + second),
              s3 = V::load_f(scale + second + 16);
      const int64_t all = pending.rows;
      int64_t next = 0;
      int32_t* c = ws.sums[parity ^= 1][0];
      for (int g = 0; g < count; ++g) {
        if (span[g].begins)
          clear_sums<kTiles>();
        else
          load_sums<kTiles>(block.carried);
        add_products<PanelTiles, kTiles>(block.a + span[g].step * kPairBytes, b, span[g].steps,
                                         [&](int i, const uint8_t*, const int8_t*) QK_INLINE {
                                           if (i % 2 == 0) return;
                                           if (ahead.next < ahead.end) {
                                             __builtin_prefetch(ahead.next, 0, 2);
                                             ahead.next += 64;
                                           }
                                           if (next >= all) return;
                                           const int64_t from = next;
                                           next = from + rows < all ? from + rows : all;
                                           add_rows<kPlain>(pending, from, next, s0, s1, s2, s3);
                                         });
        b += span[g].steps * kPairBytes;
        if (g == count - 1) add_rest<kPlain>(pending, next);
        store_sums<kTiles>(span[g].ends ? c + g * kPairSums : block.carried);
      }
      pending.rows = 0;
      if (!span->ends) return;
      pending = block.pending;
      pending.groups = count;
      pending.c = c;
      pending.scale += s * kBlockN;
      pending.min += s * kBlockN;
      pending.weight_sum += s * kBlockN;
      pending.spans = span;
      pending.first = span[0].group == 0;
      pending.last = span[count - 1].group == this->groups_ - 1;
    }
  }

  void multiply(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, int thread, int team) const {
    if (p_.act.symmetric && !p_.weight_min)
      multiply_as<true>(row, rows, q, scales, thread, team);
    else
      multiply_as<false>(row, rows, q, scales, thread, team);
  }

  template <bool kPlain>
  void multiply_as(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, int thread, int team) const {
    Workspace& ws = *reinterpret_cast<Workspace*>(p_.scratch + workspaces(p_.m, p_.k, this->groups_, p_.threads) +
                                                  thread * static_cast<int64_t>(sizeof(Workspace)));
    const int64_t tiles = ceil_div(rows, kPairRows), superblocks = ceil_div(p_.n, kBlockN);
    const int64_t blocks = Base::block_count(superblocks, team, tiles, ceil_div(tiles, kBlockTiles));
    const Range mine = share(blocks * superblocks, thread, team);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const Range block = share(tiles, static_cast<int>(u / superblocks), static_cast<int>(blocks));
      superblock<kPlain>(u % superblocks, row, rows, block, q, scales, u + 1 < mine.end, ws);
    }
  }

  template <bool kPlain>
  void superblock(int64_t nb, int64_t row, int64_t rows, Range block, const uint8_t* q, const RowScale* scales,
                  bool more, Workspace& ws) const {
    const int64_t n0 = nb * kBlockN, columns = p_.n - n0 < kBlockN ? p_.n - n0 : kBlockN;
    const int64_t bytes = steps_ * kSpan * kBytesPerK;
    const int64_t most = block.end - block.begin > 2 ? kPanelSteps : kFewTilesSteps;
    const uint8_t* codes = p_.packed + nb * bytes;
    const int32_t* row_sums = reinterpret_cast<const int32_t*>(q + sums_at(row));
    for (int64_t k = 0; k < p_.k;) {
      const int64_t next = plan(k, most, ws);
      int64_t at = 0;
      for (int64_t s = 0; s < ws.span_count; at += ws.spans[s++].steps) unpack_span(codes, ws.spans[s], nb, at, ws);
      const bool last = next == p_.k, alone = last && k == 0;  // then one block's worth of L1 serves all totals
      // As much of what is unpacked next: this superblock's rest, or the next one's beginning.
      Ahead ahead{codes + (last ? bytes : next * kBytesPerK), nullptr};
      ahead.end = ahead.next + (last && !more ? 0 : (next - k) * kBytesPerK);
      Pending pending;
      int parity = 0;
      for (int64_t j = 0; j < columns; j += kPairRows) {
        for (int64_t t = block.begin; t < block.end; ++t) {
          const int64_t h = j / kPairRows, first = t * kPairRows, count = rows_of_pair(rows, t), i = t - block.begin;
          Block told{q + t * steps_ * kPairBytes, ws.panel[h], ws.carried[h][i], {}};
          told.pending.rows = count;
          told.pending.scale = ws.scale[0] + j;
          told.pending.min = ws.min[0] + j;
          told.pending.weight_sum = ws.weight_sum[0] + j;
          told.pending.row_sums = row_sums + first * this->groups_;
          told.pending.totals = alone ? ws.totals[0][0] : ws.totals[h][i];
          told.pending.row = row + first;
          told.pending.n0 = n0 + j;
          told.pending.scales = scales + first;
          if (last && p_.residual.rows) {
            for (int64_t r = 0; r < count; ++r)
              prefetch_residual(p_.residual, p_.y_dtype, (row + first + r) * p_.residual.stride + n0 + j, kPairRows);
          }
          if (count > kTileRows)
            multiply_block<kPlain, 2>(told, ws, pending, parity, ahead);
          else
            multiply_block<kPlain, 1>(told, ws, pending, parity, ahead);
        }
      }
      add_rest<kPlain>(pending, 0);
      k = next;
    }
    if (p_.k == 0) finish_empty(n0, row, rows, block, scales, ws);
  }

  // No weight at all.
  void finish_empty(int64_t n0, int64_t row, int64_t rows, Range block, const RowScale* scales, Workspace& ws) const {
    std::memset(ws.totals, 0, kBlockN * sizeof(float));
    const int64_t end = block.end * kPairRows < rows ? block.end * kPairRows : rows;
    for (int64_t r = block.begin * kPairRows; r < end; ++r)
      this->finish_row(row + r, scales[r].scale, ws.totals[0][0], n0, kBlockN);
  }

  const int64_t steps_;
};

}  // namespace
}  // namespace qk
