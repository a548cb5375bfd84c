// AVX2's products of unsigned by signed bytes where few pairs saturate (linear_w8a8_pairs.h).
//
// vpmaddubsw, vpmaddwd and vpaddd make 32 products, one instruction less than a product that cannot saturate takes
// (kernels_avx2.cpp, tile_wide_avx2.h). vpmaddubsw adds two products in 16 bits: with activations of up to 255 it
// saturates only where two weights of one sign come to more than 128, which is one pair of a hundred where weights are
// normal and the largest of 4096 has the code 127; and for most of those, only where activations are larger than they
// are. Elsewhere the first weight leaves to an excess what is too much, and the products of the excess are added by
// themselves.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// For each mask of 8 bits, the numbers of those that are set, in their order.
struct BitNumbers {
  uint8_t of[256][8] = {};
  constexpr BitNumbers() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if (mask >> bit & 1) of[mask][count++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
constexpr BitNumbers kBitNumbers;

struct PairsAvx2 : YmmVerbs {
  static constexpr const char* kIsa = "avx2";
  static constexpr int kTileM = 6, kTileN = 16, kOffset = 128, kSliceK = 1024;
  static constexpr int64_t kOwnRows = 96, kBlockBytes = 768 << 10, kBlockRows = 192;
  static constexpr int64_t kPairRows = 9;  // measured on Zen 3: fewer do not earn back the panel
  static constexpr int64_t kLine = kTileN * kPackK;  // bytes of a panel for four k
  struct Session {
    Session() {}
  };
  // What is too much in a panel, for each column and four k that have some: of k0 and k2, as the words of a dword; and
  // where it is, in the low 16 bits the offset in bytes of the four's activations in a tile, in the high ones that of
  // the column in sums of columns. They are stored by eights, of which the next overwrite what does not count.
  static constexpr int64_t kMostExcesses = kSliceK / kPackK * kTileN;
  struct Excesses {
    int32_t words[kMostExcesses + 8];
    uint32_t places[kMostExcesses + 8];
  };
  static constexpr int kColumnShift = 16, kNumberShift = kColumnShift + 5;  // of a column's offset, and of its number
  static_assert(sizeof(__m256i) == 1 << (kNumberShift - kColumnShift), "columns of sums are registers in a row");

  // Of 32 weights, pairs that may saturate: words of ones, else zero.
  static __m256i may_saturate(__m256i weights) {
    const __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), weights);
    return _mm256_cmpgt_epi16(_mm256_abs_epi16(sum), _mm256_set1_epi16(128));
  }
  // In how many places `lines` lines of 8 columns of four k, stride bytes apart, hold such a pair.
  static int64_t count_excesses(const int8_t* packed, int64_t lines, int64_t stride) {
    int64_t count = 0;
    for (int64_t i = 0; i < lines; ++i) {
      const __m256i pairs = may_saturate(_mm256_load_si256(reinterpret_cast<const __m256i*>(packed + i * stride)));
      const __m256i fours = _mm256_cmpeq_epi32(pairs, _mm256_setzero_si256());
      count += 8 - __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(fours))));
    }
    return count;
  }

  // A row of unsigned codes in [k] to out [k / 4][6 rows][4], whose first row's place is given; and keep_largest.
  static void store_row(const uint8_t* in, int64_t k, bool first, uint8_t* out, uint8_t* largest) {
    for (int64_t i = 0; i < k; i += kPackK) __builtin_memcpy(out + i * kTileM, in + i, kPackK);
    keep_largest(in, k, first, largest);
  }
  // largest [k]: of the rows so far, unless this is the first.
  static void keep_largest(const uint8_t* in, int64_t k, bool first, uint8_t* largest) {
    if (first) {
      __builtin_memcpy(largest, in, static_cast<size_t>(k));
      return;
    }
    for (int64_t i = 0; i < k; i += 32) {
      __m256i* to = reinterpret_cast<__m256i*>(largest + i);
      _mm256_storeu_si256(
          to, _mm256_max_epu8(_mm256_loadu_si256(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
    }
  }

  // Pairs whose products with the largest activations reach the end of 16 bits: words whose sign is set.
  static __m256i saturated(__m256i most, __m256i weights) {
    return _mm256_add_epi16(_mm256_abs_epi16(_mm256_maddubs_epi16(most, weights)), _mm256_set1_epi16(1));
  }
  static __m256i most_of(const uint8_t* largest) {
    int32_t most;
    __builtin_memcpy(&most, largest, sizeof most);
    return _mm256_set1_epi32(most);
  }

  // 16 columns of a slice of weights to panel [steps][16 columns][4 k], less what goes to `excesses`; largest: of the
  // activations that will meet them, for each k. Returns how many excesses there are.
  QK_NOINLINE static int64_t copy_columns(const int8_t* packed, int64_t steps, const uint8_t* largest, int8_t* panel,
                                          Excesses& excesses) {
    // Without branches: they would be mispredicted wherever there is something.
    uint16_t lines[kSliceK / kPackK];
    int64_t found = 0;
    for (int64_t k = 0; k < steps; ++k) {
      const __m256i* line = reinterpret_cast<const __m256i*>(packed + k * kBlockN * kPackK);
      __m256i* out = reinterpret_cast<__m256i*>(panel + k * kLine);
      const __m256i w0 = _mm256_load_si256(line), w1 = _mm256_load_si256(line + 1);
      _mm256_store_si256(out, w0);
      _mm256_store_si256(out + 1, w1);
      const __m256i most = most_of(largest + k * kPackK);
      const __m256i signs = _mm256_or_si256(saturated(most, w0), saturated(most, w1));
      lines[found] = static_cast<uint16_t>(k);
      found += _mm256_movemask_epi8(_mm256_srai_epi16(signs, 15)) != 0;
    }
    int64_t count = 0;
    for (int64_t l = 0; l < found; ++l) {
      const __m256i most = most_of(largest + lines[l] * kPackK);
      for (int half = 0; half < 2; ++half) {
        __m256i* const place = reinterpret_cast<__m256i*>(panel + lines[l] * kLine) + half;
        const __m256i weights = _mm256_load_si256(place);
        const __m256i words = excess(weights, saturated(most, weights));
        // The first weight of a pair has it, and is never less.
        _mm256_store_si256(place, _mm256_sub_epi8(weights, _mm256_and_si256(words, _mm256_set1_epi16(255))));
        const __m256i none = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
        const int columns = ~_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 255;
        const __m256i order =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitNumbers.of[columns])));
        const int32_t line = static_cast<int32_t>(lines[l] * kTileM * kPackK | half * 8 << kNumberShift);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(excesses.words + count),
                            _mm256_permutevar8x32_epi32(words, order));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(excesses.places + count),
                            _mm256_or_si256(_mm256_slli_epi32(order, kNumberShift), _mm256_set1_epi32(line)));
        count += __builtin_popcount(static_cast<unsigned>(columns));
      }
    }
    return count;
  }
  // What pairs have beyond +-128 where the sign is set, else 0.
  static __m256i excess(__m256i weights, __m256i sign) {
    const __m256i most = _mm256_set1_epi16(128), least = _mm256_set1_epi16(-128);
    const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), weights);
    const __m256i rest = _mm256_sub_epi16(sums, _mm256_max_epi16(_mm256_min_epi16(sums, most), least));
    return _mm256_and_si256(rest, _mm256_srai_epi16(sign, 15));
  }

  // Columns of sums of 8 rows to rows.
  static void transpose(const __m256i* columns, __m256i* rows) {
    __m256i pair[8], four[8];
    for (int i = 0; i < 4; ++i) {
      pair[2 * i] = _mm256_unpacklo_epi32(columns[2 * i], columns[2 * i + 1]);
      pair[2 * i + 1] = _mm256_unpackhi_epi32(columns[2 * i], columns[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int high = 0; high < 2; ++high) {
        four[4 * i + 2 * high] = _mm256_unpacklo_epi64(pair[4 * i + high], pair[4 * i + 2 + high]);
        four[4 * i + 2 * high + 1] = _mm256_unpackhi_epi64(pair[4 * i + high], pair[4 * i + 2 + high]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2x128_si256(four[i], four[4 + i], 0x20);
      rows[4 + i] = _mm256_permute2x128_si256(four[i], four[4 + i], 0x31);
    }
  }

  // c [rows, 16] (+)= the products of the excesses, for one tile of rows or two, the second `apart` bytes behind the
  // first. Reads 8 bytes past a tile's last line.
  static void add_excesses(int64_t rows, const uint8_t* a, int64_t apart, const Excesses& excesses, int64_t count,
                           int32_t* c, bool accumulate) {
    if (rows > kTileM)
      add_excesses_to<2>(rows, a, apart, excesses, count, c, accumulate);
    else
      add_excesses_to<1>(rows, a, apart, excesses, count, c, accumulate);
  }
  template <int kTiles>
  QK_NOINLINE static void add_excesses_to(int64_t rows, const uint8_t* a, int64_t apart, const Excesses& excesses,
                                          int64_t count, int32_t* c, bool accumulate) {
    const __m256i low = _mm256_set1_epi16(255);
    alignas(32) __m256i columns[kTiles * kTileN];
    for (int j = 0; j < kTiles * kTileN; ++j) columns[j] = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; ++i) {
      const __m256i words = _mm256_set1_epi32(excesses.words[i]);
      const uint32_t place = excesses.places[i];
      const uint8_t* line = a + (place & 0xFFFF);
      for (int t = 0; t < kTiles; ++t) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + t * apart));
        char* const sum = reinterpret_cast<char*>(columns + t * kTileN) + (place >> kColumnShift);
        __m256i& sums = *reinterpret_cast<__m256i*>(sum);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_and_si256(x, low), words));
      }
    }
    for (int i = 0; i < 2 * kTiles; ++i) {
      __m256i sums[8];
      transpose(columns + 8 * i, sums);
      const int64_t first = i / 2 * kTileM;
      for (int64_t r = first; r < rows && r < first + kTileM; ++r) {
        int32_t* to = c + r * kTileN + i % 2 * 8;
        store_i(to, accumulate ? add_i(load_i(to), sums[r - first]) : sums[r - first]);
      }
    }
  }

  // 6 x 16 tile: 12 accumulators, ones, 8 columns of weights, and two for products, of 16. The other columns' weights
  // are read for each row: two such loads in a cycle are all there are, and it takes one and a half.
  template <int kRows, int kLines>
  QK_NOINLINE static void tile_rows(const uint8_t* a, const int8_t* panel, int64_t steps, int32_t* c, bool accumulate,
                                    const Ahead& ahead) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
    start_sums<kRows>(c, accumulate, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < steps; ++k, panel += kLine, a += kTileM * kPackK) {
      const __m256i* w = reinterpret_cast<const __m256i*>(panel);
      const __m256i w0 = _mm256_load_si256(w);
      // By hand: left to itself, g++ 12 keeps accumulators on the stack.
      const auto row = [&](int r, __m256i& x0, __m256i& x1) QK_INLINE {
        __m256i v, t;
        __asm__(
            "vpbroadcastd %4, %2\n\t"
            "vpmaddubsw %5, %2, %3\n\t"
            "vpmaddubsw %6, %2, %2\n\t"
            "vpmaddwd %7, %3, %3\n\t"
            "vpmaddwd %7, %2, %2\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(x0), "+x"(x1), "=&x"(v), "=&x"(t)
            : "m"(*reinterpret_cast<const int32_t*>(a + r * kPackK)), "x"(w0), "m"(w[1]), "x"(ones));
      };
      each_row<kRows>(row, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
      ask<kLines>(ahead, k);
    }
    store_sums<kRows>(c, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
  }
  static void pairs_tile(int rows, const uint8_t* a, const int8_t* panel, int64_t steps, int32_t* c, bool accumulate,
                         const Ahead& ahead) {
    with_constants<kTileM>(rows, ahead,
                           [&](auto r, auto lines) { tile_rows<r(), lines()>(a, panel, steps, c, accumulate, ahead); });
  }
};

}  // namespace
}  // namespace qk
