// Layer norm and RMS norm of rows, written once over the verbs of a tier. With the mean 0 for the latter,
//
//   y = ((x - mean) * rstd) * weight + bias,   rstd = 1 / sqrt(sum((x - mean)^2) / k + eps)
//
// each step rounded once. Sums are those of kSumLanes lanes, element i in lane i mod kSumLanes, which are added by
// halves: in this order on every tier, so that all of them give the same bits. A row whose sum, or sum of squares,
// leaves float32 is one of NaN.
#pragma once

#include <limits>

#include "../args.h"
#include "team.h"
#include "unroll.h"

namespace qk {
namespace {

template <class V, DType D, bool kLayer>
class NormRows {
 public:
  static void run(const NormArgs& p, Range rows) {
    int64_t r = rows.begin;
    if (p.k <= kMostTogether)
      for (; r + kTogether <= rows.end; r += kTogether) block<kTogether>(p, r);
    for (; r < rows.end; ++r) block<1>(p, r);
  }

 private:
  using F = typename V::F;
  static constexpr int64_t kSumLanes = 64, kW = V::kLanes;
  static constexpr int kVectors = kSumLanes / kW;
  static constexpr int64_t kMostTerms = 64;  // in one lane: so many roundings at most are between it and the sum
  // Rows that use a weight and a bias together, where all of them fit into L1.
  static constexpr int kTogether = 4;
  static constexpr int64_t kMostTogether = 1024;

  // By value: stores to y could change what a reference refers to, as far as a compiler knows.
  template <int kRows>
  QK_NOINLINE static void block(const NormArgs p, int64_t first) {
    const int64_t from = first * p.x_stride;
    const float count = static_cast<float>(p.k);
    float means[kRows], rstds[kRows];
    for (int r = 0; r < kRows; ++r)
      means[r] = kLayer ? sum(p, from + r * p.x_stride, [](F x) QK_INLINE { return x; }) / count : 0.0f;
    for (int r = 0; r < kRows; ++r) {
      const float squares = sum(p, from + r * p.x_stride, [mean = V::set(means[r])](F x) QK_INLINE {
        const F c = centred(x, mean);
        return V::mul(c, c);
      });
      const bool finite = squares <= std::numeric_limits<float>::max();
      const float deviation = __builtin_sqrtf(squares / count + p.eps);
      rstds[r] = finite ? 1.0f / deviation : std::numeric_limits<float>::quiet_NaN();
    }
    F mean[kRows], rstd[kRows];
    unroll<kRows>([&](auto r) QK_INLINE {
      mean[r.value] = V::set(means[r.value]);
      rstd[r.value] = V::set(rstds[r.value]);
    });
    // Whatever is NaN here has it from a half or from the line above, with no bits that rounding to halves could carry
    // over: so they are numbers enough for store_numbers.
    const int64_t pairs = p.k / (2 * kW) * 2 * kW;
    for (int64_t i = 0; i < pairs; i += 2 * kW) {
      const Factors low(p, i), high(p, i + kW);
      unroll<kRows>([&](auto r) QK_INLINE {
        const int64_t at = from + r.value * p.x_stride + i;
        const F a = centred(V::template load<D>(p.x, at), mean[r.value]),
                b = centred(V::template load<D>(p.x, at + kW), mean[r.value]);
        V::template store_numbers<D>(p.y, (first + r.value) * p.k + i, low.times(V::mul(a, rstd[r.value])),
                                     high.times(V::mul(b, rstd[r.value])));
      });
    }
    for (int64_t i = pairs; i < p.k; i += kW) {
      const int n = static_cast<int>(p.k - i < kW ? p.k - i : kW);
      const Factors some(p, i, n);
      unroll<kRows>([&](auto r) QK_INLINE {
        const F c = centred(V::template load_part<D>(p.x, from + r.value * p.x_stride + i, n), mean[r.value]);
        V::template store_part<D>(p.y, (first + r.value) * p.k + i, some.times(V::mul(c, rstd[r.value])), n);
      });
    }
  }

  // A vector of the weight and of the bias, or what leaves numbers as they are.
  struct Factors {
    F weight, bias;
    QK_INLINE Factors(const NormArgs& p, int64_t i)
        : weight(p.weight ? V::template load<D>(p.weight, i) : V::set(1.0f)),
          bias(p.bias ? V::template load<D>(p.bias, i) : V::set(-0.0f)) {}
    QK_INLINE Factors(const NormArgs& p, int64_t i, int n)
        : weight(p.weight ? V::template load_part<D>(p.weight, i, n) : V::set(1.0f)),
          bias(p.bias ? V::template load_part<D>(p.bias, i, n) : V::set(-0.0f)) {}
    QK_INLINE F times(F v) const { return V::add(V::mul(v, weight), bias); }
  };

  static F centred(F x, F mean) { return kLayer ? V::sub(x, mean) : x; }

  // The sum of term(x) over the row that begins at element `at`.
  template <class Term>
  static float sum(const NormArgs& p, int64_t at, const Term& term) {
    float total = 0.0f;
    for (const int64_t end = at + p.k; at < end;) {
      const int64_t stop = end - at < kMostTerms * kSumLanes ? end : at + kMostTerms * kSumLanes;
      F sums[kVectors];
      unroll<kVectors>([&](auto v) QK_INLINE { sums[v.value] = V::set(0.0f); });
      for (; at + kSumLanes <= stop; at += kSumLanes)
        unroll<kVectors>([&](auto v) QK_INLINE {
          sums[v.value] = V::add(sums[v.value], term(V::template load<D>(p.x, at + v.value * kW)));
        });
      if (at < stop) {
        unroll<kVectors>([&](auto v) QK_INLINE {
          const int64_t i = at + v.value * kW, left = stop - i;
          if (left <= 0) return;
          const int n = static_cast<int>(left < kW ? left : kW);
          sums[v.value] = V::add(sums[v.value], V::first(term(V::template load_part<D>(p.x, i, n)), n));
        });
        at = stop;
      }
      total += V::reduce_add(halved<kVectors>(sums));
    }
    return total;
  }

  template <int kCount>
  static F halved(F (&sums)[kVectors]) {
    if constexpr (kCount > 1) {
      unroll<kCount / 2>([&](auto v) QK_INLINE { sums[v.value] = V::add(sums[v.value], sums[v.value + kCount / 2]); });
      return halved<kCount / 2>(sums);
    }
    return sums[0];
  }
};

template <class V, DType D>
void norm_of(const NormArgs& p) {
  parallel_pieces(threads_for(p.m * p.k, p.threads), conversion(p.m, p.k), [&](Range rows) {
    if (p.layer)
      NormRows<V, D, true>::run(p, rows);
    else
      NormRows<V, D, false>::run(p, rows);
  });
}

template <class V>
void norm(const NormArgs& p) {
  switch (p.dtype) {
    case DType::kF32:
      return norm_of<V, DType::kF32>(p);
    case DType::kBF16:
      return norm_of<V, DType::kBF16>(p);
    default:
      return norm_of<V, DType::kF16>(p);
  }
}

}  // namespace
}  // namespace qk
