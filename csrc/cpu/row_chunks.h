// The outer loop of the integer products: a chunk of rows is quantized into scratch, then multiplied, by one team of
// threads.
//
// scratch:   copies x chunk rows of stride bytes | copies x chunk RowScale | room for a tile that reads past the end
//
// A few rows are quantized by every thread for itself (a copy each), since a barrier would cost more.
#pragma once

#include "../layout.h"
#include "quantize_rows.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;  // quantized activations held at a time
constexpr int64_t kMinChunkRows = 96;
constexpr int64_t kRowPad = 64;        // bytes; keeps rows of a power-of-two K from falling on one cache set
constexpr int64_t kRedundantRows = 4;  // up to this many rows, each thread quantizes all of them
constexpr int64_t kMinMacsPerThread = 256 << 10;

inline int64_t row_bytes(int64_t k) { return padded_k(k) + kRowPad; }

// Rows quantized at a time: chunks of nearly equal size, whole tiles of any tier (6, 4 or 32 rows) but for the last.
inline int64_t chunk_rows(int64_t m, int64_t k) {
  int64_t most = kChunkBytes / row_bytes(k);
  most = most < kMinChunkRows ? kMinChunkRows : most;
  const int64_t rows = m <= most ? m : round_up(ceil_div(m, ceil_div(m, most)), kMinChunkRows);
  return m < rows ? m : rows;
}

// Rows that memory is set aside for: whole tiles where a tile's rows lie side by side.
template <class V>
int64_t chunk_room(int64_t m, int64_t k) {
  if constexpr (V::kWidens) return round_up(chunk_rows(m, k), V::kWideTileM);
  return chunk_rows(m, k);
}

// stride: bytes of a quantized row. A tile may read (and ignore) up to kTileM - 1 rows past the last one.
template <class V>
int64_t row_chunks_bytes(int64_t m, int64_t k, int64_t stride, int threads) {
  const int64_t copies = m <= kRedundantRows ? threads : 1;
  return copies * chunk_room<V>(m, k) * (stride + static_cast<int64_t>(sizeof(RowScale))) + V::kTileM * stride;
}

// Calls quantize(row, range, q, scales), which fills rows of q for rows row + range of the input, and then, when all
// rows of the chunk are there, multiply(row, rows, q, scales, thread, team).
template <class V, class Quantize, class Multiply>
void for_row_chunks(int64_t m, int64_t n, int64_t k, int64_t stride, uint8_t* scratch, int most_threads,
                    const Quantize& quantize, const Multiply& multiply) {
  if (m == 0 || n == 0) return;
  const int64_t work = m * round_up(n, kBlockN) * padded_k(k) / kMinMacsPerThread;
  const int threads = work < most_threads ? static_cast<int>(work < 1 ? 1 : work) : most_threads;
  const int64_t chunk = chunk_rows(m, k), room = chunk_room<V>(m, k);
  const bool redundant = m <= kRedundantRows;
  parallel(threads, [&](int thread, int team) {
    const typename V::Session session;
    const int64_t copies = redundant ? threads : 1, copy = redundant ? thread : 0;
    uint8_t* q = scratch + copy * room * stride;
    RowScale* scales = reinterpret_cast<RowScale*>(scratch + copies * room * stride) + copy * room;
    for (int64_t row = 0; row < m; row += chunk) {
      const int64_t rows = m - row < chunk ? m - row : chunk;
      if (redundant) {
        quantize(row, Range{0, rows}, q, scales);
      } else {
        quantize(row, share(rows, thread, team), q, scales);
        barrier(team);
      }
      multiply(row, rows, q, scales, thread, team);
      if (row + chunk < m) barrier(team);  // the next chunk overwrites q
    }
  });
}

}  // namespace
}  // namespace qk
