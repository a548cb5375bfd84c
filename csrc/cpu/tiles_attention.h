// Register kernels of attention (attention_impl.h), written once over the verbs of a tier.
//
// A tier's verbs V add to verbs_*.h:
//   fma(a, b, c)               a * b + c, rounded once
//   reduce_add(v)              sum of the lanes
//   broadcast(p)               one float in every lane
//   columns4(rows, step, out)  kLanes rows of four floats each, `step` apart, as four vectors
//   kTileVecs, tile_rows(n)    vectors of columns in the largest tile; rows of a tile of n vectors
#pragma once

#include <cstdint>

#include "unroll.h"

namespace qk {
namespace {

template <class V>
struct AttentionTiles {
  using F = typename V::F;

  // exp(x) for x <= 0; zero below -126.5 ln(2), so that no weight is a subnormal number, whose products are slow. With
  // n = round(x / ln(2)) in the low bits of x / ln(2) + 1.5 * 2^23, the rest is in [-1/2, 1/2], where a polynomial of
  // degree 5 has a relative error of 1.6e-7 with its roundings. The bits of 2^n for n = -127 are those of zero, which
  // is where -inf ends. NaN stays NaN: as the second operand of max, and as a factor, since adding n to the exponent's
  // bits could make a number of it.
  static F exp(F x) {
    constexpr float kPowers[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    constexpr float kShift = 0x1.8p23f + 127.0f;  // the exponent's bias comes with it
    const F per_ln2 = V::set(0x1.715476p0f), shift = V::set(kShift);
    x = V::max(V::set(-88.0f), x);
    const F shifted = V::fma(x, per_ln2, shift);
    const F rest = V::fma(x, per_ln2, V::sub(shift, shifted));
    F power = V::set(kPowers[0]);
    unroll<5>([&](auto i) QK_INLINE { power = V::fma(power, rest, V::set(kPowers[i.value + 1])); });
    return V::mul(power, V::as_f(V::exponent(V::as_i(shifted))));
  }

  // What the rows of a product begin with and what they are multiplied by at the end.
  struct Ends {
    const float* factor;  // of `sums`; nullptr: the product begins with zeros
    const float* sums;
    int64_t step;  // floats between rows of sums
    const float* scale;  // nullptr: 1

    Ends from(int64_t row) const {
      return {factor ? factor + row : nullptr, sums + row * step, step, scale ? scale + row : nullptr};
    }
  };

  // c [kRows, kVecs * kLanes] = scale[row] * (factor[row] * sums + a [kRows, depth] @ b [depth, kVecs * kLanes])
  template <int kVecs, int kRows>
  static void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, const Ends& ends, float* c,
                   int64_t ldc) {
    F sum[kRows][kVecs];
    unroll<kRows>([&](auto r) QK_INLINE {
      unroll<kVecs>([&](auto v) QK_INLINE {
        sum[r.value][v.value] = V::set(0.0f);
        if (ends.factor)
          sum[r.value][v.value] =
              V::mul(V::set(ends.factor[r.value]), V::load_f(ends.sums + r.value * ends.step + v.value * V::kLanes));
      });
    });
    // Three rows a pointer: with lda and 2 * lda in registers, that is what an address can reach.
    const float *a3 = a + 3 * lda, *a6 = a + 6 * lda, *a9 = a + 9 * lda;
    for (int64_t i = 0; i < depth; ++i, b += ldb) {
      F w[kVecs];
      unroll<kVecs>([&](auto v) QK_INLINE { w[v.value] = V::load_f(b + v.value * V::kLanes); });
      unroll<kRows>([&](auto r) QK_INLINE {
        constexpr int kRow = r.value;
        const float* row = kRow < 3 ? a : kRow < 6 ? a3 : kRow < 9 ? a6 : a9;
        const F x = V::broadcast(row + kRow % 3 * lda + i);
        unroll<kVecs>([&](auto v) QK_INLINE { sum[kRow][v.value] = V::fma(w[v.value], x, sum[kRow][v.value]); });
      });
    }
    unroll<kRows>([&](auto r) QK_INLINE {
      const F scale = V::set(ends.scale ? ends.scale[r.value] : 1.0f);
      unroll<kVecs>([&](auto v) QK_INLINE {
        V::store_f(c + r.value * ldc + v.value * V::kLanes, V::mul(sum[r.value][v.value], scale));
      });
    });
  }

  template <int kVecs, int kRows>
  static void tile_of(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                      const Ends& ends, float* c, int64_t ldc) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return tile_of<kVecs, kRows - 1>(rows, a, lda, b, ldb, depth, ends, c, ldc);
    }
    tile<kVecs, kRows>(a, lda, b, ldb, depth, ends, c, ldc);
  }

  // The same of `rows` rows and `vecs` vectors, at most kTileVecs: tiles of rows that differ by one at most.
  template <int kVecs = V::kTileVecs>
  static void product(int64_t rows, int64_t vecs, const float* a, int64_t lda, const float* b, int64_t ldb,
                      int64_t depth, const Ends& ends, float* c, int64_t ldc) {
    if constexpr (kVecs > 1) {
      if (vecs < kVecs) return product<kVecs - 1>(rows, vecs, a, lda, b, ldb, depth, ends, c, ldc);
    }
    constexpr int kRows = V::tile_rows(kVecs);
    const int tiles = static_cast<int>(ceil_div(rows, kRows));
    for (int t = 0; t < tiles; ++t) {
      const Range r = share(rows, t, tiles);
      tile_of<kVecs, kRows>(static_cast<int>(r.size()), a + r.begin * lda, lda, b, ldb, depth, ends.from(r.begin),
                            c + r.begin * ldc, ldc);
    }
  }
};

}  // namespace
}  // namespace qk
