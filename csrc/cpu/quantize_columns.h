// Strided granules of short runs: the columns of a block are done side by side, over all rows twice.
//
//   first pass   maxima of each column, a few rows at a time; from them the parameters of channels
//   second       levels, from the rows that were read last, which are still near
#pragma once

#include "quantize_tensor.h"

namespace qk {
namespace {

constexpr int kRowsAtOnce = 4, kRowsAhead = 4;  // of the first pass
constexpr int64_t kRowsInOrder = 64;  // of the second, which begins with the last ones
constexpr int64_t kLevelsAhead = 1024;  // elements of pieces that the second pass asks for in advance

// Maxima of the columns over all rows, several rows at a time.
template <class V, DType D>
template <bool kRange>
inline void Quantize<V, D>::see_columns(Block& b, int64_t at, int64_t width) const {
  constexpr int kRegister = V::template kRawBytes<D>;
  const int64_t bytes = width * kBytes, pitch = p_.channels * p_.inner * kBytes;
  std::memset(b.most, 0, static_cast<size_t>(bytes + kRegister));
  std::memset(b.least, 0, static_cast<size_t>(bytes + kRegister));
  for (int64_t o = 0; o < p_.outer; o += kRowsAtOnce) {
    const char* x = static_cast<const char*>(x_at(at)) + o * pitch;
    const int rows = static_cast<int>(p_.outer - o < kRowsAtOnce ? p_.outer - o : kRowsAtOnce);
    const auto step = [&](int64_t j, int count) {
      auto most = V::template load_raw<D>(b.most + j), least = V::template load_raw<D>(b.least + j);
      for (int r = 0; r < count; ++r) {
        G::template see<kRange>(x + r * pitch + j, most, least);
        if (j % kAlign < kRegister) __builtin_prefetch(x + (r + kRowsAhead) * pitch + j);
      }
      V::template store_raw<D>(b.most + j, most);
      if constexpr (kRange) V::template store_raw<D>(b.least + j, least);
    };
    int64_t j = 0;
    if (rows == kRowsAtOnce)
      for (; j + kRegister <= bytes; j += kRegister) step(j, kRowsAtOnce);
    else
      for (; j + kRegister <= bytes; j += kRegister) step(j, rows);
    if (j < bytes && bytes >= kRegister) step(bytes - kRegister, rows);
    for (int r = 0; r < rows && bytes < kRegister; ++r) {
      alignas(kAlign) char part[kRegister] = {};
      std::memcpy(part, x + r * pitch, static_cast<size_t>(bytes) % kRegister);
      auto most = V::template load_raw<D>(b.most), least = V::template load_raw<D>(b.least);
      G::template see<kRange>(part, most, least);
      V::template store_raw<D>(b.most, most);
      V::template store_raw<D>(b.least, least);
    }
  }
}

// From maxima to parameters, published and then spread over the columns. False if a granule holds NaN or Inf.
template <class V, DType D>
inline bool Quantize<V, D>::params_of_columns(Block& b, int64_t c0, int64_t count, bool range) const {
  constexpr int kW = V::kLanes;
  const int64_t width = count * p_.inner;
  const auto zero = V::set(0.0f);
  for (int64_t j = 0; j < width; j += kW) {
    const auto most = V::template load<D>(b.most, j), least = range ? V::template load<D>(b.least, j) : zero;
    V::store_f(b.absmax + j, V::as_f(V::max_i(V::abs_bits(most), V::abs_bits(least))));
    V::store_f(b.lo + j, V::min(least, zero));
    V::store_f(b.hi + j, most);
  }
  bool finite = true;
  for (int64_t c = 0; c < count; ++c) {
    Stats s;
    for (int64_t i = c * p_.inner; i < (c + 1) * p_.inner; ++i) s.merge({bits_of(b.absmax[i]), b.lo[i], b.hi[i]});
    b.absmax[c] = float_from_bits(s.abs_bits), b.lo[c] = s.lo, b.hi[c] = s.hi;
    finite = finite && s.finite();
  }
  for (int64_t c = count; c % kW != 0; ++c) b.absmax[c] = b.lo[c] = b.hi[c] = 0.0f;
  for (int64_t c = 0; c < count; c += p_.is_static ? 1 : kW) {
    if (p_.is_static) {
      const Params given = params({bits_of(b.absmax[c]), b.lo[c], b.hi[c]}, c0 + c);
      b.inv[c] = given.inv, b.zero_point[c] = given.zero_point;
      continue;
    }
    const auto p = lane_params(b.absmax + c, b.lo + c, b.hi + c);
    V::store_f(b.inv + c, p.inv);
    V::store_i(b.zero_point + c, p.zero_point);
    V::store_f(b.lo + c, p.scale);
  }
  if (!p_.is_static) publish(b.lo, b.zero_point, c0, count);
  for (int64_t c = count; c-- > 0;) {
    const float inv = b.inv[c], absmax = b.absmax[c];
    const int32_t zero_point = b.zero_point[c];
    for (int64_t i = (c + 1) * p_.inner; i-- > c * p_.inner;)
      b.inv[i] = inv, b.zero_point[i] = zero_point, b.absmax[i] = absmax;
  }
  return finite;
}

// `count` channels of short runs, side by side: count * inner <= kColumns columns.
template <class V, DType D>
inline void Quantize<V, D>::columns(int64_t c0, int64_t count) const {
  constexpr int kW = V::kLanes;
  const int64_t width = count * p_.inner, pitch = p_.channels * p_.inner, at = c0 * p_.inner;
  const bool range = !p_.symmetric && !p_.is_static;
  Block b;
  range ? see_columns<true>(b, at, width) : see_columns<false>(b, at, width);
  const bool clamps = !params_of_columns(b, c0, count, range) || p_.is_static;
  float *lo = b.lo, *hi = b.hi;
  for (int64_t j = 0; j < width; ++j) {
    // Both bounds zero give q = 0 even for NaN: min and max return their second operand when the first is NaN.
    const bool finite = b.absmax[j] < float_from_bits(kInfBits);
    lo[j] = finite ? static_cast<float>(levels_.lo - b.zero_point[j]) : 0.0f;
    hi[j] = finite ? static_cast<float>(levels_.hi - b.zero_point[j]) : 0.0f;
    b.zero_point[j] += levels_.offset;
  }
  const typename G::template Store<false> store(levels_);
  const auto scaled = [&](const void* x, int64_t j) { return V::mul(V::template load<D>(x, j), V::load_f(b.inv + j)); };
  const auto clamp = [&](auto v, int64_t j) {
    return V::add_i(V::round_i(V::min(V::max(v, V::load_f(lo + j)), V::load_f(hi + j))), V::load_i(b.zero_point + j));
  };
  // From the rows that were read last, a few at a time in the order of memory; what comes kAheadBytes later is asked
  // for.
  const int64_t ahead = kAheadBytes / kBytes, cut = width > ahead ? (width - ahead) / kAlign * kAlign : 0;
  const int64_t ahead_rows = width > ahead ? 1 : ceil_div(ahead, width), later = ahead_rows * pitch - cut;
  const bool pieces = width < pitch && width < kWholePiece / kBytes;
  for (int64_t turn = ceil_div(p_.outer, kRowsInOrder) * kRowsInOrder; turn > 0; turn -= kRowsInOrder)
    for (int64_t o = turn - kRowsInOrder; o < turn && o < p_.outer; ++o) {
      const char* x = static_cast<const char*>(x_at(o * pitch + at));
      uint8_t* q = q_at(o * pitch + at);
      int64_t j = 0;
      const auto whole_steps = [&](const auto& level, int32_t shift) QK_INLINE {
        const auto words = V::set_words(shift + store.shift);
        const auto until = [&](int64_t end, int64_t distance) QK_INLINE {
          for (; j + 4 * kW <= end; j += 4 * kW) {
            for (int line = 0; line < 4 * kW * kBytes; line += kAlign)
              __builtin_prefetch(x + (j + distance) * kBytes + line, 0, 2);
            if (pieces && j % kAlign == 0)
              __builtin_prefetch(q + j + (j + kLevelsAhead < width ? 0 : pitch - width) + kLevelsAhead, 1);
            store.template put<DType::kF32>(q + j, level(j), level(j + kW), level(j + 2 * kW), level(j + 3 * kW),
                                            words);
          }
        };
        until(cut, ahead);
        until(width, later);
      };
      if (clamps)
        whole_steps([&](int64_t i) QK_INLINE { return clamp(scaled(x, i), i); }, 0);
      else if (p_.symmetric)
        whole_steps([&](int64_t i) QK_INLINE { return V::round_i(scaled(x, i)); }, levels_.offset);
      else
        whole_steps(
            [&](int64_t i) QK_INLINE { return V::add_i(V::round_i(scaled(x, i)), V::load_i(b.zero_point + i)); }, 0);
      for (; j + kW <= width; j += kW) V::store_low8(q + j, clamp(scaled(x, j), j));
      if (j < width) {
        const int n = static_cast<int>(width - j);
        V::store_low8_part(q + j, clamp(V::mul(V::template load_part<D>(x, j, n), V::load_f(b.inv + j)), j), n);
      }
    }
}

}  // namespace
}  // namespace qk
