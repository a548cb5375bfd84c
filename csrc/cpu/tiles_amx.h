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

#include "../layout.h"
#include "row_chunks.h"
#include "threads.h"

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

// Accumulators of a block of kTiles x 16 rows: zero, or from c [32, 32].
template <int kTiles>
QK_INLINE inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <int kTiles>
QK_INLINE inline void load_sums(const int32_t* c) {
  constexpr int64_t kPitch = kPairRows * sizeof(int32_t);
  _tile_loadd(0, c, kPitch);
  _tile_loadd(1, c + kTileRows, kPitch);
  if constexpr (kTiles == 2) {
    _tile_loadd(2, c + kTileRows * kPairRows, kPitch);
    _tile_loadd(3, c + kTileRows * kPairRows + kTileRows, kPitch);
  }
}
template <int kTiles>
QK_INLINE inline void store_sums(int32_t* c) {
  constexpr int64_t kPitch = kPairRows * sizeof(int32_t);
  _tile_stored(0, c, kPitch);
  _tile_stored(1, c + kTileRows, kPitch);
  if constexpr (kTiles == 2) {
    _tile_stored(2, c + kTileRows * kPairRows, kPitch);
    _tile_stored(3, c + kTileRows * kPairRows + kTileRows, kPitch);
  }
}

// Adds the products of `steps` steps. between(i, a, b) runs after product i of each step, while the tiles work.
template <class Tiles, int kTiles, class Between>
QK_INLINE inline void add_products(const uint8_t* a, const int8_t* b, int64_t steps, const Between& between) {
  for (int64_t k = 0; k < steps; ++k, a += kPairBytes, b += Tiles::kStep) {
    _tile_loadd(6, b, Tiles::kLine);
    _tile_loadd(4, a, 64);
    _tile_dpbssd(0, 4, 6);
    between(0, a, b);
    _tile_loadd(7, b + Tiles::kSecond, Tiles::kLine);
    _tile_dpbssd(1, 4, 7);
    between(1, a, b);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, a + kTileBytes, 64);
      _tile_dpbssd(2, 5, 6);
      between(2, a, b);
      _tile_dpbssd(3, 5, 7);
      between(3, a, b);
    }
  }
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
