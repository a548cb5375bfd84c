// W8A8 without a dot-product instruction, where few pairs of weights are too large for sums in 16 bits: what the few
// have too much is multiplied by itself. They are found while the weights are copied, 16 columns of a slice of K at a
// time, into a panel that stays in L1 for all row tiles of a block.
//
// Activations are unsigned, and lie as tiles take them, [rows / 6][K / 4][6 rows][4 k], each tile's largest of every k
// behind it.
//
// Beside what linear_w8a8_impl.h asks for, a tier provides
//   kPairRows            from how many rows on this is faster
//   kBlockRows           rows of a block at most
//   count_excesses(...)  of a part of the packed weights, to see whether they are few
//   store_row(...)       a row of activations to its place in a tile
//   keep_largest(...)    of each k, of several rows
//   copy_columns(...)    kTileN columns of a slice of weights to a panel, less their excesses
//   add_excesses(...)    their products in a tile or two
//   pairs_tile(...)      a tile's products
#pragma once

#include "linear_w8a8_impl.h"

namespace qk {
namespace {

template <class V>
class LinearW8A8Pairs : LinearW8A8<V> {
 public:
  using Base = LinearW8A8<V>;
  LinearW8A8Pairs(const LinearW8A8Args* members, int count) : Base(members, count, stride(members->k)) {}

  static bool serves(int64_t m, int64_t k) { return k > 0 && m >= V::kPairRows; }
  // Whether excesses are few, by a sample.
  static bool suits(const LinearW8A8Args* members, int count) {
    int64_t found = 0, seen = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t lines = packed_w8_bytes(members[i].n, members[i].k) / 32, some = lines < kSample ? lines : kSample;
      if (some == 0) continue;
      // An odd stride in lines, so that both halves of superblocks have their turn.
      const int64_t stride = (lines / some - 1) | 1;
      found += V::count_excesses(members[i].packed, some, 32 * stride);
      seen += 8 * some;
    }
    return found * kFew < seen;
  }

  static int64_t scratch_bytes(int64_t m, int64_t k, int threads) {
    return row_chunks_bytes<V>(m, k, plan(k), threads);
  }

  void run() const {
    for_row_chunks<V>(
        p_.m, this->superblocks_ * kBlockN, p_.k, this->streams_, plan(p_.k), p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) {
          alignas(kAlign) uint8_t codes[kMaxK + kRowPad];
          for (int64_t r = range.begin; r < range.end; ++r) {
            scales[r] = this->quantize_one(row + r, codes);
            const int64_t place = r % V::kTileM;
            uint8_t* tile = q + (r - place) * stride_;
            V::store_row(codes, padded_k(p_.k), place == 0, tile + place * kPackK, tile + V::kTileM * padded_k(p_.k));
          }
        },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          this->share_out(rows, ceil_div(rows, V::kTileM), V::kBlockBytes / (V::kTileM * stride_),
                          V::kBlockRows / V::kTileM, kPanelRows, team,
                          [&](const LinearW8A8Args& w, int64_t nb, Range range, bool more) {
                            superblock(w, nb, row, rows, range, more, q, scales);
                          });
        });
  }

 private:
  using Base::p_;
  using Base::stride_;
  using typename Base::ColumnCopies;
  using typename Base::Columns;

  static constexpr int64_t kSample = 128;  // lines of 32 weights
  static constexpr int64_t kFew = 12;  // less than one in so many fours of k; measured on Zen 3

  static int64_t stride(int64_t k) { return row_bytes(k) + round_up(ceil_div(padded_k(k), V::kTileM), kAlign); }
  static RowPlan plan(int64_t k) { return {stride(k), V::kTileM, V::kBlockRows}; }

  void superblock(const LinearW8A8Args& w, int64_t nb, int64_t row, int64_t rows, Range range, bool more,
                  const uint8_t* q, const RowScale* scales) const {
    constexpr int64_t kTileSums = V::kTileM * V::kTileN;
    ColumnCopies copies;
    const Columns columns = this->columns_of(w, nb, rows, copies);
    const int64_t k = padded_k(p_.k), n0 = nb * kBlockN, depth = this->slice_depth(V::kSliceK);
    alignas(kAlign) int8_t panel[V::kSliceK * V::kTileN];
    alignas(kAlign) int32_t sums[V::kBlockRows * kBlockN];
    alignas(kAlign) uint8_t largest[V::kSliceK];
    typename V::Excesses excesses;
    for (int64_t k0 = 0; k0 < k; k0 += depth) {
      const int64_t size = k - k0 < depth ? k - k0 : depth, steps = size / kPackK;
      const int8_t* slice = w.packed + n0 * k + k0 * kBlockN;
      const bool last = k0 + size == k;
      const LookAhead ahead(slice + size * kBlockN, size * kBlockN, kBlockN / V::kTileN * range.size(),
                            kBlockN * kPackK);
      for (int64_t t = range.begin; t < range.end; ++t)
        V::keep_largest(q + t * V::kTileM * stride_ + V::kTileM * k + k0, size, t == range.begin, largest);
      int64_t nth = 0;
      int32_t* c = sums;
      for (int j = 0; j < columns.count; j += V::kTileN) {
        const int64_t count = V::copy_columns(slice + j * kPackK, steps, largest, panel, excesses);
        for (int64_t t = range.begin; t < range.end; ++t, c += kTileSums) {
          const int64_t first = t * V::kTileM;
          const Range tile_rows{first, rows - first < V::kTileM ? rows : first + V::kTileM};
          const int size_m = static_cast<int>(tile_rows.size());
          const uint8_t* a = q + first * stride_ + V::kTileM * k0;
          if (last) this->prefetch(row, tile_rows, *columns.member, n0 + j, V::kTileN);
          if (count > 0 && (t - range.begin) % 2 == 0) {
            const int64_t end = t + 1 < range.end ? first + 2 * V::kTileM : first + V::kTileM;
            V::add_excesses((rows < end ? rows : end) - first, a, V::kTileM * stride_, excesses, count, c, k0 > 0);
          }
          V::pairs_tile(size_m, a, panel, steps, c, k0 > 0 || count > 0,
                        more || !last ? ahead.of(0, nth++, steps) : Ahead{});
          if (last) this->template epilogue<V::kTileN>(row, tile_rows, scales, c, columns, n0, j);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qk
