// The AMX tier's product of tiles, and its activations in tile order.
//
// 32 x 32 block of the result: tiles 0-3 accumulate, 4-5 hold activations, 6-7 weights. Four loads feed four products:
//
//            tile 6     tile 7          tile 6, 7: 16 lines of 16 columns x 4 k
//   tile 4 | tile 0  |  tile 1 |        tile 4, 5: 16 rows of 64 k
//   tile 5 | tile 2  |  tile 3 |
//
// Activations are quantized into the order in which tiles are loaded, [rows / 32][K / 64][32 rows][64 k]: a tile is
// 1 KiB in one piece, where rows K bytes apart would be 16 pages.
//
// Tile loads and configurations are assembly of which compilers do not know what memory it reads (g++ 12 and 13 give
// them no memory clobber): stores before them could be moved behind them, so a fence stands between.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "../layout.h"
#include "row_chunks.h"

namespace qk {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kPairRows = 2 * kTileRows, kPairBytes = 2 * kTileBytes;  // two tiles, one below the other
constexpr int64_t kPairSums = kPairRows * kPairRows;  // of a 32 x 32 block

QK_INLINE inline void store_fence() { asm volatile("" ::: "memory"); }

// Constructed in each thread around its tiles.
class TileSession {
 public:
  TileSession() {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("" ::"r"(&config) : "memory");  // the whole of it is read
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }

 private:
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  };
};

// Where the tiles of 32 columns of weights lie: bytes between lines, between the two tiles, and between steps of 64 k.
struct PackedTiles {  // in a superblock of the W8 layout
  static constexpr int64_t kLine = kBlockN * kPackK, kSecond = 64, kStep = 16 * kLine;
};
struct PanelTiles {  // one tile after the other
  static constexpr int64_t kLine = 64, kSecond = kTileBytes, kStep = kPairBytes;
};

// Where the sums of a block of 32 x 32 lie, in elements: the tiles below and to the right, and the next row of a tile.
struct BlockSums {  // [32, 32]
  static constexpr int64_t kDown = kTileRows * kPairRows, kRight = kTileRows, kPitch = kPairRows;
};

// Accumulator i of a block: zero, from memory and to it.
template <int i>
QK_INLINE inline void clear_sum() {
  if constexpr (i == 0) _tile_zero(0);
  if constexpr (i == 1) _tile_zero(1);
  if constexpr (i == 2) _tile_zero(2);
  if constexpr (i == 3) _tile_zero(3);
}
template <class Sums, int i>
QK_INLINE inline void load_sum(const int32_t* c) {
  constexpr int64_t kPitch = Sums::kPitch * sizeof(int32_t);
  c += i / 2 * Sums::kDown + i % 2 * Sums::kRight;
  if constexpr (i == 0) _tile_loadd(0, c, kPitch);
  if constexpr (i == 1) _tile_loadd(1, c, kPitch);
  if constexpr (i == 2) _tile_loadd(2, c, kPitch);
  if constexpr (i == 3) _tile_loadd(3, c, kPitch);
}
template <class Sums, int i>
QK_INLINE inline void store_sum(int32_t* c) {
  constexpr int64_t kPitch = Sums::kPitch * sizeof(int32_t);
  c += i / 2 * Sums::kDown + i % 2 * Sums::kRight;
  if constexpr (i == 0) _tile_stored(0, c, kPitch);
  if constexpr (i == 1) _tile_stored(1, c, kPitch);
  if constexpr (i == 2) _tile_stored(2, c, kPitch);
  if constexpr (i == 3) _tile_stored(3, c, kPitch);
}
// All of a block of kTiles x 16 rows.
template <int kTiles>
QK_INLINE inline void clear_sums() {
  clear_sum<0>();
  clear_sum<1>();
  if constexpr (kTiles == 2) {
    clear_sum<2>();
    clear_sum<3>();
  }
}
template <int kTiles>
QK_INLINE inline void load_sums(const int32_t* c) {
  load_sum<BlockSums, 0>(c);
  load_sum<BlockSums, 1>(c);
  if constexpr (kTiles == 2) {
    load_sum<BlockSums, 2>(c);
    load_sum<BlockSums, 3>(c);
  }
}
template <int kTiles>
QK_INLINE inline void store_sums(int32_t* c) {
  store_sum<BlockSums, 0>(c);
  store_sum<BlockSums, 1>(c);
  if constexpr (kTiles == 2) {
    store_sum<BlockSums, 2>(c);
    store_sum<BlockSums, 3>(c);
  }
}

// Adds the products of a step. before(i) runs ahead of product i, which adds to accumulator i, and between(i) after it,
// while the tiles work.
template <class Tiles, int kTiles, bool kLoadsFirst = false, class Before, class Between>
QK_INLINE inline void add_step(const uint8_t* a, const int8_t* b, const Before& before, const Between& between) {
  _tile_loadd(6, b, Tiles::kLine);
  _tile_loadd(4, a, 64);
  if constexpr (kLoadsFirst) {
    _tile_loadd(7, b + Tiles::kSecond, Tiles::kLine);
    _tile_loadd(5, a + kTileBytes, 64);
  }
  before(std::integral_constant<int, 0>{});
  _tile_dpbssd(0, 4, 6);
  between(std::integral_constant<int, 0>{});
  if constexpr (!kLoadsFirst) _tile_loadd(7, b + Tiles::kSecond, Tiles::kLine);
  before(std::integral_constant<int, 1>{});
  _tile_dpbssd(1, 4, 7);
  between(std::integral_constant<int, 1>{});
  if constexpr (kTiles == 2) {
    if constexpr (!kLoadsFirst) _tile_loadd(5, a + kTileBytes, 64);
    before(std::integral_constant<int, 2>{});
    _tile_dpbssd(2, 5, 6);
    between(std::integral_constant<int, 2>{});
    before(std::integral_constant<int, 3>{});
    _tile_dpbssd(3, 5, 7);
    between(std::integral_constant<int, 3>{});
  }
}

// body(0), ..., body(n - 1), as constants.
template <int... i, class Body>
QK_INLINE inline void each_of(std::integer_sequence<int, i...>, const Body& body) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int n, class Body>
QK_INLINE inline void each(const Body& body) {
  each_of(std::make_integer_sequence<int, n>{}, body);
}

// Those of `steps` steps; between(i, a, b).
template <class Tiles, int kTiles, class Between>
QK_INLINE inline void add_products(const uint8_t* a, const int8_t* b, int64_t steps, const Between& between) {
  for (int64_t k = 0; k < steps; ++k, a += kPairBytes, b += Tiles::kStep)
    add_step<Tiles, kTiles>(a, b, [](auto) QK_INLINE {}, [&](int i) QK_INLINE { between(i, a, b); });
}

// A row of padded_k(k) bytes to row r of rows in tile order.
inline void store_tile_row(const uint8_t* row, int64_t k, int64_t r, uint8_t* tiles) {
  const int64_t steps = padded_k(k) / 64;
  uint8_t* out = tiles + r / kPairRows * steps * kPairBytes + r % kPairRows * 64;
  for (int64_t s = 0; s < steps; ++s) std::memcpy(out + s * kPairBytes, row + s * 64, 64);
}

// Scratch bytes per row of a chunk, so that its rows in tile order and row_extra bytes for each of them have room.
inline int64_t tile_stride(int64_t m, int64_t k, int64_t row_extra) {
  const int64_t chunk = chunk_rows(m, k), rows = chunk > 0 ? chunk : 1;
  return round_up(ceil_div(round_up(rows, kPairRows) * padded_k(k) + rows * row_extra, rows), kAlign);
}

// Of `rows` rows, those of the pair of tiles t.
inline int64_t rows_of_pair(int64_t rows, int64_t t) {
  const int64_t left = rows - t * kPairRows;
  return left < kPairRows ? left : kPairRows;
}

}  // namespace
}  // namespace qk
