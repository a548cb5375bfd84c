// W8A8 on AMX: quantization, sharing and epilogue of linear_w8a8_impl.h, with the tier's own loops between them.
//
// While the tiles multiply a block of 32 x 32, the vector units take the block before through its epilogue, two rows a
// step, and the next superblock's weights come to L2.
#pragma once

#include "linear_w8a8_impl.h"
#include "tiles_amx.h"

namespace qk {
namespace {

template <class V>
class LinearW8A8Amx : LinearW8A8<V> {
 public:
  using Base = LinearW8A8<V>;

  LinearW8A8Amx(const LinearW8A8Args* members, int count)
      : Base(members, count),
        padded_(padded_k(members->k)),
        streams_(is_streamed(p_.m, this->superblocks_ * kBlockN, p_.y_dtype, p_.threads)) {}

  static int64_t scratch_bytes(int64_t m, int64_t k, int threads) {
    return row_chunks_bytes<V>(m, k, {tile_stride(m, k, 0)}, threads);
  }

  void run() const {
    for_row_chunks<V>(
        p_.m, this->superblocks_ * kBlockN, p_.k, Base::streams_, {tile_stride(p_.m, p_.k, 0)}, p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) {
          alignas(kAlign) uint8_t buffer[kMaxK + kRowPad];
          for (int64_t r = range.begin; r < range.end; ++r) {
            this->quantize_rows(row + r, {0, 1}, buffer, scales + r);
            store_tile_row(buffer, p_.k, r, q);
          }
        },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          multiply(row, rows, q, scales, team);
        });
  }

 private:
  using Base::p_;
  using typename Base::ColumnCopies;
  using typename Base::Columns;

  static constexpr int64_t kSliceSteps = V::kSliceK / 64;
  static constexpr int kStreams = 4;  // see ahead.h
  // Of a team's block: few, so that rows have few readers (TilePairs), and fewer where weights are in a cache.
  static constexpr int64_t kTeamBlockTiles = 4, kCachedBlockTiles = 2;

  // A block whose sums wait for the epilogue: rows [next, end) of the chunk, the first of which is row `begin`.
  struct Pending {
    int64_t next = 0, end = 0, begin = 0;
    const int32_t* c = nullptr;
    Columns columns;
    int64_t n0 = 0;
    int j = 0;
    bool streams = false;
  };

  QK_NOINLINE void finish(Pending& pending, int64_t count, int64_t row, const RowScale* scales) const {
    const int64_t next = pending.next, end = next + count < pending.end ? next + count : pending.end;
    const int32_t* c = pending.c + (next - pending.begin) * kPairRows;
    if (pending.streams)
      this->template epilogue<kPairRows, true>(row, {next, end}, scales, c, pending.columns, pending.n0, pending.j);
    else
      this->template epilogue<kPairRows>(row, {next, end}, scales, c, pending.columns, pending.n0, pending.j);
    pending.next = end;
  }

  // What the vector units do meanwhile, and what is asked for.
  struct Meanwhile {
    Pending pending;
    const int8_t* ahead = nullptr;  // L2 prefetch: each step so many lines of each stream, apart bytes from one another
    int64_t lines = 0, apart = 0;
  };

  template <int kTiles>
  void block(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool accumulate, int64_t row,
             const RowScale* scales, Meanwhile& meanwhile) const {
    store_fence();
    if (accumulate)
      load_sums<kTiles>(c);
    else
      clear_sums<kTiles>();
    const int64_t count = steps < kPairRows / 2 ? ceil_div(kPairRows, steps > 0 ? steps : 1) : 2;
    add_products<PackedTiles, kTiles>(a, b, steps, [&](int i, const uint8_t* pa, const int8_t* pb) QK_INLINE {
      // The next step's lines, a few at a time: a tile waits less for L2 when they were asked for a step ago.
      if (i % 2 == 0) {
        for (int l = 8 * i; l < 8 * i + 16; ++l) __builtin_prefetch(pa + kPairBytes + l * 64);
      } else {
        for (int l = i / 2 * 8; l < (kTiles == 2 ? i / 2 * 8 + 8 : 16); ++l) {
          __builtin_prefetch(pb + PackedTiles::kStep + l * PackedTiles::kLine);
          __builtin_prefetch(pb + PackedTiles::kStep + l * PackedTiles::kLine + 64);
        }
      }
      for (int stream = i; stream < kStreams; stream += 2 * kTiles)
        for (int64_t l = 0; l < meanwhile.lines; ++l)
          __builtin_prefetch(meanwhile.ahead + stream * meanwhile.apart + l * 64, 0, 2);
      if (i == 1) {
        if (meanwhile.pending.next < meanwhile.pending.end) finish(meanwhile.pending, count, row, scales);
      }
      if (i == 2 * kTiles - 1) meanwhile.ahead += meanwhile.lines * 64;
    });
    if (meanwhile.pending.next < meanwhile.pending.end) finish(meanwhile.pending, kPairRows, row, scales);
    store_sums<kTiles>(c);
  }

  void multiply(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) const {
    alignas(kAlign) int32_t sums[V::kMaxBlockTiles * 2 * kPairSums];
    ColumnCopies copies[2];  // those of the block that waits, and the superblock's
    Meanwhile meanwhile;
    Pending& pending = meanwhile.pending;
    int64_t visits = 0;
    const int64_t steps = padded_ / 64;
    // A slice of the block's activations is in use at a time.
    const int64_t slice = steps < kSliceSteps ? steps : kSliceSteps;
    const int64_t most = team.size() == 1 ? V::kMaxBlockTiles : Base::streams_ ? kTeamBlockTiles : kCachedBlockTiles;
    this->share_out(rows, ceil_div(rows, kPairRows), V::kBlockBytes / (kPairBytes * (slice > 0 ? slice : 1)), most, 1,
                    team, [&](const LinearW8A8Args& w, int64_t nb, Range range, bool more) {
                      Columns columns = this->columns_of(w, nb, rows, copies[visits++ % 2]);
                      if (p_.act.symmetric) columns.shared = nullptr;  // all zero
                      const bool streams = streams_ && has_whole_lines(w.y, w.y_dtype, w.y_stride);
                      const int8_t* weights = w.packed + nb * kBlockN * padded_;
                      for (int64_t s0 = 0; s0 == 0 || s0 < steps; s0 += kSliceSteps) {
                        const int64_t depth = steps - s0 < kSliceSteps ? steps - s0 : kSliceSteps;
                        const bool last = s0 + depth == steps;
                        // The next slice, or the first one of the next superblock, shared among this one's steps.
                        meanwhile.ahead = weights + (s0 + depth) * PackedTiles::kStep;
                        meanwhile.apart = depth * PackedTiles::kStep / kStreams;
                        const int64_t pairs = kBlockN / kPairRows * range.size();
                        meanwhile.lines = more || !last ? ceil_div(PackedTiles::kStep / 64, kStreams * pairs) : 0;
                        int32_t* c = sums;
                        for (int j = 0; j < columns.count; j += kPairRows) {
                          const int8_t* b = weights + s0 * PackedTiles::kStep + j * kPackK;
                          for (int64_t t = range.begin; t < range.end; ++t) {
                            const int64_t first = t * kPairRows, count = rows_of_pair(rows, t);
                            const uint8_t* a = q + (t * steps + s0) * kPairBytes;
                            if (last) this->prefetch(row, {first, first + count}, w, nb * kBlockN + j, kPairRows);
                            if (count > kTileRows)
                              block<2>(a, b, depth, c, s0 > 0, row, scales, meanwhile);
                            else
                              block<1>(a, b, depth, c, s0 > 0, row, scales, meanwhile);
                            if (last) pending = {first, first + count, first, c, columns, nb * kBlockN, j, streams};
                            if (steps > kSliceSteps)
                              c += kPairSums;  // otherwise one block's worth of L1 serves them all
                          }
                        }
                      }
                    });
    if (pending.next < pending.end) finish(pending, kPairRows, row, scales);
    if (streams_) V::stream_fence();
  }

  const int64_t padded_;
  const bool streams_;  // y, past the caches, where its lines allow it
};

}  // namespace
}  // namespace qk
