// The products of attention (attention_impl.h) by tiles of AMX-BF16: tdpbf16ps multiplies bf16 and sums in fp32.
//
//   queries   [D / 32]                 tiles of 32 rows x 32 features, two tiles each
//   keys      [keys / 16][D / 32]      tiles of 16 lines: pairs of features of 16 keys
//   values    [keys / 32][D / 16]      tiles of 16 lines: pairs of keys of 16 features
//   scores    [32][keys]               fp32; in their place 32 weights become 64 bytes of high and of low terms
//
// Queries and keys are bf16 as they are. A weight is the sum of two bf16 numbers, 16 bits: of one, it would add as much
// to the error as the rounding of the result. Pairs of weights are keys i and 16 + i of 32, and so are those of values:
// two vectors become pairs by a shift and a blend, where neighbours would need permutations.
#pragma once

#include <cstdint>

#include "attention_impl.h"
#include "tiles_amx.h"

namespace qk {
namespace {

// Tiles of bf16, and how many bytes it is to others.
struct TilesAt {
  const uint8_t* at;
  int64_t line;  // the next row of a tile
  int64_t second;  // the tile below (left operand) or to the right (right operand)
  int64_t step;  // the next 32 of the inner dimension
};

// c [16 kRows, 16 kCols] = the sum of kTerms terms of a, 64 bytes apart and the last one first, @ b
template <int kRows, int kCols, int kTerms>
QK_INLINE inline void tile_product(const TilesAt& a, const TilesAt& b, int64_t steps, float* c, int64_t c_step) {
  _tile_zero(0);
  if constexpr (kCols == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kCols == 2) _tile_zero(3);
  store_fence();
  for (int term = kTerms - 1; term >= 0; --term) {
    const uint8_t *left = a.at + term * 64, *right = b.at;
    for (int64_t s = 0; s < steps; ++s, left += a.step, right += b.step) {
      _tile_loadd(4, left, a.line);
      _tile_loadd(6, right, b.line);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kCols == 2) {
        _tile_loadd(7, right + b.second, b.line);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, left + a.second, a.line);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kRows == 2 && kCols == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t bytes = 4 * c_step;
  _tile_stored(0, c, bytes);
  if constexpr (kCols == 2) _tile_stored(1, c + kTileRows, bytes);
  if constexpr (kRows == 2) _tile_stored(2, c + kTileRows * c_step, bytes);
  if constexpr (kRows == 2 && kCols == 2) _tile_stored(3, c + kTileRows * c_step + kTileRows, bytes);
}

template <class V>
class TileProducts {
  using F = typename V::F;
  using I = typename V::I;

 public:
  static constexpr int64_t kQueries = kPairRows;
  static constexpr int kWeightVecs = 2;  // that are put down together
  static constexpr bool kScaled = false;  // keys are packed as they are

  struct Sizes {
    explicit Sizes(int64_t size) : width(round_up(size, kTileRows)), steps(ceil_div(size, kStep)) {
      const int64_t most = kPartBytes / (2 * kStep * steps) / kStep * kStep;
      part_keys = most < kMostPartKeys ? most : kMostPartKeys;
    }
    int64_t width;  // of a row of sums or values, padded
    int64_t steps;  // of 32 features
    int64_t part_keys;  // most keys of a part
  };

  static int64_t bytes(const Sizes& sizes) { return Places(sizes).end; }

  TileProducts(const AttentionArgs& args, const Sizes& sizes, uint8_t* scratch)
      : TileProducts(args, sizes, scratch, Places(sizes)) {}

  void pack(int64_t batch, int64_t head, Range keys) {
    score_line_ = 4 * round_up(keys.size(), kStep) + kLine;  // rows on different cache sets
    pack_keys(element_of(p_.k_step, batch, head, keys.begin), keys.size());
    pack_values(element_of(p_.v_step, batch, head, keys.begin), keys.size());
  }

  // Those of a block and the first `seen` keys of the part.
  void scores(const QueryBlock& block, int64_t seen) {
    const int64_t from = element_of(p_.q_step, block.batch, block.head, block.rows.begin), rows = block.rows.size();
    TilesAt queries = {queries_, kLine, kTileBytes, kPairBytes};
    if (p_.size % kStep == 0 && rows % kTileRows == 0) {  // they are tiles where they lie
      const int64_t line = 2 * p_.q_step.token;
      queries = {static_cast<const uint8_t*>(p_.q) + 2 * from, line, kTileRows * line, kLine};
    } else {
      for (int64_t r = 0; r < rows; ++r) put_row(p_.q, from + r * p_.q_step.token, queries_ + r * kLine, kPairBytes);
    }
    const int64_t of_keys = sizes_.steps * kTileBytes;
    for (int64_t tile = 0; tile * kTileRows < seen; tile += 2)
      product<1>(rows, seen - tile * kTileRows, queries, {keys_ + tile * of_keys, kLine, of_keys, kTileBytes},
                 sizes_.steps, row(0) + tile * kTileRows, score_line_ / 4);
  }

  float* row(int64_t r) { return reinterpret_cast<float*>(scores_ + r * score_line_); }
  // In place of so many scores.
  QK_INLINE static void put_weights(float* scores, const F (&weights)[kWeightVecs]) {
    const I high = V::set_i(static_cast<int32_t>(0xFFFF0000)), half = V::set_i(0x8000);
    const I a = V::as_i(weights[0]), b = V::as_i(weights[1]);
    const F rest_a = V::sub(weights[0], V::as_f(_mm512_and_si512(a, high)));
    const F rest_b = V::sub(weights[1], V::as_f(_mm512_and_si512(b, high)));
    uint8_t* to = reinterpret_cast<uint8_t*>(scores);
    put(to, words(a, b));
    put(to + kLine, words(V::add_i(V::as_i(rest_a), half), V::add_i(V::as_i(rest_b), half)));
  }

  void sums(int64_t rows, int64_t seen, const AttentionSums& sums) {
    const int64_t tiles = sizes_.width / kTileRows, steps = ceil_div(seen, kStep);
    const TilesAt weights = {scores_, score_line_, kTileRows * score_line_, 2 * kLine};
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const TilesAt values = {values_ + tile * kTileBytes, kLine, kTileBytes, tiles * kTileBytes};
      const int64_t width = (tiles - tile) * kTileRows;
      float* to = products_ + tile * kTileRows;
      if (values_finite_)
        product<2>(rows, width, weights, values, steps, to, sizes_.width);
      else  // an infinity times a low term of zero would be no number
        product<1>(rows, width, weights, values, steps, to, sizes_.width);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* own = sums.sums + r * sums.step;
      const auto sum_at = [&](int64_t d) QK_INLINE {
        const F sum = V::load_f(products_ + r * sizes_.width + d);
        return sums.factor ? V::fma(V::set(sums.factor[r]), V::load_f(own + d), sum) : sum;
      };
      if (sums.scale)
        store_row<V, DType::kBF16, false>(p_.y, sums.y + r * sums.y_step, static_cast<int>(p_.size),
                                          [&](int d, int /*lanes*/)
                                              QK_INLINE { return V::mul(sum_at(d), V::set(sums.scale[r])); });
      else
        for (int64_t d = 0; d < sizes_.width; d += V::kLanes) V::store_f(own + d, sum_at(d));
    }
  }

 private:
  static constexpr int64_t kStep = 32;  // of the inner dimension in a tile
  static constexpr int64_t kLine = 64;  // bytes of a tile's row
  // Of a part; with fewer, sums are scaled and stored more often than L1 saves.
  static constexpr int64_t kMostPartKeys = 256;
  static constexpr int64_t kPartBytes = 64 << 10;  // of keys, and as many of values

  // Bytes from the beginning of the scratch.
  struct Places {
    explicit Places(const Sizes& sizes)
        : products(kQueries * (4 * sizes.part_keys + kLine)),
          queries(products + 4 * kQueries * sizes.width),
          keys(queries + sizes.steps * kPairBytes),
          values(keys + sizes.part_keys / kTileRows * sizes.steps * kTileBytes),
          staged(values + sizes.part_keys / kStep * sizes.width / kTileRows * kTileBytes),
          end(staged + sizes.steps * kTileBytes) {}
    int64_t products, queries, keys, values, staged, end;
  };

  TileProducts(const AttentionArgs& args, const Sizes& sizes, uint8_t* scratch, const Places& at)
      : p_(args),
        sizes_(sizes),
        scores_(scratch),
        products_(reinterpret_cast<float*>(scratch + at.products)),
        queries_(scratch + at.queries),
        keys_(scratch + at.keys),
        values_(scratch + at.values),
        staged_(scratch + at.staged) {}

  static void put(uint8_t* to, I v) { _mm512_storeu_si512(to, v); }
  // The high halves of two vectors, those of `a` in the even words.
  static I words(I a, I b) { return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b); }

  // Elements [at, at + size) of a tensor, 32 a step; zeros behind.
  void put_row(const void* from, int64_t at, uint8_t* to, int64_t step) const {
    for (int64_t d = 0; d < p_.size; d += kStep, to += step) {
      const __mmask32 here = p_.size - d < kStep ? (1u << (p_.size - d)) - 1u : ~0u;
      put(to, _mm512_maskz_loadu_epi16(here, static_cast<const uint16_t*>(from) + at + d));
    }
  }

  void pack_keys(int64_t from, int64_t count) {
    const int64_t of_keys = sizes_.steps * kTileBytes;
    for (int64_t first = 0; first < round_up(count, kStep); first += kTileRows) {
      for (int64_t i = 0; i < kTileRows; ++i) {
        if (first + i < count) {
          put_row(p_.k, from + (first + i) * p_.k_step.token, staged_ + i * kLine, kTileBytes);
          continue;
        }
        for (int64_t s = 0; s < sizes_.steps; ++s) put(staged_ + s * kTileBytes + i * kLine, V::set_i(0));
      }
      uint8_t* to = keys_ + first / kTileRows * of_keys;
      for (int64_t tile = 0; tile < of_keys; tile += kTileBytes) {
        for (int64_t pair = 0; pair < kTileRows; pair += 4) {
          F columns[4];
          V::columns4(reinterpret_cast<const float*>(staged_ + tile + 4 * pair), kLine / 4, columns);
          unroll<4>([&](auto i) QK_INLINE { put(to + tile + (pair + i.value) * kLine, V::as_i(columns[i.value])); });
        }
      }
    }
  }

  void pack_values(int64_t from, int64_t count) {
    const int64_t tiles = sizes_.width / kTileRows;
    I worst = V::set_i(0);
    uint8_t* to = values_;
    for (int64_t step = 0; step < count; step += kStep, to += tiles * kTileBytes) {
      for (int64_t i = 0; i < kTileRows; ++i) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const F a = values_at(from, step + i, count, tile), b = values_at(from, step + i + kTileRows, count, tile);
          worst = _mm512_max_epu32(worst, _mm512_max_epu32(V::abs_bits(a), V::abs_bits(b)));
          put(to + tile * kTileBytes + i * kLine, words(V::as_i(a), V::as_i(b)));
        }
      }
    }
    values_finite_ = _mm512_reduce_max_epu32(worst) < 0x7F800000u;
  }
  // 16 features of a token, widened; zeros behind the last token.
  F values_at(int64_t from, int64_t row, int64_t count, int64_t tile) const {
    if (row >= count) return V::set(0.0f);
    const int64_t d = tile * kTileRows;
    return load_lanes<V, DType::kBF16>(p_.v, from + row * p_.v_step.token + d, p_.size - d);
  }

  // c [rows, cols] by as many tiles as that takes, two in each direction at most.
  template <int kTerms>
  static void product(int64_t rows, int64_t cols, const TilesAt& a, const TilesAt& b, int64_t steps, float* c,
                      int64_t c_step) {
    if (rows > kTileRows) {
      if (cols > kTileRows) return tile_product<2, 2, kTerms>(a, b, steps, c, c_step);
      return tile_product<2, 1, kTerms>(a, b, steps, c, c_step);
    }
    if (cols > kTileRows) return tile_product<1, 2, kTerms>(a, b, steps, c, c_step);
    return tile_product<1, 1, kTerms>(a, b, steps, c, c_step);
  }

  const TileSession session_;
  const AttentionArgs& p_;
  const Sizes sizes_;
  uint8_t* scores_;
  float* products_;
  uint8_t *queries_, *keys_, *values_;
  uint8_t* staged_;  // 16 keys, [D / 32][16 rows][32 features]
  int64_t score_line_ = 0;  // bytes between rows of scores
  bool values_finite_ = true;
};

}  // namespace
}  // namespace qk
