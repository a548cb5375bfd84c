// The products of attention (attention_impl.h) by vectors: fp32 in register tiles, whatever the inputs are.
//
//   keys    [panels][D][tile]     k^T times scale, tiles of 64 keys (with 4 vectors of 16 floats)
//   values  [panels][keys][tile]  tiles of 64 features
//   scores  [24][keys]            which become weights in place
//
// Both products run on one register tile. A part of the keys is as long as leaves its two packed pieces 32 KiB each:
// one of them is in L1 while all queries of a block walk over it, and both stay in L2 for the next block.
#pragma once

#include <cstdint>

#include "attention_impl.h"

namespace qk {
namespace {

// What the rows of a product begin with and what they are multiplied by at the end.
struct ProductEnds {
  const float* factor;  // of `sums`; nullptr: the product begins with zeros
  const float* sums;
  int64_t step;  // floats between rows of sums
  const float* scale;  // nullptr: 1

  ProductEnds from(int64_t row) const {
    return {factor ? factor + row : nullptr, sums + row * step, step, scale ? scale + row : nullptr};
  }
};

template <class V>
struct RegisterTiles {
  using F = typename V::F;
  using Ends = ProductEnds;

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

template <class V, DType D>
class VectorProducts {
  using F = typename V::F;

 public:
  static constexpr int64_t kQueries = 24;  // a multiple of the rows of the larger tiles
  static constexpr int kWeightVecs = 1;  // that are put down together
  static constexpr bool kScaled = true;  // keys are packed times scale

  struct Sizes {
    explicit Sizes(int64_t size) : width(round_up(size, V::kLanes)) {
      const int64_t most = kPartFloats / width < kMostPartKeys ? kPartFloats / width : kMostPartKeys;
      part_keys = most < kTile ? kTile : most / kTile * kTile;
      score_step = part_keys + V::kLanes;  // rows on different cache sets
    }
    int64_t width;  // of a row of sums or values, padded
    int64_t part_keys;  // most keys of a part
    int64_t score_step;
  };

  static int64_t bytes(const Sizes& sizes) {
    return round_up(
        4 * (part_keys_floats(sizes) * 2 + kQueries * (sizes.score_step + sizes.width) + V::kLanes * sizes.width),
        kAlign);
  }

  VectorProducts(const AttentionArgs& args, const Sizes& sizes, uint8_t* scratch)
      : p_(args),
        sizes_(sizes),
        keys_(reinterpret_cast<float*>(scratch)),
        values_(keys_ + part_keys_floats(sizes)),
        scores_(values_ + part_keys_floats(sizes)),
        queries_(scores_ + kQueries * sizes.score_step),
        staged_(queries_ + kQueries * sizes.width) {}

  // Keys and values of a part.
  void pack(int64_t batch, int64_t head, Range keys) {
    count_ = keys.size();
    pack_keys(element_of(p_.k_step, batch, head, 0), keys);
    pack_values(element_of(p_.v_step, batch, head, 0), keys);
  }

  // Those of a block and the first `seen` keys of the part.
  void scores(const QueryBlock& block, int64_t seen) {
    const int64_t vecs = ceil_div(seen, V::kLanes), packed_vecs = ceil_div(count_, V::kLanes);
    int64_t step = p_.q_step.token;
    const float* q = queries_of(block, &step);
    for (int64_t panel = 0; panel < vecs; panel += V::kTileVecs) {
      const int64_t packed = packed_vecs - panel < V::kTileVecs ? packed_vecs - panel : V::kTileVecs;
      const int64_t used = vecs - panel < packed ? vecs - panel : packed;
      Tiles::product(block.rows.size(), used, q, step, keys_ + panel * V::kLanes * p_.size, packed * V::kLanes, p_.size,
                     ProductEnds{}, scores_ + panel * V::kLanes, sizes_.score_step);
    }
  }

  float* row(int64_t r) { return scores_ + r * sizes_.score_step; }
  QK_INLINE static void put_weights(float* scores, const F (&weights)[kWeightVecs]) { V::store_f(scores, weights[0]); }

  void sums(int64_t rows, int64_t seen, const AttentionSums& sums) {
    // Past the sums where the output needs no conversion.
    const bool direct = sums.scale && D == DType::kF32 && p_.size == sizes_.width;
    float* to = direct ? static_cast<float*>(p_.y) + sums.y : sums.sums;
    const int64_t to_step = direct ? sums.y_step : sums.step;
    for (int64_t panel = 0; panel < sizes_.width; panel += kTile) {
      const int64_t width = sizes_.width - panel < kTile ? sizes_.width - panel : kTile;
      Tiles::product(rows, width / V::kLanes, scores_, sizes_.score_step, values_ + panel * count_, width, seen,
                     {sums.factor, sums.sums + panel, sums.step, sums.scale}, to + panel, to_step);
    }
    if (!sums.scale || direct) return;
    for (int64_t r = 0; r < rows; ++r)
      store_row<V, D, false>(p_.y, sums.y + r * sums.y_step, static_cast<int>(p_.size),
                             [&](int d, int /*lanes*/) QK_INLINE { return V::load_f(sums.sums + r * sums.step + d); });
  }

 private:
  using Tiles = RegisterTiles<V>;
  static constexpr int64_t kTile = V::kTileVecs * V::kLanes;
  static constexpr int64_t kPartFloats = 8192;
  static constexpr int64_t kMostPartKeys = 256;  // 24 KiB of scores

  static int64_t part_keys_floats(const Sizes& sizes) { return sizes.part_keys * sizes.width; }

  // Elements [at, at + size) of a tensor, widened; zeros up to a whole vector.
  void widen_row(const void* from, int64_t at, float* to) const {
    for (int64_t i = 0; i < p_.size; i += V::kLanes) V::store_f(to + i, load_lanes<V, D>(from, at + i, p_.size - i));
  }

  void pack_keys(int64_t from, Range keys) {
    const int64_t count = keys.size(), vecs = ceil_div(count, V::kLanes);
    const F scale = V::set(p_.scale);
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t panel = j / V::kTileVecs * V::kTileVecs;
      const int64_t step = (vecs - panel < V::kTileVecs ? vecs - panel : V::kTileVecs) * V::kLanes;
      float* to = keys_ + panel * V::kLanes * p_.size + (j - panel) * V::kLanes;
      const int64_t first = keys.begin + j * V::kLanes;
      const float* rows;
      int64_t row_step;
      if (D == DType::kF32 && p_.size % 4 == 0 && first + V::kLanes <= keys.end) {
        rows = static_cast<const float*>(p_.k) + from + first * p_.k_step.token;
        row_step = p_.k_step.token;
      } else {
        for (int64_t i = 0; i < V::kLanes; ++i) {
          float* row = staged_ + i * sizes_.width;
          if (first + i < keys.end)
            widen_row(p_.k, from + (first + i) * p_.k_step.token, row);
          else
            for (int64_t d = 0; d < sizes_.width; d += V::kLanes) V::store_f(row + d, V::set(0.0f));
        }
        rows = staged_;
        row_step = sizes_.width;
      }
      for (int64_t d = 0; d < p_.size; d += 4) {
        F columns[4];
        V::columns4(rows + d, row_step, columns);
        for (int64_t i = 0; i < 4 && d + i < p_.size; ++i) V::store_f(to + (d + i) * step, V::mul(columns[i], scale));
      }
    }
  }

  void pack_values(int64_t from, Range keys) {
    const int64_t count = keys.size();
    for (int64_t panel = 0; panel < sizes_.width; panel += kTile) {
      const int64_t width = sizes_.width - panel < kTile ? sizes_.width - panel : kTile;
      float* to = values_ + panel * count;
      int64_t row = from + keys.begin * p_.v_step.token + panel;
      for (int64_t i = 0; i < count; ++i, to += width, row += p_.v_step.token)
        for (int64_t d = 0; d < width; d += V::kLanes)
          V::store_f(to + d, load_lanes<V, D>(p_.v, row + d, p_.size - panel - d));
    }
  }

  const float* queries_of(const QueryBlock& block, int64_t* step) {
    const int64_t from = element_of(p_.q_step, block.batch, block.head, block.rows.begin);
    if (D == DType::kF32) return static_cast<const float*>(p_.q) + from;
    for (int64_t r = 0; r < block.rows.size(); ++r)
      widen_row(p_.q, from + r * p_.q_step.token, queries_ + r * sizes_.width);
    *step = sizes_.width;
    return queries_;
  }

  const AttentionArgs& p_;
  const Sizes sizes_;
  float *keys_, *values_, *scores_;
  float* queries_;  // of a block, widened, where they are not fp32
  float* staged_;  // kLanes keys, widened and padded
  int64_t count_ = 0;  // keys of the part
};

template <class V>
void attention(const AttentionArgs& args) {
  switch (args.dtype) {
    case DType::kF32:
      return Attention<V, DType::kF32, VectorProducts<V, DType::kF32>>(args).run();
    case DType::kBF16:
      return Attention<V, DType::kBF16, VectorProducts<V, DType::kBF16>>(args).run();
    default:
      return Attention<V, DType::kF16, VectorProducts<V, DType::kF16>>(args).run();
  }
}

template <class V>
int64_t attention_scratch_bytes(int64_t size, int threads) {
  return attention_thread_bytes<VectorProducts<V, DType::kF32>>(size) * threads;
}

}  // namespace
}  // namespace qk
