// W8A8 without a dot-product instruction: from a few rows on, over operands that are widened to 16 bits first; from
// more rows on, by Strassen's seven products of halves instead of eight (1969).
//
// Beside what linear_w8a8_impl.h asks for, a tier provides
//   kWideTileM, kWideSliceK    rows of a tile, and depth of its products: kTileN columns of it stay in L1
//   kWideBlockBytes, kWideBlockRows   activations of a block of rows at most
//   wide_rows(k)        from how many rows on operands are widened
//   kStrassenRows, kStrassenBlocks    from how many rows and superblocks on there are seven products,
//   kStrassenK, kStrassenMostK        and from and up to which K
//   widen_row(...)      a row of activations: bytes to words, the rows of a tile side by side; returns what its sums
//                       have too much, negated
//   widen_couple(...)   two rows, the upper and the lower, to what the seven products take of them
//   widen_columns(...)  kTileN columns of a slice of weights, or sums or differences of two such, once for all row
//                       tiles of a block; and what the columns' sums have too much, negated
//   wide_tile(...)      a tile's products over those, into one or two sums
//
// Strassen: rows, columns and K are halved, the upper four and the lower four of eight rows, the left and the right 32
// columns of a superblock, and the two halves of a slice of K. With A and B so quartered, and C in quarters,
//
//     product        activations     weights       adds to
//        0           A11 + A22      B11 + B22      C11, C22
//        1           A21 + A22      B11            C21, -C22
//        2           A11            B12 - B22      C12, C22
//        3           A22            B21 - B11      C11, C21
//        4           A11 + A12      B22            -C11, C12
//        5           A21 - A11      B11 + B12      C22
//        6           A12 - A22      B21 + B22      C11
//
// Sums of two bytes fit in words, and so do sums of such two, which the tile's own products are made of (see its
// verbs). int32 sums may wrap on the way: what they come to fits.
#pragma once

#include "linear_w8a8_impl.h"

namespace qk {
namespace {

// Where a tile's products go: c [kWideTileM, kTileN], which they replace, or are added to or subtracted from.
struct Sink {
  int32_t* c = nullptr;
  int sign = 0;
};

// How a product's weights are made of two quarters, 0 to 3 for 11, 12, 21 and 22: the first one, plus `sign` times the
// second. (For activations, widen_couple.)
struct Combination {
  int first, second, sign;
};

constexpr int kProducts = 7;
constexpr Combination kOfColumns[kProducts] = {{0, 3, 1}, {0, 0, 0}, {1, 3, -1}, {2, 0, -1},
                                               {3, 0, 0}, {0, 1, 1}, {2, 3, 1}};

// One of the two quarters that a product adds to; the first product of a quarter's has nothing to add to.
struct Share {
  int quarter, sign;
  bool first;
};
constexpr Share kShares[kProducts][2] = {{{0, 1, true}, {3, 1, true}},    {{2, 1, true}, {3, -1, false}},
                                         {{1, 1, true}, {3, 1, false}},   {{0, 1, false}, {2, 1, false}},
                                         {{0, -1, false}, {1, 1, false}}, {{3, 1, false}, {-1, 0, false}},
                                         {{0, 1, false}, {-1, 0, false}}};

template <class V>
class LinearW8A8Wide : LinearW8A8<V> {
 public:
  using Base = LinearW8A8<V>;

  LinearW8A8Wide(const LinearW8A8Args* members, int count)
      : LinearW8A8Wide(members, count,
                       may_halve(members->m, members->k) && Base::superblocks(members, count) >= V::kStrassenBlocks) {}

  static bool serves(int64_t m, int64_t k) { return k > 0 && m >= V::wide_rows(k); }

  static int64_t scratch_bytes(int64_t m, int64_t k, int threads) {
    return row_chunks_bytes<V>(m, k, plan(k, may_halve(m, k)), threads);  // the larger one, for any number of columns
  }

  void run() const {
    const RowPlan rows_held = plan(p_.k, strassen_);
    for_row_chunks<V>(
        p_.m, this->superblocks_ * kBlockN, p_.k, this->streams_, rows_held, p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) {
          strassen_ ? widen_couples(row, range, q, scales) : widen_rows(row, range, q, scales);
        },
        [&, this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          const int64_t unit = rows_held.unit, most = V::kWideBlockRows / unit;
          this->share_out(rows, ceil_div(rows, unit), V::kWideBlockBytes / (unit * stride_), most, kPanelRows, team,
                          [&](const LinearW8A8Args& w, int64_t nb, Range range, bool more) {
                            ColumnCopies copies;
                            const Columns columns = this->columns_of(w, nb, rows, copies);
                            const int8_t* weights = w.packed + nb * kBlockN * padded_k(p_.k);
                            strassen_ ? strassen(row, rows, range, more, q, scales, columns, weights, nb * kBlockN)
                                      : slices(row, rows, range, more, q, scales, columns, weights, nb * kBlockN);
                          });
        });
  }

 private:
  using Base::p_;
  using Base::slice_depth;
  using Base::stride_;
  using typename Base::ColumnCopies;
  using typename Base::Columns;

  static constexpr int64_t kTileM = V::kWideTileM, kPairRows = 2 * kTileM;
  static constexpr int64_t kTileSums = kTileM * V::kTileN;
  static constexpr int64_t kHalfN = kBlockN / 2;
  static_assert(V::kWideTileN == V::kTileN, "the epilogue takes tiles of one width");

  LinearW8A8Wide(const LinearW8A8Args* members, int count, bool strassen)
      : Base(members, count, plan(members->k, strassen).stride), strassen_(strassen) {}

  static bool may_halve(int64_t m, int64_t k) {
    return m >= V::kStrassenRows && k >= V::kStrassenK && k <= V::kStrassenMostK;
  }
  // A row's words, of a pair of tiles seven halves, and what the sums of their products have too much behind them.
  static RowPlan plan(int64_t k, bool strassen) {
    const int64_t words = 2 * padded_k(k), behind = 2 * kRowPad;
    if (strassen) return {words / 4 * kProducts + behind, kPairRows, V::kWideBlockRows};
    return {words + behind, kTileM};
  }

  // ---- plain -------------------------------------------------------------------------------------------------

  void widen_rows(int64_t row, Range range, uint8_t* q, RowScale* scales) const {
    alignas(kAlign) uint8_t bytes[kMaxK + kRowPad];
    for (int64_t r = range.begin; r < range.end; ++r) {
      const int64_t place = r % kTileM;
      uint8_t* tile = q + (r - place) * stride_;
      scales[r] = this->quantize_one(row + r, bytes);
      less_of_tile(tile)[place] = V::widen_row(bytes, padded_k(p_.k), tile + place * 2 * kPackK);
    }
  }
  int32_t* less_of_tile(uint8_t* tile) const { return reinterpret_cast<int32_t*>(tile + kTileM * 2 * padded_k(p_.k)); }
  const int32_t* less_of_tile(const uint8_t* tile) const {
    return reinterpret_cast<const int32_t*>(tile + kTileM * 2 * padded_k(p_.k));
  }

  void slices(int64_t row, int64_t rows, Range range, bool more, const uint8_t* q, const RowScale* scales,
              const Columns& columns, const int8_t* weights, int64_t n0) const {
    alignas(kAlign) int16_t panel[V::kWideSliceK * V::kTileN];
    alignas(kAlign) int32_t less[V::kTileN], sums[V::kWideBlockRows * kBlockN];
    const int64_t k = padded_k(p_.k), depth = slice_depth(V::kWideSliceK);
    for (int64_t k0 = 0; k0 < k; k0 += depth) {
      const int64_t size = k - k0 < depth ? k - k0 : depth, steps = size / kPackK;
      const int8_t* slice = weights + k0 * kBlockN;
      const bool last = k0 + size == k;
      const LookAhead ahead(slice + size * kBlockN, size * kBlockN, kBlockN / V::kTileN * range.size(),
                            kBlockN * kPackK);
      int64_t nth = 0;
      int32_t* c = sums;
      for (int j = 0; j < columns.count; j += V::kTileN) {
        V::widen_columns(slice + j * kPackK, nullptr, 0, steps, panel, less);
        for (int64_t t = range.begin; t < range.end; ++t, c += kTileSums) {
          const int64_t first = t * kTileM;
          const Range tile_rows{first, rows - first < kTileM ? rows : first + kTileM};
          const uint8_t* tile = q + first * stride_;
          if (last) this->prefetch(row, tile_rows, *columns.member, n0 + j, V::kTileN);
          V::wide_tile(static_cast<int>(tile_rows.size()), tile + kTileM * 2 * k0, panel, steps, less,
                       k0 > 0 ? nullptr : less_of_tile(tile), {c, k0 > 0}, {},
                       more || !last ? ahead.of(0, nth++, steps) : Ahead{});
          if (last) this->template epilogue<V::kTileN>(row, tile_rows, scales, c, columns, n0, j);
        }
      }
    }
  }

  // ---- Strassen ----------------------------------------------------------------------------------------------

  // Of eight rows: [slice][product][k / 4][4 rows][4 words], then what the sums of each product have too much, negated,
  // [product][4 rows].
  int32_t* less_of_pair(uint8_t* pair) const {
    return reinterpret_cast<int32_t*>(pair + kProducts * kTileM * padded_k(p_.k));
  }
  const int32_t* less_of_pair(const uint8_t* pair) const {
    return reinterpret_cast<const int32_t*>(pair + kProducts * kTileM * padded_k(p_.k));
  }

  void widen_couples(int64_t row, Range range, uint8_t* q, RowScale* scales) const {
    constexpr int64_t kMost = V::kStrassenMostK + kBlockK + kRowPad;
    alignas(kAlign) uint8_t upper[kMost], lower[kMost];
    const int64_t k = padded_k(p_.k), depth = slice_depth(2 * V::kWideSliceK);
    for (int64_t pair = range.begin; pair < range.end; pair += kPairRows) {
      uint8_t* operands = q + pair * stride_;
      for (int64_t place = 0; place < kTileM && pair + place < range.end; ++place) {
        const int64_t above = pair + place, below = above + kTileM;
        scales[above] = this->quantize_one(row + above, upper);
        if (below < range.end)
          scales[below] = this->quantize_one(row + below, lower);
        else
          std::memset(lower, 0, static_cast<size_t>(k));
        int32_t less[kProducts] = {};
        for (int64_t k0 = 0; k0 < k; k0 += depth) {
          const int64_t half = (k - k0 < depth ? k - k0 : depth) / 2;
          V::widen_couple(upper + k0, lower + k0, half, operands + kProducts * kTileM * k0 + place * 2 * kPackK, less);
        }
        for (int i = 0; i < kProducts; ++i) less_of_pair(operands)[i * kTileM + place] = less[i];
      }
    }
  }

  void strassen(int64_t row, int64_t rows, Range range, bool more, const uint8_t* q, const RowScale* scales,
                const Columns& columns, const int8_t* weights, int64_t n0) const {
    alignas(kAlign) int16_t panel[V::kWideSliceK * V::kTileN];
    alignas(kAlign) int32_t less[V::kTileN], sums[V::kWideBlockRows * kBlockN];
    const int64_t k = padded_k(p_.k), depth = slice_depth(2 * V::kWideSliceK);
    const int halves = columns.count > kHalfN ? 2 : 1;
    const int64_t width = columns.count < kHalfN ? columns.count : kHalfN;
    // [pair of tiles][columns / 16][upper, lower][4 rows][16 columns]
    const auto sums_at = [&](int64_t t, int64_t j, int lower) {
      return sums + (((t - range.begin) * (kBlockN / V::kTileN) + j / V::kTileN) * 2 + lower) * kTileSums;
    };
    for (int64_t k0 = 0; k0 < k; k0 += depth) {
      const int64_t half = (k - k0 < depth ? k - k0 : depth) / 2, steps = half / kPackK;
      const int8_t* slice = weights + k0 * kBlockN;
      const bool last = k0 + depth >= k;
      const auto quarter = [&](int i) { return slice + i / 2 * half * kBlockN + i % 2 * kHalfN * kPackK; };
      const LookAhead ahead(slice + 2 * half * kBlockN, 2 * half * kBlockN,
                            kProducts * (kHalfN / V::kTileN) * range.size(), 2 * kBlockN * kPackK);
      int64_t nth = 0;
      for (int i = 0; i < kProducts; ++i) {
        const Share* shares = kShares[i];
        // Without right columns B12 and B22 are zero, and nobody asks for C12 and C22.
        if (halves == 1 && (i == 2 || i == 4 || i == 5)) continue;
        const Combination& of = kOfColumns[i];
        for (int64_t j = 0; j < width; j += V::kTileN) {
          V::widen_columns(quarter(of.first) + j * kPackK, quarter(of.second) + j * kPackK, of.sign, steps, panel,
                           less);
          for (int64_t t = range.begin; t < range.end; ++t) {
            const int64_t first = t * kPairRows, count = rows - first;
            if (last && i == kProducts - 1)
              this->prefetch(row, {first, first + (count < kPairRows ? count : kPairRows)}, *columns.member, n0 + 2 * j,
                             2 * V::kTileN);
            const uint8_t* pair = q + first * stride_;
            // Without lower rows A21 and A22 are zero, and nobody asks for C21 and C22.
            if (count <= kTileM && (i == 1 || i == 3 || i == 5)) continue;
            const auto sink = [&](const Share& s) {
              if (s.quarter < 0) return Sink{};
              return Sink{sums_at(t, j + s.quarter % 2 * kHalfN, s.quarter / 2), k0 == 0 && s.first ? 0 : s.sign};
            };
            V::wide_tile(static_cast<int>(count < kTileM ? count : kTileM),
                         pair + kProducts * kTileM * k0 + i * kTileM * 2 * half, panel, steps, less,
                         k0 > 0 ? nullptr : less_of_pair(pair) + i * kTileM, sink(shares[0]), sink(shares[1]),
                         more || !last ? ahead.of(0, nth++, steps) : Ahead{});
          }
        }
      }
    }
    for (int64_t t = range.begin; t < range.end; ++t) {
      for (int lower = 0; lower < 2; ++lower) {
        const int64_t first = t * kPairRows + lower * kTileM;
        if (first >= rows) break;
        const Range tile_rows{first, rows - first < kTileM ? rows : first + kTileM};
        for (int j = 0; j < columns.count; j += V::kTileN)
          this->template epilogue<V::kTileN>(row, tile_rows, scales, sums_at(t, j, lower), columns, n0, j);
      }
    }
  }

  const bool strassen_;
};

}  // namespace
}  // namespace qk
