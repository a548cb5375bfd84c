// A tensor to quantize at any granularity (args.h says how it is seen): who takes which granules, and those whose
// elements are neighbours. Columns, side by side, are in quantize_columns.h.
#pragma once

#include "../args.h"
#include "../layout.h"
#include "quantize_rows.h"
#include "team.h"

namespace qk {
namespace {

// The strided case: columns of a block, over all rows twice. Pieces of rows of 2 KB and more keep a block of 4 MB in
// the last-level cache for the second pass, of which a virtual machine may have a small part. Narrower ones would take
// longer than whole rows, or nearly, twice from memory: no prefetcher follows what is written in such pieces (Zen 3,
// 4096 x 8192 in bf16: 10 to 12 ms after 8 to 9).
constexpr int64_t kMinPiece = 2 << 10, kLongPiece = 8 << 10, kWholePiece = 32 << 10, kBlock = 4 << 20;  // bytes
constexpr int64_t kColumns = 8192;  // most of a block
constexpr int64_t kLongRun = 2048;  // elements; channels of such runs are taken one by one
// What a second pass asks for in advance: x, and x of pieces.
constexpr int64_t kAheadBytes = 4096, kPieceAheadBytes = 2048;
// Contiguous granules of other sizes are taken in batches, whose second pass finds them in L1 and asks for the next
// one.
constexpr int kBatch = 256;
constexpr int64_t kBatchElements = 4096;
constexpr int64_t kLongGranule = 1024, kPieceElements = 512;  // even
// Elements; the second pass of one contiguous granule runs from its end, which is still near.
constexpr int64_t kBackward = 64 << 10;
constexpr int kMaxSplit = 256;  // threads that share one contiguous granule
constexpr int64_t kMinSplit = 64 << 10;  // elements of a contiguous granule worth sharing

inline Levels levels_of(QKind kind, bool symmetric) {
  if (kind == QKind::kInt4) return symmetric ? Levels{-8, 7, 8} : Levels{0, 15, 0};
  if (kind == QKind::kInt8) return symmetric ? Levels{-127, 127, 0} : Levels{0, 255, -128};
  return symmetric ? Levels{-127, 127, 128} : Levels{0, 255, 0};
}

template <class V, DType D>
class Quantize {
 public:
  explicit Quantize(const QuantizeArgs& args)
      : p_(args), bits_(args.kind == QKind::kInt4 ? 4 : 8), levels_(levels_of(args.kind, args.symmetric)) {}

  void run() const {
    const int64_t elements = p_.outer * p_.channels * p_.inner;
    const int threads = threads_for(elements, p_.threads);
    if (p_.outer == 1 && p_.group == 0 && (p_.channels < threads || threads == 1) && p_.inner >= kMinSplit) {
      for (int64_t c = 0; c < p_.channels; ++c) shared_row(c, threads < kMaxSplit ? threads : kMaxSplit);
    } else if (p_.outer == 1) {
      rows(threads);
    } else if (p_.inner >= kLongRun) {
      parallel_pieces(threads, conversion(p_.channels, p_.outer * p_.inner), [&](Range of) { strided(of); });
    } else {
      const int64_t fair = round_up(ceil_div(p_.channels * p_.inner, threads), kAlign), near = kBlock / p_.outer;
      const int64_t bytes = near < kMinPiece    ? kWholePiece
                            : near < kLongPiece ? near
                                                : kLongPiece,
                    piece = bytes / kBytes / kAlign * kAlign;
      const int64_t most = piece < kColumns ? piece : kColumns, width = fair < most ? fair : most;
      const int64_t per_block = p_.inner < width ? width / p_.inner : 1, blocks = ceil_div(p_.channels, per_block);
      parallel_pieces(threads, conversion(blocks, per_block * p_.outer * p_.inner), [&](Range range) {
        for (int64_t b = range.begin; b < range.end; ++b) {
          const int64_t c0 = b * per_block, count = p_.channels - c0 < per_block ? p_.channels - c0 : per_block;
          columns(c0, count);
        }
      });
    }
  }

 private:
  using G = Granule<V, D>;
  static constexpr int64_t kBytes = D == DType::kF32 ? 4 : 2;

  // x and q from element `at` on.
  const void* x_at(int64_t at) const { return static_cast<const char*>(p_.x) + at * kBytes; }
  uint8_t* q_at(int64_t at) const { return static_cast<uint8_t*>(p_.q) + at; }

  Stats stats(const void* x, int64_t begin, int64_t end) const {
    return p_.symmetric || p_.is_static ? G::template stats<false>(x, nullptr, begin, end)
                                        : G::template stats<true>(x, nullptr, begin, end);
  }

  Params params_of(const Stats& s, int64_t granule) const {
    if (p_.is_static)
      return static_params(s, p_.scale[granule], p_.zero_point ? p_.zero_point[granule] - levels_.offset : 0);
    return p_.symmetric ? symmetric_params(s, bits_) : asymmetric_params(s, bits_);
  }
  void publish(const Params& params, int64_t granule) const {
    if (p_.is_static && params.scale == params.scale) return;  // only a granule marked NaN changes what was given
    p_.scale[granule] = params.scale;
    if (p_.zero_point) p_.zero_point[granule] = params.zero_point + levels_.offset;
  }
  void publish(const float* scale, const int32_t* zero_point, int64_t granule, int64_t count) const {
    std::memcpy(p_.scale + granule, scale, static_cast<size_t>(count) * 4);
    for (int64_t i = 0; p_.zero_point && i < count; ++i) p_.zero_point[granule + i] = zero_point[i] + levels_.offset;
  }
  Params params(const Stats& s, int64_t granule) const {
    const Params result = params_of(s, granule);
    publish(result, granule);
    return result;
  }

  // Elements [begin, end) of a contiguous run at x, to q (bytes, or nibbles: begin is even then).
  template <bool kNibbles, bool kClamps>
  QK_INLINE void emit_as(const void* x, int64_t begin, int64_t end, const Params& params, bool finite, int64_t ahead,
                         uint8_t* q) const {
    uint8_t* out = q + (kNibbles ? begin / 2 : begin);
    if (finite) return G::template quantize<kNibbles, kClamps>(x, nullptr, begin, end, params, levels_, ahead, out);
    const int64_t n = end - begin;
    fill(out, kNibbles ? ceil_div(n, 2) : n, kNibbles ? levels_.offset * 0x11 : levels_.offset);
    if (kNibbles && n % 2) out[n / 2] &= 15;
  }
  void emit(const void* x, int64_t begin, int64_t end, const Params& params, bool finite, uint8_t* q) const {
    if (p_.kind == QKind::kInt4)
      p_.is_static ? emit_as<true, true>(x, begin, end, params, finite, 0, q)
                   : emit_as<true, false>(x, begin, end, params, finite, 0, q);
    else
      p_.is_static ? emit_as<false, true>(x, begin, end, params, finite, 0, q)
                   : emit_as<false, false>(x, begin, end, params, finite, 0, q);
  }

  int64_t row_q_bytes() const { return p_.kind == QKind::kInt4 ? ceil_div(p_.inner, 2) : p_.inner; }

  // Of a vector of granules by their statistics.
  LaneParams<V> lane_params(const float* absmax, const float* lo, const float* hi) const {
    return p_.symmetric ? LaneParams<V>::symmetric(V::load_f(absmax), bits_)
                        : LaneParams<V>::asymmetric(V::load_f(absmax), V::load_f(lo), V::load_f(hi), bits_);
  }

  // Statistics and then parameters of a few granules.
  struct Batch {
    alignas(kAlign) float absmax[kBatch], lo[kBatch], hi[kBatch], scale[kBatch], inv[kBatch];
    alignas(kAlign) int32_t zero_point[kBatch];
  };

  void batch_params(Batch& b, int count, int64_t granule) const {
    for (int i = count; i % V::kLanes != 0; ++i) b.absmax[i] = b.lo[i] = b.hi[i] = 0.0f;  // whole vectors are read
    for (int i = 0; i < count; i += V::kLanes) {
      const auto p = lane_params(b.absmax + i, b.lo + i, b.hi + i);
      V::store_f(b.scale + i, p.scale);
      V::store_f(b.inv + i, p.inv);
      V::store_i(b.zero_point + i, p.zero_point);
    }
    publish(b.scale, b.zero_point, granule, count);
  }

  // `count` granules of neighbouring elements each, x and q at the first.
  template <bool kNibbles, bool kRange>
  void batches_of_granules(const void* x, uint8_t* q, int64_t size, int64_t granule, int64_t count) const {
    const int64_t fit = kBatchElements / size, most = fit < 1 ? 1 : fit < kBatch ? fit : kBatch, ahead = most * size;
    Batch batch;
    for (int64_t done = 0; done < count; done += most) {
      const int n = static_cast<int>(count - done < most ? count - done : most);
      const char* at = static_cast<const char*>(x) + done * size * kBytes;
      for (int i = 0; i < n; ++i) {
        const Stats s = G::template stats<kRange>(at + i * size * kBytes, nullptr, 0, size);
        batch.absmax[i] = float_from_bits(s.abs_bits);
        if constexpr (kRange) batch.lo[i] = s.lo, batch.hi[i] = s.hi;
      }
      batch_params(batch, n, granule + done);
      uint8_t* out = q + done * size / (kNibbles ? 2 : 1);
      for (int i = 0; i < n; ++i) {
        const Params params = {batch.scale[i], batch.inv[i], batch.zero_point[i]};
        emit_as<kNibbles, false>(at + i * size * kBytes, 0, size, params, params.scale == params.scale, ahead,
                                 out + i * size / (kNibbles ? 2 : 1));
      }
    }
  }

  // Long granules: while the levels of one are written, piece by piece, statistics of the next are taken from memory.
  // Each has `runs` of `size` elements, `pitch` elements apart, and every other one goes through them backward: what
  // was read last is still near.
  template <bool kNibbles, bool kRange>
  void long_granules(const char* x, uint8_t* q, int64_t size, int64_t runs, int64_t pitch, int64_t granule,
                     int64_t count) const {
    if (count == 0) return;
    const int64_t step = size * kBytes, ahead = size + kPieceAheadBytes / kBytes;
    Stats now;
    for (int64_t r = 0; r < runs; ++r) now.merge(G::template stats<kRange>(x + r * pitch * kBytes, nullptr, 0, size));
    for (int64_t g = 0; g < count; ++g, x += step, q += kNibbles ? size / 2 : size) {
      const Params params = kRange ? asymmetric_params(now, bits_) : symmetric_params(now, bits_);
      publish(params, granule + g);
      Stats next;
      for (int64_t turn = 0; turn < runs; ++turn) {
        const int64_t r = g % 2 ? turn : runs - 1 - turn;
        const char* from = x + r * pitch * kBytes;
        for (int64_t begin = 0; begin < size; begin += kPieceElements) {
          const int64_t end = size - begin < kPieceElements ? size : begin + kPieceElements;
          emit_as<kNibbles, false>(from, begin, end, params, now.finite(), ahead, q + r * pitch);
          if (g + 1 < count) next.merge(G::template stats<kRange>(from + step, nullptr, begin, end));
        }
      }
      now = next;
    }
  }

  // Short granules, a lane each: their statistics become parameters, and those levels, while they are in L1.
  template <bool kNibbles, bool kRange, int kSize>
  void lanes_of_granules(const char* x, uint8_t* q, int64_t granule, int64_t count) const {
    using I = typename V::I;
    constexpr int kW = V::kLanes, kCodes = kNibbles ? kSize / 2 : kSize, kBits = kNibbles ? 4 : 8, kStep = 4 * kW;
    const Levels levels = levels_;  // copies: stores of bytes might change members
    const typename G::template Store<kNibbles> store(levels);
    float* const scales = p_.scale;
    int32_t* const zero_points = p_.zero_point;
    const I offset = V::set_i(levels.offset), shifted = V::set_i(levels.offset + store.shift),
            only_shift = V::set_words(levels.offset + store.shift);
    alignas(kAlign) float inv[kW];
    alignas(kAlign) int32_t zero_point[kW], shift[kW];
    for (int64_t g = granule; g < granule + count; g += kW, x += kW * kSize * kBytes, q += kW * kCodes) {
      I most[kW], least[kW];
      for (int i = 0; i < kW; ++i) G::template see_all<kRange, kSize>(x + i * kSize * kBytes, most[i], least[i]);
      auto absmax = V::template reduce_each_unsigned<D>(most);
      auto p = LaneParams<V>::symmetric(absmax, kBits);
      if constexpr (kRange) {
        const auto hi = absmax, low = V::template reduce_each_unsigned<D>(least);
        absmax = V::as_f(V::max_i(V::abs_bits(hi), V::abs_bits(low)));
        p = LaneParams<V>::asymmetric(absmax, V::min(low, V::set(0.0f)), hi, kBits);
        V::store_i(shift, V::add_i(p.zero_point, shifted));
      }
      V::store_f(scales + g, p.scale);
      if (zero_points) V::store_i(zero_points + g, V::add_i(p.zero_point, offset));
      V::store_f(inv, p.inv);
      if (kSize % kStep == 0 && V::reduce_max_i(V::as_i(absmax)) < kInfBits) {
        for (int i = 0; i < kW; ++i) {
          const char* at = x + i * kSize * kBytes;
          const auto inverse = V::set(inv[i]);
          const I words = kRange ? V::set_words(shift[i]) : only_shift;
          for (int j = 0; j < kSize; j += kStep) {
            for (int line = 0; line < kStep * kBytes; line += kAlign)
              __builtin_prefetch(at + j * kBytes + kAheadBytes + line, 0, 2);
            typename V::F v[4];
            V::template load4<D>(at, j, v);
            const auto level = [&](int k) QK_INLINE { return V::round_i(V::mul(v[k], inverse)); };
            store.template put<D>(q + i * kCodes + j / (kNibbles ? 2 : 1), level(0), level(1), level(2), level(3),
                                  words);
          }
        }
      } else {
        V::store_i(zero_point, p.zero_point);
        for (int i = 0; i < kW; ++i)
          emit_as<kNibbles, false>(x + i * kSize * kBytes, 0, kSize, {scales[g + i], inv[i], zero_point[i]},
                                   scales[g + i] == scales[g + i], kAheadBytes / kBytes, q + i * kCodes);
      }
    }
  }

  template <bool kNibbles, bool kRange>
  void dynamic_granules(const void* x, uint8_t* q, int64_t size, int64_t granule, int64_t count) const {
    const char* at = static_cast<const char*>(x);
    if (size >= kLongGranule) return long_granules<kNibbles, kRange>(at, q, size, 1, size, granule, count);
    int64_t done = 0;
    if constexpr (V::kLanes > 1) {
      const int64_t whole = count / V::kLanes * V::kLanes;
      done = size == 32 || size == 64 || size == 128 ? whole : 0;
      if (size == 32) lanes_of_granules<kNibbles, kRange, 32>(at, q, granule, whole);
      if (size == 64) lanes_of_granules<kNibbles, kRange, 64>(at, q, granule, whole);
      if (size == 128) lanes_of_granules<kNibbles, kRange, 128>(at, q, granule, whole);
    }
    batches_of_granules<kNibbles, kRange>(at + done * size * kBytes, q + done * size / (kNibbles ? 2 : 1), size,
                                          granule + done, count - done);
  }

  // Granules in the order of memory; size is even for nibbles, or there is one.
  void granules(const void* x, uint8_t* q, int64_t size, int64_t granule, int64_t count) const {
    if (p_.is_static || size == 0) {
      for (int64_t i = 0; i < count; ++i) {
        const Stats s = stats(x, i * size, (i + 1) * size);
        emit(x, i * size, (i + 1) * size, params(s, granule + i), s.finite(), q);
      }
    } else if (p_.kind == QKind::kInt4) {
      p_.symmetric ? dynamic_granules<true, false>(x, q, size, granule, count)
                   : dynamic_granules<true, true>(x, q, size, granule, count);
    } else {
      p_.symmetric ? dynamic_granules<false, false>(x, q, size, granule, count)
                   : dynamic_granules<false, true>(x, q, size, granule, count);
    }
  }

  // Rows whose granules are cut alike: one run of granules. Others end with a short granule, or with half a byte.
  void rows(int threads) const {
    const int64_t size = p_.group > 0 ? p_.group : p_.inner, whole = size > 0 ? p_.inner / size : 1;
    const bool ragged = whole * size != p_.inner || (p_.kind == QKind::kInt4 && p_.inner % 2);
    if (!ragged) {
      return parallel_pieces(threads, conversion(p_.channels * whole, size), [&](Range range) {
        const int64_t at = range.begin * size;
        granules(x_at(at), q_at(p_.kind == QKind::kInt4 ? at / 2 : at), size, range.begin, range.size());
      });
    }
    const int64_t rest = p_.inner - whole * size, in_row = whole + (rest > 0);
    parallel_pieces(threads, conversion(p_.channels, p_.inner), [&](Range range) {
      for (int64_t c = range.begin; c < range.end; ++c) {
        uint8_t* q = q_at(c * row_q_bytes());
        granules(x_at(c * p_.inner), q, size, c * in_row, whole);
        const int64_t done = whole * size;
        if (rest > 0)
          granules(x_at(c * p_.inner + done), q + (p_.kind == QKind::kInt4 ? done / 2 : done), rest, c * in_row + whole,
                   1);
      }
    });
  }

  // One contiguous granule, shared by a team. Shares are even so that no two threads write one byte of int4.
  void shared_row(int64_t c, int threads) const {
    const void* x = x_at(c * p_.inner);
    uint8_t* q = q_at(c * row_q_bytes());
    Stats partial[kMaxSplit];
    parallel(threads, [&](int thread, int team) {
      Range range = share(ceil_div(p_.inner, 2), thread, team);
      range = {range.begin * 2, range.end * 2 < p_.inner ? range.end * 2 : p_.inner};
      partial[thread] = stats(x, range.begin, range.end);
      barrier(team);
      Stats whole;
      for (int t = 0; t < team; ++t) whole.merge(partial[t]);
      const Params result = params_of(whole, c);
      if (thread == 0) publish(result, c);
      for (int64_t turn = ceil_div(range.size(), kBackward); turn-- > 0;) {
        const int64_t begin = range.begin + turn * kBackward, rest = range.end - begin;
        emit(x, begin, rest < kBackward ? range.end : begin + kBackward, result, whole.finite(), q);
      }
    });
  }

  // Channels whose runs along inner are long.
  void strided(Range channels) const {
    const int64_t pitch = p_.channels * p_.inner, at = channels.begin * p_.inner, count = channels.size();
    if (!p_.is_static) {
      const char* x = static_cast<const char*>(x_at(at));
      return p_.symmetric ? long_granules<false, false>(x, q_at(at), p_.inner, p_.outer, pitch, channels.begin, count)
                          : long_granules<false, true>(x, q_at(at), p_.inner, p_.outer, pitch, channels.begin, count);
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      Stats s;
      for (int64_t o = 0; o < p_.outer; ++o) s.merge(stats(x_at(o * pitch + c * p_.inner), 0, p_.inner));
      const Params result = params(s, c);
      for (int64_t o = p_.outer; o-- > 0;) {  // the run that was read last first
        const int64_t run = o * pitch + c * p_.inner;
        emit(x_at(run), 0, p_.inner, result, s.finite(), q_at(run));
      }
    }
  }

  // What is known of the columns of a block: with inner > 1, first of each column and then of each channel.
  struct Block {
    // Whole vectors are read and written, so each array has room for one past the last column: 32 halves.
    alignas(kAlign) char most[(kColumns + 32) * kBytes], least[(kColumns + 32) * kBytes];  // bits of elements
    alignas(kAlign) float absmax[kColumns + 32], lo[kColumns + 32], hi[kColumns + 32], inv[kColumns + 32];
    alignas(kAlign) int32_t zero_point[kColumns + 32];
  };

  // In quantize_columns.h.
  template <bool kRange>
  void see_columns(Block& b, int64_t at, int64_t width) const;
  bool params_of_columns(Block& b, int64_t c0, int64_t count, bool range) const;
  void columns(int64_t c0, int64_t count) const;

  const QuantizeArgs& p_;
  const int bits_;
  const Levels levels_;
};

}  // namespace
}  // namespace qk
