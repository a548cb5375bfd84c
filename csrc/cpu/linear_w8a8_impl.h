// y [M, N] = f(((q_x [M, K] @ weight [N, K]^T - zp * colsum) * scale_x) * scale_w + bias) + residual, q_x quantized on
// the way in.
//
// Written once over the verbs of a tier. A tier provides, beside the verbs of verbs_*.h:
//   kTileM, kTileN    rows and columns of its register tile; kTileN divides the 64 columns of a superblock
//   kOffset           what is added to a signed activation before it is stored: 128 where the instruction wants u8
//   kSliceK           depth of a K slice, so that kTileN columns of it stay in the cache they are meant for
//   kBlockBytes       activations of a block of row tiles, at most kMaxBlockTiles of them
//   kDepthAlign       a tile's depth is rounded up to this; both operands are padded with zeros up to 64
//   kOwnRows          from how many rows a thread on each has rows of its own (row_chunks.h), 0: never
//   kFinishesTiles    whether finished_tile<D>(...) takes the sums of kFinishedRows rows or more through the epilogue
//                     without storing them
//   Session           constructed in each thread around its tiles
//   tile(rows, ...)   c [rows, kTileN] (+)= a [rows, 4 * steps] * b, b being a slice of the packed superblock;
//                     it may ask for what is ahead on the way (ahead.h)
//   tile_one(...)     the same for one row and all 64 columns: M = 1 reads the weights as one sequential stream
//
// Order of the loops (rows of a chunk are quantized first, then a barrier; or a thread's own rows, see row_chunks.h):
//
//   chunk of rows (their codes <= kChunkBytes)
//     block of row tiles (their activations stay in L2)
//       superblock of 64 columns (its weights stay in L2 while the tiles of the block pass over it)
//         slice of K (its weights stay in L1 or L2; accumulators wait in `sums` between slices)
//           column tile x row tile
//
// The flattened (superblock, row tile) pairs of a chunk, block behind block, are shared out (team.h). int32 sums are
// exact in any order: the result does not depend on who takes which.
#pragma once

#include <cstring>

#include "../args.h"
#include "../layout.h"
#include "activation_impl.h"
#include "ahead.h"
#include "quantize_rows.h"
#include "row_chunks.h"
#include "store_row.h"
#include "team.h"

namespace qk {
namespace {

template <class V>
int64_t linear_w8a8_scratch_bytes(int64_t m, int64_t k, int threads) {
  return row_chunks_bytes<V>(m, k, {row_bytes(k)}, threads);
}

template <class V>
class LinearW8A8 {
 public:
  LinearW8A8(const LinearW8A8Args* members, int count) : LinearW8A8(members, count, row_bytes(members->k)) {}
  LinearW8A8(const LinearW8A8Args* members, int count, int64_t stride)
      : p_(*members), members_(members), stride_(stride) {
    superblocks_ = superblocks(members, count);
    streams_ = superblocks_ * kBlockN * padded_k(p_.k) >= kUncachedBytes;
  }

  void run() const {
    for_row_chunks<V>(
        p_.m, superblocks_ * kBlockN, p_.k, streams_, {stride_}, p_.scratch, p_.threads,
        [this](int64_t row, Range range, uint8_t* q, RowScale* scales) { quantize_rows(row, range, q, scales); },
        [this](int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) {
          gemm(row, rows, q, scales, team);
        });
  }

 protected:  // other tiers have loops of their own over these
  static int64_t superblocks(const LinearW8A8Args* members, int count) {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += ceil_div(members[i].n, kBlockN);
    return blocks;
  }

  // Slices of K, of `most` at most and as even as whole lines allow.
  int64_t slice_depth(int64_t most) const {
    const int64_t k = padded_k(p_.k);
    return round_up(ceil_div(k, ceil_div(k, most)), kBlockK);
  }

  // ---- activations -------------------------------------------------------------------------------------------

  void quantize_rows(int64_t row, Range range, uint8_t* q, RowScale* scales) const {
    for (int64_t r = range.begin; r < range.end; ++r) scales[r] = quantize_one(row + r, q + r * stride_);
  }

  RowScale quantize_one(int64_t r, uint8_t* out) const {
    const RowScale scale = p_.xq ? copy_row(r, out) : quantize_row<V>(p_.act, r, p_.m, p_.k, V::kOffset, out);
    // What meets zero weights: any value would do.
    std::memset(out + p_.k, 0, static_cast<size_t>(row_bytes(p_.k) - p_.k));
    return scale;
  }

  RowScale copy_row(int64_t r, uint8_t* out) const {
    const uint8_t* __restrict in = p_.xq + r * p_.act.x_stride;
    uint8_t* __restrict to = out;  // without it, writing bytes might change this->p_
    const int32_t offset = p_.act.symmetric ? V::kOffset : V::kOffset - 128;
    const int64_t k = p_.k;
    for (int64_t i = 0; i < k; ++i) to[i] = static_cast<uint8_t>(in[i] + offset);
    return {p_.xq_scale[r], (p_.xq_zero_point ? p_.xq_zero_point[r] : 0) + offset};
  }

  // ---- matrix product ----------------------------------------------------------------------------------------

  void gemm(int64_t row, int64_t rows, const uint8_t* q, const RowScale* scales, Team& team) const {
    // A slice of the block is in use at a time. Fewer rows would have weights come from memory more often than L2 lacks
    // activations.
    const int64_t slice_bytes = stride_ < V::kSliceK + kRowPad ? stride_ : V::kSliceK + kRowPad;
    const int64_t tiles = ceil_div(rows, V::kTileM);
    share_out(rows, tiles, V::kBlockBytes / (V::kTileM * slice_bytes), V::kMaxBlockTiles, 1, team,
              [&](const LinearW8A8Args& member, int64_t nb, Range range, bool more) {
                superblock(member, nb, row, rows, tiles, range, more, q, scales);
              });
  }

  // As for_tiles: body(member, superblock of it, ...).
  template <class Body>
  void share_out(int64_t rows, int64_t tiles, int64_t block_tiles, int64_t most_tiles, int64_t least_rows, Team& team,
                 const Body& body) const {
    block_tiles = block_tiles < 1 ? 1 : block_tiles > most_tiles ? most_tiles : block_tiles;
    for_tiles(team, superblocks_, p_.k, {rows, tiles, ceil_div(tiles, block_tiles), least_rows},
              [&](int64_t nb, Range range, bool more) {
                const LinearW8A8Args* member = members_;  // whose superblock it is
                for (int64_t own; nb >= (own = ceil_div(member->n, kBlockN)); ++member) nb -= own;
                body(*member, nb, range, more);
              });
  }

  // The 64 columns' epilogue operands; the last superblock's are copied so that whole vectors can be read.
  struct Columns {
    const LinearW8A8Args* member;
    const int32_t* colsum;
    const int32_t* shared;  // kOffset * colsum where every row's zero point is kOffset, else nullptr
    const float* scale;
    const float* bias;  // nullptr: none
    int count;
  };

  // Where operands are copied to.
  struct ColumnCopies {
    alignas(kAlign) int32_t colsum[kBlockN], shared[kBlockN];
    alignas(kAlign) float scale[kBlockN], bias[kBlockN];
  };

  QK_INLINE Columns columns_of(const LinearW8A8Args& w, int64_t nb, int64_t rows, ColumnCopies& copies) const {
    const int64_t n0 = nb * kBlockN;
    Columns columns{&w,
                    w.colsum + n0,
                    nullptr,
                    w.weight_scale + n0,
                    w.bias ? w.bias + n0 : nullptr,
                    static_cast<int>(w.n - n0 < kBlockN ? w.n - n0 : kBlockN)};
    if (columns.count < kBlockN) {
      for (int j = 0; j < kBlockN; ++j) {
        copies.colsum[j] = j < columns.count ? columns.colsum[j] : 0;
        copies.scale[j] = j < columns.count ? columns.scale[j] : 0.0f;
      }
      for (int j = 0; w.bias && j < kBlockN; ++j) copies.bias[j] = j < columns.count ? columns.bias[j] : 0.0f;
      columns = {&w, copies.colsum, nullptr, copies.scale, w.bias ? copies.bias : nullptr, columns.count};
    }
    if (p_.act.symmetric && rows > 1) {  // one row alone saves nothing
      for (int j = 0; j < kBlockN; ++j) copies.shared[j] = V::kOffset * columns.colsum[j];
      columns.shared = copies.shared;
    }
    return columns;
  }

  // more: whether the thread goes on to the next one.
  void superblock(const LinearW8A8Args& w, int64_t nb, int64_t row, int64_t rows, int64_t tiles, Range range, bool more,
                  const uint8_t* q, const RowScale* scales) const {
    const int64_t n0 = nb * kBlockN;
    ColumnCopies copies;
    const Columns columns = columns_of(w, nb, rows, copies);
    const int8_t* weights = w.packed + n0 * padded_k(p_.k);
    if (rows == 1) {
      alignas(kAlign) int32_t sums[kBlockN];
      V::tile_one(q, weights, round_up(p_.k, V::kDepthAlign) / kPackK, sums, w.has_minus128);
      epilogue<kBlockN>(row, {0, 1}, scales, sums, columns, n0, 0);
      return;
    }
    if constexpr (V::kFinishesTiles) {
      if (finishes(columns, rows, tiles))
        return finished(row, rows, tiles, range, more, q, scales, columns, weights, n0);
    }
    alignas(kAlign) int32_t sums[V::kMaxBlockTiles * V::kTileM * kBlockN];
    for (int64_t k0 = 0;; k0 += V::kSliceK) {
      const int64_t depth = p_.k - k0 < V::kSliceK ? p_.k - k0 : V::kSliceK;
      const bool last = k0 + depth >= p_.k;
      int32_t* c = sums;
      for (int j = 0; j < columns.count; j += V::kTileN) {
        const int8_t* b = weights + k0 * kBlockN + j * kPackK;
        for (int64_t t = range.begin; t < range.end; ++t) {
          const Range tile_rows = share(rows, static_cast<int>(t), static_cast<int>(tiles));
          const int64_t count = tile_rows.size();
          if (last) prefetch(row, tile_rows, *columns.member, n0 + j, V::kTileN);
          const uint8_t* a = q + tile_rows.begin * stride_ + k0;
          const int64_t steps = round_up(depth, V::kDepthAlign) / kPackK;
          V::tile(static_cast<int>(count), a, stride_, b, steps, c, k0 > 0, w.has_minus128,
                  look_ahead(weights + k0 * kBlockN, depth, range, t, j / V::kTileN, more || !last));
          if (last) epilogue<V::kTileN>(row, tile_rows, scales, c, columns, n0, j);
          if (p_.k > V::kSliceK) c += V::kTileM * V::kTileN;  // otherwise one tile's worth of L1 serves them all
        }
      }
      if (last) break;
    }
  }

  // What tile t of the range asks for in a column tile, if there is `more`: as many weights as its slice has, a whole
  // slice behind them (slices are not all of one depth), or a superblock where that is less.
  Ahead look_ahead(const int8_t* weights, int64_t depth, Range range, int64_t t, int64_t column, bool more) const {
    constexpr int64_t kColumns = kBlockN / V::kTileN;
    const int64_t tiles = range.size(), bytes = padded_k(depth) * kBlockN;
    if (kColumns * tiles == 1) return streams_ ? ahead_in_stream(weights) : Ahead{};
    if (!more) return {};
    const int64_t behind = p_.k < V::kSliceK ? padded_k(p_.k) : V::kSliceK;
    const LookAhead ahead(weights + behind * kBlockN, bytes, kColumns * tiles, kBlockN * kPackK);
    return ahead.of(0, column * tiles + t - range.begin, padded_k(depth) / kPackK);
  }

  // ---- tiles that finish by themselves ------------------------------------------------------------------------

  // What a finished tile needs: its first row's scale and place in y, and the operands of its 64 columns.
  struct TileEpilogue {
    const RowScale* rows;
    const int32_t *shared, *colsum;
    const float *scale, *bias;
    void* y;
    int64_t at, y_stride;
  };

  // One slice, whole columns, nothing after the bias but a function of what y can hold, and no tile of fewer rows than
  // are served.
  bool finishes(const Columns& columns, int64_t rows, int64_t tiles) const {
    const LinearW8A8Args& w = *columns.member;
    return p_.k <= V::kSliceK && columns.count == kBlockN && !w.residual.rows && rows / tiles >= V::kFinishedRows &&
           (w.function == Activation::kNone || w.y_dtype == DType::kF32);
  }

  void finished(int64_t row, int64_t rows, int64_t tiles, Range range, bool more, const uint8_t* q,
                const RowScale* scales, const Columns& columns, const int8_t* weights, int64_t n0) const {
    switch (columns.member->y_dtype) {
      case DType::kF32:
        return finished_as<DType::kF32>(row, rows, tiles, range, more, q, scales, columns, weights, n0);
      case DType::kBF16:
        return finished_as<DType::kBF16>(row, rows, tiles, range, more, q, scales, columns, weights, n0);
      default:
        return finished_as<DType::kF16>(row, rows, tiles, range, more, q, scales, columns, weights, n0);
    }
  }

  template <DType D>
  void finished_as(int64_t row, int64_t rows, int64_t tiles, Range range, bool more, const uint8_t* q,
                   const RowScale* scales, const Columns& columns, const int8_t* weights, int64_t n0) const {
    const LinearW8A8Args& w = *columns.member;
    const int64_t steps = round_up(p_.k, V::kDepthAlign) / kPackK;
    for (int64_t t = range.begin; t < range.end; ++t) {
      const Range tile_rows = share(rows, static_cast<int>(t), static_cast<int>(tiles));
      const TileEpilogue epilogue{scales + tile_rows.begin,
                                  columns.shared,
                                  columns.colsum,
                                  columns.scale,
                                  columns.bias,
                                  w.y,
                                  (row + tile_rows.begin) * w.y_stride + n0,
                                  w.y_stride};
      V::template finished_tile<D>(static_cast<int>(tile_rows.size()), q + tile_rows.begin * stride_, stride_, weights,
                                   steps, epilogue, look_ahead(weights, p_.k, range, t, 0, more));
      if constexpr (D == DType::kF32) {
        if (w.function != Activation::kNone) apply_function(w, row, tile_rows, n0);
      }
    }
  }

  // The function of a finished tile, in place.
  QK_NOINLINE void apply_function(const LinearW8A8Args& w, int64_t row, Range rows, int64_t n0) const {
    ActivationFunctionArgs args = {};
    args.x = args.y = w.y, args.function = w.function;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t at = (row + r) * w.y_stride + n0;
      activation_range<V, DType::kF32, DType::kF32>(args, {at, at + kBlockN});
    }
  }

  // ---- epilogue ----------------------------------------------------------------------------------------------

  // The residual of a tile, while its product runs.
  void prefetch(int64_t row, Range rows, const LinearW8A8Args& w, int64_t column, int64_t columns) const {
    prefetch_residual(w.residual, w.y_dtype, row + rows.begin, rows.size(), column, columns);
  }

  // Columns [j, j + kPitch) of the superblock; c has kPitch columns. kStreams: see store_row.h.
  template <int kPitch, bool kStreams = false>
  void epilogue(int64_t row, Range rows, const RowScale* scales, const int32_t* c, const Columns& columns, int64_t n0,
                int j) const {
    if (columns.member->function == Activation::kNone)
      epilogue_of<false, kStreams>(row, rows, scales, c, kPitch, columns, n0, j);
    else
      epilogue_of<true, kStreams>(row, rows, scales, c, kPitch, columns, n0, j);
  }

  template <bool kActivates, bool kStreams>
  void epilogue_of(int64_t row, Range rows, const RowScale* scales, const int32_t* c, int pitch, const Columns& columns,
                   int64_t n0, int j) const {
    switch (columns.member->y_dtype) {
      case DType::kF32:
        return epilogue_as<DType::kF32, kActivates, kStreams>(row, rows, scales, c, pitch, columns, n0, j);
      case DType::kBF16:
        return epilogue_as<DType::kBF16, kActivates, kStreams>(row, rows, scales, c, pitch, columns, n0, j);
      default:
        return epilogue_as<DType::kF16, kActivates, kStreams>(row, rows, scales, c, pitch, columns, n0, j);
    }
  }

  template <DType D, bool kActivates, bool kStreams>
  void epilogue_as(int64_t row, Range rows, const RowScale* scales, const int32_t* c, int pitch, const Columns& columns,
                   int64_t n0, int j) const {
    const LinearW8A8Args& w = *columns.member;
    const int width = columns.count - j < pitch ? columns.count - j : pitch;
    for (int64_t r = rows.begin; r < rows.end; ++r, c += pitch) {
      const auto scale_x = V::set(scales[r].scale);
      const auto zero_point = V::set_i(scales[r].zero_point);
      const int64_t y = (row + r) * w.y_stride + n0 + j, residual = (row + r) * w.residual.stride + n0 + j;
      store_row<V, D, kStreams>(w.y, y, width, [&](int i, int lanes) QK_INLINE {
        const int at = j + i;
        auto sum = V::load_i(c + i);
        if (columns.shared)
          sum = V::sub_i(sum, V::load_i(columns.shared + at));
        else if (scales[r].zero_point != 0)
          sum = V::sub_i(sum, V::mul_i(zero_point, V::load_i(columns.colsum + at)));
        auto v = V::mul(V::mul(V::to_f(sum), scale_x), V::load_f(columns.scale + at));
        if (columns.bias) v = V::add(v, V::load_f(columns.bias + at));
        if constexpr (kActivates) v = Activations<V>::apply(w.function, v);
        if (w.residual.rows) v = plus_residual<V, D>(w.residual, residual + i, lanes, v);
        return v;
      });
    }
  }

  const LinearW8A8Args& p_;  // the first member, for what they share
  const LinearW8A8Args* const members_;
  const int64_t stride_;
  int64_t superblocks_ = 0;  // of all members
  bool streams_ = false;  // whether the weights are too many to have stayed in a cache
};

// Returns the tier that ran.
template <class V>
const char* linear_w8a8(const LinearW8A8Args* members, int count) {
  LinearW8A8<V>(members, count).run();
  return V::kIsa;
}

}  // namespace
}  // namespace qk
