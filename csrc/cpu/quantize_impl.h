// quantize and dequantize of whole tensors at every granularity; see args.h for how a tensor is seen.
//
//   rows      outer = 1: a granule is contiguous (per token, per channel of the first axis, per group, per tensor)
//   columns   outer > 1: a granule is strided (per channel of any other axis); columns of a block are done side by side
#pragma once

#include "../args.h"
#include "../layout.h"
#include "quantize_rows.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int64_t kStage = 512;  // elements staged as bytes before int4 packing; even
// Columns of a block in the strided case: pieces of rows long enough to be read as streams (256 columns ran at a fifth
// of the bandwidth), of which 5 vectors of operands stay in L1 or L2.
constexpr int64_t kMinColumns = 256, kColumns = 2048, kNearElements = 256 << 10;
constexpr int64_t kRowsAhead =
    4;  // rows of a block asked for in advance: prefetchers do not follow from one to the next
// Contiguous granules are taken in batches, whose second pass finds them in L1 or L2. Arithmetic takes about as long as
// memory where halves or short groups come in: then batches are short, and the second pass asks for the next one.
// Elsewhere long batches without that are faster (Zen 3: 91 % of the bandwidth after 77 %, and 57 % where it was needed).
constexpr int kBatch = 256;
constexpr int64_t kShortBatch = 4096, kLongBatch = 16384, kMaxAhead = 32 << 10;  // elements
constexpr int64_t kLongGranule = 64;  // elements
constexpr int64_t kBackward = 64 << 10;  // elements; a long granule's second pass runs from its end, which is still near
constexpr int kMaxSplit = 64;  // threads that share one contiguous granule
constexpr int64_t kMinSplit = 64 << 10;  // elements of a contiguous granule worth sharing
constexpr int64_t kMinElementsPerThread = 16 << 10;

inline Levels levels_of(QKind kind, bool symmetric) {
  if (kind == QKind::kInt4) return symmetric ? Levels{-8, 7, 8} : Levels{0, 15, 0};
  return symmetric ? Levels{-127, 127, 0} : Levels{0, 255, 0};
}

inline void unpack_nibbles(const uint8_t* in, int64_t n, uint8_t* bytes) {
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    bytes[2 * i] = in[i] & 15;
    bytes[2 * i + 1] = in[i] >> 4;
  }
  if (n % 2) bytes[n - 1] = in[pairs] & 15;
}

inline int threads_for(int64_t elements, int threads) {
  const int64_t useful = elements / kMinElementsPerThread;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
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
      parallel(threads, [&](int thread, int team) { rows(thread, team); });
    } else {
      // A block for each thread, and one whose second pass finds it in the cache, if that is not too few columns.
      const int64_t fair = ceil_div(p_.channels * p_.inner, threads), near = kNearElements / p_.outer,
                    most = fair < near ? fair : near, even = round_up(most, kAlign);
      const int64_t width = even < kMinColumns ? kMinColumns : even > kColumns ? kColumns : even;
      const int64_t per_block = p_.inner < width ? width / p_.inner : 1, blocks = ceil_div(p_.channels, per_block);
      parallel(threads, [&](int thread, int team) {
        const Range range = share(blocks, thread, team);
        for (int64_t b = range.begin; b < range.end; ++b) {
          const int64_t c0 = b * per_block, count = p_.channels - c0 < per_block ? p_.channels - c0 : per_block;
          if (p_.inner <= kColumns)
            columns(c0, count);
          else
            strided(c0);
        }
      });
    }
  }

 private:
  using G = Granule<V, D>;

  // x and q from element `at` on.
  const void* x_at(int64_t at) const { return static_cast<const char*>(p_.x) + at * (D == DType::kF32 ? 4 : 2); }
  uint8_t* q_at(int64_t at) const { return static_cast<uint8_t*>(p_.q) + at; }

  Stats stats(const void* x, int64_t begin, int64_t end) const {
    return p_.symmetric || p_.is_static ? G::template stats<false>(x, nullptr, begin, end)
                                        : G::template stats<true>(x, nullptr, begin, end);
  }

  Params params_of(const Stats& s, int64_t granule) const {
    if (p_.is_static) return static_params(s, p_.scale[granule], p_.zero_point ? p_.zero_point[granule] : 0);
    return p_.symmetric ? symmetric_params(s, bits_) : asymmetric_params(s, bits_);
  }
  void publish(const Params& params, int64_t granule) const {
    if (p_.is_static && params.scale == params.scale) return;  // only a granule marked NaN changes what was given
    p_.scale[granule] = params.scale;
    if (p_.zero_point) p_.zero_point[granule] = params.zero_point;
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

  // Statistics and then parameters of a few granules.
  struct Batch {
    alignas(kAlign) float absmax[kBatch], lo[kBatch], hi[kBatch], scale[kBatch], inv[kBatch];
    alignas(kAlign) int32_t zero_point[kBatch];
  };

  void batch_params(Batch& b, int count, int64_t granule) const {
    for (int i = count; i % V::kLanes != 0; ++i) b.absmax[i] = b.lo[i] = b.hi[i] = 0.0f;  // whole vectors are read
    for (int i = 0; i < count; i += V::kLanes) {
      const auto absmax = V::load_f(b.absmax + i);
      const auto p = p_.symmetric
                         ? LaneParams<V>::symmetric(absmax, bits_)
                         : LaneParams<V>::asymmetric(absmax, V::load_f(b.lo + i), V::load_f(b.hi + i), bits_);
      V::store_f(b.scale + i, p.scale);
      V::store_f(b.inv + i, p.inv);
      V::store_i(b.zero_point + i, p.zero_point);
    }
    std::memcpy(p_.scale + granule, b.scale, static_cast<size_t>(count) * 4);
    if (p_.zero_point) std::memcpy(p_.zero_point + granule, b.zero_point, static_cast<size_t>(count) * 4);
  }

  // `count` granules of neighbouring elements each, x and q at the first; kSize of them, or `given` where that is 0.
  template <bool kNibbles, bool kRange, int kSize>
  void dynamic_granules(const void* x, uint8_t* q, int64_t given, int64_t granule, int64_t count) const {
    constexpr int64_t kBytes = D == DType::kF32 ? 4 : 2;
    const int64_t size = kSize > 0 ? kSize : given;
    const bool streams = D == DType::kF32 && size >= kLongGranule;
    const int64_t fit = (streams ? kLongBatch : kShortBatch) / size, most = fit < 1 ? 1 : fit < kBatch ? fit : kBatch;
    const int64_t ahead = !streams && most * size <= kMaxAhead ? most * size : 0;
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

  template <bool kNibbles, bool kRange>
  void dynamic_granules(const void* x, uint8_t* q, int64_t size, int64_t granule, int64_t count) const {
    switch (size) {
      case 32:
        return dynamic_granules<kNibbles, kRange, 32>(x, q, size, granule, count);
      case 64:
        return dynamic_granules<kNibbles, kRange, 64>(x, q, size, granule, count);
      case 128:
        return dynamic_granules<kNibbles, kRange, 128>(x, q, size, granule, count);
      default:
        return dynamic_granules<kNibbles, kRange, 0>(x, q, size, granule, count);
    }
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
  void rows(int thread, int team) const {
    const int64_t size = p_.group > 0 ? p_.group : p_.inner, whole = size > 0 ? p_.inner / size : 1;
    const bool ragged = whole * size != p_.inner || (p_.kind == QKind::kInt4 && p_.inner % 2);
    if (!ragged) {
      const Range range = share(p_.channels * whole, thread, team);
      const int64_t at = range.begin * size;
      return granules(x_at(at), q_at(p_.kind == QKind::kInt4 ? at / 2 : at), size, range.begin,
                      range.end - range.begin);
    }
    const Range range = share(p_.channels, thread, team);
    const int64_t rest = p_.inner - whole * size, in_row = whole + (rest > 0);
    for (int64_t c = range.begin; c < range.end; ++c) {
      uint8_t* q = q_at(c * row_q_bytes());
      granules(x_at(c * p_.inner), q, size, c * in_row, whole);
      const int64_t done = whole * size;
      if (rest > 0)
        granules(x_at(c * p_.inner + done), q + (p_.kind == QKind::kInt4 ? done / 2 : done), rest, c * in_row + whole,
                 1);
    }
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
      for (int64_t turn = ceil_div(range.end - range.begin, kBackward); turn-- > 0;) {
        const int64_t begin = range.begin + turn * kBackward, rest = range.end - begin;
        emit(x, begin, rest < kBackward ? range.end : begin + kBackward, result, whole.finite(), q);
      }
    });
  }

  // One channel whose runs along inner are long.
  void strided(int64_t c) const {
    Stats s;
    for (int64_t o = 0; o < p_.outer; ++o) s.merge(stats(x_at((o * p_.channels + c) * p_.inner), 0, p_.inner));
    const Params result = params(s, c);
    for (int64_t o = 0; o < p_.outer; ++o) {
      const int64_t at = (o * p_.channels + c) * p_.inner;
      emit(x_at(at), 0, p_.inner, result, s.finite(), q_at(at));
    }
  }

  void prefetch_row(int64_t o, int64_t pitch, int64_t at, int64_t width) const {
    if (o >= p_.outer) return;
    const char* x = static_cast<const char*>(x_at(o * pitch + at));
    for (int64_t i = 0; i < width * (D == DType::kF32 ? 4 : 2); i += kAlign) __builtin_prefetch(x + i);
  }

  // `count` channels of short runs, side by side: count * inner <= kColumns columns.
  void columns(int64_t c0, int64_t count) const {
    constexpr int kW = V::kLanes;
    const int64_t width = count * p_.inner, pitch = p_.channels * p_.inner, at = c0 * p_.inner;
    // Whole vectors are read and written, so each array has room for one past the last column.
    alignas(kAlign) int32_t abs_bits[kColumns + 16], shift[kColumns + 16];
    alignas(kAlign) float lo[kColumns + 16], hi[kColumns + 16], inv[kColumns + 16];
    for (int64_t j = 0; j < width + kW; ++j) abs_bits[j] = shift[j] = 0, lo[j] = hi[j] = inv[j] = 0.0f;
    const bool ranged = !p_.symmetric && !p_.is_static;
    for (int64_t o = 0; o < p_.outer; ++o) {
      const void* x = x_at(o * pitch + at);
      prefetch_row(o + kRowsAhead, pitch, at, width);
      for (int64_t j = 0; j < width; j += kW) {
        const auto v =
            width - j < kW ? V::template load_part<D>(x, j, static_cast<int>(width - j)) : V::template load<D>(x, j);
        V::store_i(abs_bits + j, V::max_i(V::load_i(abs_bits + j), V::abs_bits(v)));
        if (ranged) {  // a NaN in v leaves the bounds alone; abs_bits tells of it
          V::store_f(lo + j, V::min(v, V::load_f(lo + j)));
          V::store_f(hi + j, V::max(v, V::load_f(hi + j)));
        }
      }
    }
    bool packs = p_.symmetric && !p_.is_static;  // q lies within 127, nothing is added to it
    for (int64_t c = 0; c < count; ++c) {
      Stats s;
      for (int64_t i = c * p_.inner; i < (c + 1) * p_.inner; ++i) s.merge({abs_bits[i], lo[i], hi[i]});
      const Params result = params(s, c0 + c);
      packs = packs && s.finite();
      for (int64_t i = c * p_.inner; i < (c + 1) * p_.inner; ++i) {
        inv[i] = result.inv;
        // Both bounds zero give q = 0 even for NaN: min and max return their second operand when the first is NaN.
        lo[i] = s.finite() ? static_cast<float>(levels_.lo - result.zero_point) : 0.0f;
        hi[i] = s.finite() ? static_cast<float>(levels_.hi - result.zero_point) : 0.0f;
        shift[i] = result.zero_point + levels_.offset;
      }
    }
    for (int64_t o = 0; o < p_.outer; ++o) {
      const void* x = x_at(o * pitch + at);
      uint8_t* q = q_at(o * pitch + at);
      prefetch_row(o + kRowsAhead, pitch, at, width);
      int64_t j = 0;
      for (; packs && j + 4 * kW <= width; j += 4 * kW) {
        const auto level = [&](int64_t i) { return V::round_i(V::mul(V::template load<D>(x, i), V::load_f(inv + i))); };
        V::store_packed(q + j, level(j), level(j + kW), level(j + 2 * kW), level(j + 3 * kW), 0, 0);
      }
      for (; j < width; j += kW) {
        const int n = static_cast<int>(width - j < kW ? width - j : kW);
        auto v = n < kW ? V::template load_part<D>(x, j, n) : V::template load<D>(x, j);
        v = V::min(V::max(V::mul(v, V::load_f(inv + j)), V::load_f(lo + j)), V::load_f(hi + j));
        const auto stored = V::add_i(V::round_i(v), V::load_i(shift + j));
        if (n < kW)
          V::store_low8_part(q + j, stored, n);
        else
          V::store_low8(q + j, stored);
      }
    }
  }

  const QuantizeArgs& p_;
  const int bits_;
  const Levels levels_;
};

// out = scale * (q - zero_point), one rounding, then rounded to the output dtype.
template <class V, DType D>
class Dequantize {
 public:
  explicit Dequantize(const DequantizeArgs& args) : p_(args) {}

  void run() const {
    const int64_t runs = p_.outer * p_.channels;
    const int threads = threads_for(runs * p_.inner, p_.threads);
    if (runs < threads && p_.kind != QKind::kInt4 && p_.group == 0) {  // few long runs: share each of them
      parallel(threads, [&](int thread, int team) {
        const Range range = share(p_.inner, thread, team);
        for (int64_t r = 0; r < runs; ++r) run_bytes(r * p_.inner, range.begin, range.end, r % p_.channels);
      });
    } else if (p_.inner < V::kLanes && p_.outer > 1) {
      const int64_t per_block = kColumns / p_.inner, blocks = ceil_div(p_.channels, per_block);
      parallel(threads, [&](int thread, int team) {
        const Range range = share(p_.outer, thread, team);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t c0 = b * per_block;
          columns(range, c0, p_.channels - c0 < per_block ? p_.channels - c0 : per_block);
        }
      });
    } else {
      parallel(threads, [&](int thread, int team) {
        const Range range = share(runs, thread, team);
        for (int64_t r = range.begin; r < range.end; ++r) row(r);
      });
    }
  }

 private:
  using F = typename V::F;
  using I = typename V::I;

  void row(int64_t r) const {
    const int64_t c = r % p_.channels, group = p_.group > 0 ? p_.group : p_.inner;
    const int64_t groups = group > 0 ? ceil_div(p_.inner, group) : 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, end = begin + group < p_.inner ? begin + group : p_.inner;
      if (p_.kind == QKind::kInt4)
        run_nibbles(r, begin, end, c * groups + g);
      else
        run_bytes(r * p_.inner, begin, end, c * groups + g);
    }
  }

  I load(const uint8_t* q) const {
    return p_.kind == QKind::kInt8 ? V::load_i8(reinterpret_cast<const int8_t*>(q)) : V::load_u8(q);
  }
  I load_part(const uint8_t* q, int n) const {
    return p_.kind == QKind::kInt8 ? V::load_i8_part(reinterpret_cast<const int8_t*>(q), n) : V::load_u8_part(q, n);
  }

  int32_t zero_point(int64_t granule) const {
    return p_.zero_point ? p_.zero_point[granule] : p_.kind == QKind::kInt4 ? 8 : 0;
  }

  // q[0, n) to out[at, at + n).
  void values(const uint8_t* q, int64_t n, int64_t at, int64_t granule) const {
    constexpr int kW = V::kLanes;
    const F scale = V::set(p_.scale[granule]);
    const I zp = V::set_i(zero_point(granule));
    int64_t i = 0;
    for (; i + kW <= n; i += kW)
      V::template store<D>(p_.out, at + i, V::mul(V::to_f(V::sub_i(load(q + i), zp)), scale));
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      V::template store_part<D>(p_.out, at + i, V::mul(V::to_f(V::sub_i(load_part(q + i, rest), zp)), scale), rest);
    }
  }

  void run_bytes(int64_t base, int64_t begin, int64_t end, int64_t granule) const {
    values(static_cast<const uint8_t*>(p_.q) + base + begin, end - begin, base + begin, granule);
  }

  void run_nibbles(int64_t r, int64_t begin, int64_t end, int64_t granule) const {
    const uint8_t* q = static_cast<const uint8_t*>(p_.q) + r * ceil_div(p_.inner, 2);
    uint8_t stage[kStage];
    for (int64_t i = begin; i < end; i += kStage) {
      const int64_t n = end - i < kStage ? end - i : kStage;
      unpack_nibbles(q + i / 2, n, stage);
      values(stage, n, r * p_.inner + i, granule);
    }
  }

  void columns(Range rows, int64_t c0, int64_t count) const {
    constexpr int kW = V::kLanes;
    const int64_t width = count * p_.inner, pitch = p_.channels * p_.inner;
    alignas(kAlign) float scale[kColumns + 16];
    alignas(kAlign) int32_t zp[kColumns + 16];
    for (int64_t j = 0; j < width + kW; ++j) {  // whole vectors are read
      scale[j] = j < width ? p_.scale[c0 + j / p_.inner] : 0.0f;
      zp[j] = j < width ? zero_point(c0 + j / p_.inner) : 0;
    }
    for (int64_t o = rows.begin; o < rows.end; ++o) {
      const int64_t at = o * pitch + c0 * p_.inner;
      const uint8_t* q = static_cast<const uint8_t*>(p_.q) + at;
      for (int64_t j = 0; j < width; j += kW) {
        const int n = static_cast<int>(width - j < kW ? width - j : kW);
        const I stored = n < kW ? load_part(q + j, n) : load(q + j);
        const F v = V::mul(V::to_f(V::sub_i(stored, V::load_i(zp + j))), V::load_f(scale + j));
        if (n < kW)
          V::template store_part<D>(p_.out, at + j, v, n);
        else
          V::template store<D>(p_.out, at + j, v);
      }
    }
  }

  const DequantizeArgs& p_;
};

template <class V, DType D>
void embedding_as(const EmbeddingArgs& p) {
  const int64_t stride = padded_k(p.k);
  parallel(threads_for(p.count * p.k, p.threads), [&](int thread, int team) {
    const Range range = share(p.count, thread, team);
    int8_t stage[kStage];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t id = p.ids[i];
      const auto scale = V::set(p.scale[id]);
      const int8_t* row =
          p.packed ? p.table + id / kBlockN * kBlockN * stride + id % kBlockN * kPackK : p.table + id * p.k;
      for (int64_t k0 = 0; k0 < p.k; k0 += kStage) {
        const int64_t n = p.k - k0 < kStage ? p.k - k0 : kStage;
        const int8_t* q = row + k0;
        if (p.packed) {  // four bytes of each 256-byte line
          for (int64_t k = 0; k < n; k += kPackK) std::memcpy(stage + k, row + (k0 + k) * kBlockN, kPackK);
          q = stage;
        }
        for (int64_t j = 0; j < n; j += V::kLanes) {
          const int lanes = static_cast<int>(n - j < V::kLanes ? n - j : V::kLanes);
          if (lanes == V::kLanes)
            V::template store<D>(p.out, i * p.k + k0 + j, V::mul(V::to_f(V::load_i8(q + j)), scale));
          else
            V::template store_part<D>(p.out, i * p.k + k0 + j, V::mul(V::to_f(V::load_i8_part(q + j, lanes)), scale),
                                      lanes);
        }
      }
    }
  });
}

template <class V>
void embedding(const EmbeddingArgs& args) {
  switch (args.out_dtype) {
    case DType::kF32:
      return embedding_as<V, DType::kF32>(args);
    case DType::kBF16:
      return embedding_as<V, DType::kBF16>(args);
    default:
      return embedding_as<V, DType::kF16>(args);
  }
}

template <class V>
void quantize(const QuantizeArgs& args) {
  switch (args.x_dtype) {
    case DType::kF32:
      return Quantize<V, DType::kF32>(args).run();
    case DType::kBF16:
      return Quantize<V, DType::kBF16>(args).run();
    default:
      return Quantize<V, DType::kF16>(args).run();
  }
}

template <class V>
void dequantize(const DequantizeArgs& args) {
  switch (args.out_dtype) {
    case DType::kF32:
      return Dequantize<V, DType::kF32>(args).run();
    case DType::kBF16:
      return Dequantize<V, DType::kBF16>(args).run();
    default:
      return Dequantize<V, DType::kF16>(args).run();
  }
}

}  // namespace
}  // namespace qk
