// W4A8 on AMX: quantization and the last steps of a row are those of linear_w4a8_impl.h, the loops the tier's own.
//
//   chunk of rows, quantized into tile order, then a barrier
//     block of row tiles
//       superblock of 64 columns
//         slice of K, the panel: short enough for L1 where groups are small
//           unpack the codes into int8 tiles, zero points subtracted, once for all row tiles of the block
//             column tiles x row tiles: two groups' products, while the vector units add the two before to the totals
//
// Two groups at a time, since the totals then travel half as often; each of them is still added in its turn. The tiles
// keep a group's sums until the first products of the next one, which store them one by one.
#pragma once

#include "panels_w4a8_amx.h"

namespace qk {
namespace {

template <class V, bool kWhole>
class LinearW4A8Amx : PanelsW4A8Amx<V, kWhole> {
 public:
  using Panels = PanelsW4A8Amx<V, kWhole>;

  using Panels::scratch_bytes;
  explicit LinearW4A8Amx(const LinearW4A8Args& args)
      : Panels(args),
        streams_(is_streamed(args.m, args.n, args.y_dtype, args.threads) &&
                 has_whole_lines(args.y, args.y_dtype, args.y_stride)) {}

  void run() const {
    for_row_chunks<V>(
        p_.m, p_.n, p_.k, Panels::streams(p_), {this->stride(p_.m, p_.k, this->groups_)}, p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) {
          alignas(kAlign) uint8_t buffer[kMaxK + kRowPad];
          int32_t* sums = reinterpret_cast<int32_t*>(q + this->sums_at(row));
          for (int64_t r = range.begin; r < range.end; ++r) {
            scales[r] = this->quantize(row + r, buffer);
            store_tile_row(buffer, p_.k, r, q);
            if (p_.weight_min) this->sum_groups(buffer, sums + r * this->groups_);
          }
        },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          multiply(row, rows, q, scales, team);
        });
  }

 private:
  using Panels::kPanelSteps, Panels::kSliceSteps, Panels::kSliceStepsAlone, Panels::kFewTilesSteps, Panels::kBlockTiles;
  using Panels::kStepsAhead;
  static constexpr int64_t kLeastPieceRows = 3 * kPairRows;  // that are worth unpacking a superblock
  using Panels::p_, Panels::steps_, Panels::kSpan, Panels::kBytesPerK;
  using typename Panels::F, typename Panels::I, typename Panels::Span, typename Panels::Workspace;

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
    for (int64_t r = from; r < to; ++r) {
      const int32_t* c = p.c + r * kPairRows;
      float* t = p.totals + r * kPairRows;
      F v = _mm512_maskz_loadu_ps(old, t), w = _mm512_maskz_loadu_ps(old, t + 16);
      if constexpr (kPlain) {
        v = plus_group(v, c, s0);
        w = plus_group(w, c + kTileRows, s1);
        if (two) {
          v = plus_group(v, c + kPairSums, s2);
          w = plus_group(w, c + kPairSums + kTileRows, s3);
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
    if (p_.n - p.n0 < kPairRows || p_.function != Activation::kNone || p_.residual.rows) {
      for (int64_t r = from; r < to; ++r) {
        if (streams_)
          this->template finish_row<true>(p.row + r, p.scales[r].scale, p.totals + r * kPairRows, p.n0, kPairRows);
        else
          this->finish_row(p.row + r, p.scales[r].scale, p.totals + r * kPairRows, p.n0, kPairRows);
      }
      return;
    }
    switch (p_.y_dtype) {
      case DType::kF32:
        return finish_whole<DType::kF32>(p, from, to);
      case DType::kBF16:
        return finish_whole<DType::kBF16>(p, from, to);
      default:
        return finish_whole<DType::kF16>(p, from, to);
    }
  }
  // Whole rows of 32 columns with nothing after the bias.
  template <DType D>
  void finish_whole(const Pending& p, int64_t from, int64_t to) const {
    const float* bias = p_.bias ? p_.bias + p.n0 : nullptr;
    const F b0 = bias ? V::load_f(bias) : V::set(0.0f), b1 = bias ? V::load_f(bias + 16) : V::set(0.0f);
    int64_t y = (p.row + from) * p_.y_stride + p.n0;
    for (int64_t r = from; r < to; ++r, y += p_.y_stride) {
      const float* t = p.totals + r * kPairRows;
      const F scale = V::set(p.scales[r].scale);
      F v = V::mul(V::load_f(t), scale), w = V::mul(V::load_f(t + 16), scale);
      if constexpr (kWhole) {
        const float* channels = this->channel_scales() + p.n0;
        v = V::mul(v, V::load_f(channels));
        w = V::mul(w, V::load_f(channels + 16));
      }
      if (bias) {
        v = V::add(v, b0);
        w = V::add(w, b1);
      }
      if (streams_) {
        V::template stream<D>(p_.y, y, v, w);
      } else {
        V::template store<D>(p_.y, y, v);
        V::template store<D>(p_.y, y + 16, w);
      }
    }
  }
  template <bool kPlain>
  QK_NOINLINE void add_rest(const Pending& p, int64_t from) const {
    if (from >= p.rows) return;
    const int64_t second = p.groups == 2 ? kBlockN : 0;
    add_rows<kPlain>(p, from, p.rows, V::load_f(p.scale), V::load_f(p.scale + 16), V::load_f(p.scale + second),
                     V::load_f(p.scale + second + 16));
  }

  // ---- products --------------------------------------------------------------------------------------------------

  // What a block of 32 x 32 is told: activations from k = 0 on, where the next block's begin, the panel's half.
  struct Block {
    const uint8_t *a, *next;
    const int8_t* b;
    int32_t* carried;
    Pending pending;  // what its groups will need, but for what tells them apart
  };
  // What goes on from block to block of a panel. The tiles hold the sums of the newest group, which the first products
  // of the next one store, tile by tile.
  struct Flow {
    Pending pending, added;  // added: the last group too, but not finished yet
    int32_t* held_for;  // where the tiles' sums belong
    int parity = 0;
    const uint8_t *ahead, *end;  // L2 prefetch of codes
    bool asks;  // for activations, to L1
  };

  // Rows [kFrom, kTo) of two groups that wait.
  template <int kFrom, int kTo>
  static QK_INLINE void add_some(__mmask16 old, const int32_t* c, float* t, F s0, F s1, F s2, F s3) {
#pragma GCC unroll 8
    for (int r = kFrom; r < kTo; ++r) {
      float* at = t + r * kPairRows;
      const int32_t* d = c + r * kPairRows;
      F v = _mm512_maskz_loadu_ps(old, at), w = _mm512_maskz_loadu_ps(old, at + 16);
      v = plus_group(v, d, s0);
      w = plus_group(w, d + kTileRows, s1);
      V::store_f(at, plus_group(v, d + kPairSums, s2));
      V::store_f(at + 16, plus_group(w, d + kPairSums + kTileRows, s3));
    }
  }

  // All of a panel's groups in pairs, of kSteps steps of weights each and kRowSpans times as many of activations for
  // both. kAsks: for the activations of later steps.
  template <bool kAsks, int kSteps, int kRowSpans>
  QK_NOINLINE void multiply_pairs(const Block& block, Workspace& ws, Flow& flow) const {
    constexpr int kUnit = 2 * kSteps, kSlots = 4 * kUnit - 4, kRowUnit = kSteps * kRowSpans,
                  kLines = 8 * kRowUnit / kUnit;
    const uint8_t* a = block.a + ws.spans->step * kPairBytes;
    const uint8_t* const turn = block.next + ws.spans->step * kPairBytes;
    const int8_t* b = block.b;
    const int64_t spans = ws.span_count;
    const uint8_t *ahead = flow.ahead, *const ahead_end = flow.end;
    int32_t* held_for = flow.held_for;
    store_fence();
    for (int64_t s = 0; s < spans; s += 2) {
      const Pending& p = flow.pending;
      const float* scale = p.rows > 0 ? p.scale : ws.scale[0];
      const F s0 = V::load_f(scale), s1 = V::load_f(scale + 16), s2 = V::load_f(scale + kBlockN),
              s3 = V::load_f(scale + kBlockN + 16);
      const bool waits = p.rows > 0, finishes = flow.added.rows > 0;
      const __mmask16 old = p.first ? 0 : 0xFFFF;
      const int32_t* const added = p.c;
      float* const totals = p.totals;
      int32_t* const c = ws.sums[flow.parity ^= 1][0];
      // The two units of activations that follow.
      const uint8_t* const then = s + 2 < spans ? a + kRowUnit * kPairBytes : turn;
      const uint8_t* const later = s + 4 < spans   ? then + kRowUnit * kPairBytes
                                   : s + 2 < spans ? turn
                                                   : turn + kRowUnit * kPairBytes;
      each<kUnit>([&](auto step) QK_INLINE {
        constexpr int k = step.value;
        constexpr int row_step = k * kRowUnit / kUnit, ahead_step = row_step + kStepsAhead;
        const uint8_t* want = ahead_step < kRowUnit       ? a + ahead_step * kPairBytes
                              : ahead_step < 2 * kRowUnit ? then + (ahead_step - kRowUnit) * kPairBytes
                                                          : later + (ahead_step - 2 * kRowUnit) * kPairBytes;
        want += (k % (kUnit / kRowUnit)) * (kPairBytes * kRowUnit / kUnit);
        add_step<PanelTiles, 2>(
            a + row_step * kPairBytes, b + k * kPairBytes,
            [&](auto i) QK_INLINE {
              if constexpr (k % kSteps == 0) {
                store_sum<BlockSums, i.value>(k == 0 ? held_for : c);
                clear_sum<i.value>();
              }
            },
            [&](auto i) QK_INLINE {
              if constexpr (kAsks) {
                for (int l = 0; l < kLines; ++l) __builtin_prefetch(want + (kLines * i.value + l) * 64);
              }
              if (i.value % 2 == 1 && ahead < ahead_end) {
                __builtin_prefetch(ahead, 0, 2);
                ahead += 64;
              }
              constexpr int slot = 4 * k + i.value - 4;
              if constexpr (slot >= 0) {
                if (waits)
                  add_some<slot * kPairRows / kSlots, (slot + 1) * kPairRows / kSlots>(old, added, totals, s0, s1, s2,
                                                                                       s3);
              } else if (finishes) {
                finish_some(flow.added, i.value);
              }
            });
      });
      a += kRowUnit * kPairBytes;
      b += kUnit * kPairBytes;
      held_for = c + kPairSums;
      flow.added = flow.pending;
      if (!flow.added.last) flow.added.rows = 0;
      wait_for(block, ws, s, 2, c, flow.pending);
    }
    flow.held_for = held_for;
    flow.ahead = ahead;
  }
  // The same for groups of a length that it serves.
  template <bool kAsks>
  bool multiply_even(int64_t depth, const Block& block, Workspace& ws, Flow& flow) const {
    if (depth == 2 * kSpan)
      multiply_pairs<kAsks, 2, 2>(block, ws, flow);
    else if (depth == kSpan)
      multiply_pairs<kAsks, 1, 2>(block, ws, flow);
    else if (depth == kSpan / 2)
      multiply_pairs<kAsks, 1, 1>(block, ws, flow);
    else
      return false;
    return true;
  }
  void finish_added(Flow& flow) const {
    if (flow.added.rows > 0) finish(flow.added, 0, flow.added.rows);
    flow.added.rows = 0;
  }
  // A quarter of the rows.
  QK_NOINLINE void finish_some(const Pending& p, int quarter) const {
    const int64_t from = quarter * (kPairRows / 4), to = from + kPairRows / 4;
    if (from < p.rows) finish(p, from, to < p.rows ? to : p.rows);
  }

  // What the sums of `count` spans from s on wait for.
  QK_INLINE void wait_for(const Block& block, const Workspace& ws, int64_t s, int count, const int32_t* c,
                          Pending& pending) const {
    pending = block.pending;
    pending.groups = count;
    pending.c = c;
    pending.scale += s * kBlockN;
    pending.min += s * kBlockN;
    pending.weight_sum += s * kBlockN;
    pending.spans = ws.spans + s;
    pending.first = ws.spans[s].group == 0;
    pending.last = ws.spans[s + count - 1].group == this->groups_ - 1;
  }

  template <bool kPlain, int kTiles>
  QK_NOINLINE void multiply_block(const Block& block, Workspace& ws, Flow& flow) const {
    const int8_t* b = block.b;
    const Span *first = ws.spans, *last = ws.spans + ws.span_count - 1;
    const uint8_t* const end = block.a + (last->step + last->steps) * kPairBytes;
    const int64_t jump = block.next + first->step * kPairBytes - end;
    finish_added(flow);
    store_fence();
    for (int64_t s = 0; s < ws.span_count; s += 2) {
      const Span* span = ws.spans + s;
      const int count = s + 1 < ws.span_count ? 2 : 1;
      const int64_t steps = span[0].steps + (count == 2 ? span[1].steps : 0);
      // The tiles' sums complete what waits within the first step; its rows are added after each product of the others.
      const int64_t slots = (steps - 1) * kTiles * 2, rows = slots > 0 ? ceil_div(kPairRows, slots) : 0;
      Pending& pending = flow.pending;
      const float* scale = pending.rows > 0 ? pending.scale : ws.scale[0];
      const int64_t second = pending.groups == 2 ? kBlockN : 0;
      const F s0 = V::load_f(scale), s1 = V::load_f(scale + 16), s2 = V::load_f(scale + second),
              s3 = V::load_f(scale + second + 16);
      const int64_t all = pending.rows;
      int64_t next = 0;
      int32_t* c = ws.sums[flow.parity ^= 1][0];
      for (int g = 0; g < count; ++g) {
        const uint8_t* a = block.a + span[g].step * kPairBytes;
        for (int64_t k = 0; k < span[g].steps; ++k, a += kPairBytes, b += kPairBytes) {
          const uint8_t* want = a + kStepsAhead * kPairBytes;
          if (want >= end) want += jump;
          const auto between = [&](int i) QK_INLINE {
            for (int l = 0; flow.asks && l < 8; ++l) __builtin_prefetch(want + (8 * i + l) * 64);
            if (i % 2 == 1 && flow.ahead < flow.end) {
              __builtin_prefetch(flow.ahead, 0, 2);
              flow.ahead += 64;
            }
            if (next >= all || (g == 0 && k == 0)) return;
            const int64_t from = next;
            next = from + rows < all ? from + rows : all;
            add_rows<kPlain>(pending, from, next, s0, s1, s2, s3);
          };
          if (k > 0)
            add_step<PanelTiles, kTiles>(a, b, [](auto) QK_INLINE {}, between);
          else if (span[g].begins)
            add_step<PanelTiles, kTiles>(
                a, b,
                [&](auto i) QK_INLINE {
                  store_sum<BlockSums, i.value>(flow.held_for);
                  clear_sum<i.value>();
                },
                between);
          else
            add_step<PanelTiles, kTiles>(
                a, b,
                [&](auto i) QK_INLINE {
                  store_sum<BlockSums, i.value>(flow.held_for);
                  load_sum<BlockSums, i.value>(block.carried);
                },
                between);
          if (k == 0 && kTiles == 1) {  // the block before may have had all four
            store_sum<BlockSums, 2>(flow.held_for);
            store_sum<BlockSums, 3>(flow.held_for);
          }
        }
        flow.held_for = span[g].ends ? c + g * kPairSums : block.carried;
      }
      add_rest<kPlain>(pending, next);
      pending.rows = 0;
      if (!span->ends) return;
      wait_for(block, ws, s, count, c, pending);
    }
  }

  void multiply(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) const {
    if (p_.act.symmetric && !p_.weight_min)
      multiply_as<true>(row, rows, q, scales, team);
    else
      multiply_as<false>(row, rows, q, scales, team);
  }

  template <bool kPlain>
  void multiply_as(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) const {
    Workspace& ws = *reinterpret_cast<Workspace*>(p_.scratch + this->workspaces(p_.m, p_.k, this->groups_, p_.threads) +
                                                  team.thread() * static_cast<int64_t>(sizeof(Workspace)));
    const int64_t tiles = ceil_div(rows, kPairRows), superblocks = ceil_div(p_.n, kBlockN);
    for_tiles(team, superblocks, p_.k, {rows, tiles, ceil_div(tiles, kBlockTiles), kLeastPieceRows},
              [&](int64_t nb, Range range, bool more) {
                superblock<kPlain>(nb, row, rows, range, q, scales, more, team.size() > 1, ws);
              });
    if (streams_) V::stream_fence();
  }

  template <bool kPlain>
  void superblock(int64_t nb, int64_t row, int64_t rows, Range block, const uint8_t* q, const RowScale* scales,
                  bool more, bool shared, Workspace& ws) const {
    const int64_t n0 = nb * kBlockN, columns = p_.n - n0 < kBlockN ? p_.n - n0 : kBlockN;
    const int64_t bytes = steps_ * kSpan * kBytesPerK;
    const int64_t slice = shared ? kSliceSteps : kSliceStepsAlone;
    const int64_t most = block.size() <= 2 ? kFewTilesSteps : this->group_ <= slice / 2 * kSpan ? slice : kPanelSteps;
    const uint8_t* codes = p_.packed + nb * bytes;
    const int32_t* row_sums = reinterpret_cast<const int32_t*>(q + this->sums_at(row));
    for (int64_t k = 0; k < p_.k;) {
      const int64_t next = this->plan(k, most, ws);
      int64_t at = 0;
      for (int64_t s = 0; s < ws.span_count; at += ws.spans[s++].steps) {
        if constexpr (kWhole)
          this->unpack_whole(codes, ws.spans[s], nb, at, ws);
        else
          this->unpack_span(codes, ws.spans[s], nb, at, ws);
      }
      const bool last = next == p_.k, alone = last && k == 0;  // then one block's worth of L1 serves all totals
      // As much of what is unpacked next: this superblock's rest, or the next one's beginning.
      Flow flow;
      flow.held_for = ws.sums[0][0];  // of no use yet
      flow.asks = shared;
      flow.ahead = codes + (last ? bytes : next * kBytesPerK);
      flow.end = flow.ahead + (last && !more ? 0 : (next - k) * kBytesPerK);
      for (int64_t j = 0; j < columns; j += kPairRows) {
        for (int64_t t = block.begin; t < block.end; ++t) {
          const int64_t h = j / kPairRows, first = t * kPairRows, count = rows_of_pair(rows, t), i = t - block.begin;
          const int64_t then = t + 1 < block.end ? t + 1 : block.begin;
          Block told{q + t * steps_ * kPairBytes, q + then * steps_ * kPairBytes, ws.panel[h], ws.carried[h][i], {}};
          told.pending.rows = count;
          told.pending.scale = ws.scale[0] + j;
          told.pending.min = ws.min[0] + j;
          told.pending.weight_sum = ws.weight_sum[0] + j;
          told.pending.row_sums = row_sums + first * this->groups_;
          told.pending.totals = alone ? ws.totals[0][0] : ws.totals[h][i];
          told.pending.row = row + first;
          told.pending.n0 = n0 + j;
          told.pending.scales = scales + first;
          if (last) prefetch_residual(p_.residual, p_.y_dtype, row + first, count, n0 + j, kPairRows);
          const int64_t even = kPlain && count > kTileRows && flow.pending.rows % kPairRows == 0 ? ws.even_groups : 0;
          if (even > 0 && shared && multiply_even<true>(even, told, ws, flow)) continue;
          if (even > 0 && !shared && multiply_even<false>(even, told, ws, flow)) continue;
          if (count > kTileRows)
            multiply_block<kPlain, 2>(told, ws, flow);
          else
            multiply_block<kPlain, 1>(told, ws, flow);
        }
      }
      store_fence();
      store_sums<2>(flow.held_for);
      finish_added(flow);
      add_rest<kPlain>(flow.pending, 0);
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

  const bool streams_;  // y, past the caches
};

}  // namespace
}  // namespace qk
