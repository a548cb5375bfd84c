// The outer loop of the integer products, in one of three ways:
//
//   a team quantizes a chunk of rows into scratch, then shares the chunk's product
//   a few rows: each thread quantizes all of them for itself (a copy each), since a barrier would cost more
//   many rows, and weights that a cache holds: threads take blocks of rows, which they quantize and multiply with all
//   weights by themselves, so that codes stay in an L2 and nobody waits
//
// scratch:   copies x chunk rows of stride bytes | copies x chunk RowScale | room for a tile that reads past the end
#pragma once

#include "../layout.h"
#include "quantize_rows.h"
#include "team.h"

namespace qk {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;  // codes held at a time, up to 3.5 times as many bytes where they are widened
constexpr int64_t kMinChunkRows = 96;
constexpr int64_t kRowPad = 64;  // bytes; keeps rows of a power-of-two K from falling on one cache set
constexpr int64_t kRedundantRows = 4;  // up to this many rows, each thread quantizes all of them
constexpr int64_t kMinMacsPerThread = 256 << 10;
// From so many threads on, chunks take turns in two places: to write where many have just read takes long.
constexpr int kManyReaders = 8;

// How a kernel holds quantized rows.
struct RowPlan {
  int64_t stride;  // bytes of a row
  int64_t unit = 1;  // rows that are quantized together, of which there is room for whole numbers
  // Rows of its own that a thread multiplies at a time: at most these, and at least V::kOwnRows (0: never). With fewer,
  // tiles that are not full, and weights that come from L3 and are unpacked for each thread, cost more than codes from
  // another core's L2; with weights of kUncachedBytes, which may come from memory, nothing is gained. One thread alone
  // reads the same weights either way.
  int64_t most_own = 96;
};

inline int64_t row_bytes(int64_t k) { return padded_k(k) + kRowPad; }

// Rows quantized at a time: chunks of nearly equal size, whole tiles of any tier (6, 4 or 32 rows) but for the last.
inline int64_t chunk_rows(int64_t m, int64_t k) {
  int64_t most = kChunkBytes / row_bytes(k);
  most = most < kMinChunkRows ? kMinChunkRows : most;
  const int64_t rows = m <= most ? m : round_up(ceil_div(m, ceil_div(m, most)), kMinChunkRows);
  return m < rows ? m : rows;
}

// Chunks that scratch has room for: one for each thread, or two that take turns.
inline int64_t row_copies(int64_t m, int64_t k, int threads) {
  return m <= kRedundantRows ? threads : threads >= kManyReaders && m > chunk_rows(m, k) ? 2 : 1;
}

// A tile may read (and ignore) up to kTileM - 1 rows past the last one.
template <class V>
int64_t row_chunks_bytes(int64_t m, int64_t k, const RowPlan& plan, int threads) {
  const int64_t copies = row_copies(m, k, threads), room = round_up(chunk_rows(m, k), plan.unit);
  return copies * room * (plan.stride + static_cast<int64_t>(sizeof(RowScale))) + V::kTileM * plan.stride;
}

// Into how many blocks of rows m are divided where each thread has rows of its own: as many for each of the team; 0:
// that is not worth while. streams: whether the weights are kUncachedBytes or more. room: rows of scratch.
template <class V>
int64_t own_blocks(int64_t m, bool streams, int64_t room, const RowPlan& plan, int team) {
  const int64_t whole = V::kTileM > plan.unit ? V::kTileM : plan.unit, here = room / team / whole * whole;
  const int64_t most = here < plan.most_own ? here : plan.most_own;
  const bool worth = V::kOwnRows > 0 && m >= V::kOwnRows * team && most >= V::kOwnRows;
  return !worth || (streams && team > 1) ? 0 : team * ceil_div(ceil_div(m, team), most);
}

// Calls quantize(row, range, q, scales), which fills rows of q for rows row + range of the input, whole units but for
// the last ones; and then, when all rows are there, multiply(row, rows, q, scales, team). streams: as above.
template <class V, class Quantize, class Multiply>
void for_row_chunks(int64_t m, int64_t n, int64_t k, bool streams, const RowPlan& plan, uint8_t* scratch,
                    int most_threads, const Quantize& quantize, const Multiply& multiply) {
  if (m == 0 || n == 0) return;
  const int threads = team_for(m * round_up(n, kBlockN) * padded_k(k), kMinMacsPerThread, most_threads);
  const int64_t chunk = chunk_rows(m, k), unit = plan.unit, room = round_up(chunk, unit), stride = plan.stride;
  const bool redundant = m <= kRedundantRows;
  const int64_t copies = row_copies(m, k, threads);
  uint8_t* const codes = scratch;
  RowScale* const all_scales = reinterpret_cast<RowScale*>(scratch + copies * room * stride);
  parallel_team(threads, [&](Team& team) {
    const typename V::Session session;
    if (const int64_t blocks = own_blocks<V>(m, streams, room, plan, team.size()); blocks > 0) {
      const int64_t own = team.thread() * (room / team.size());
      uint8_t* const q = codes + own * stride;
      RowScale* const scales = all_scales + own;
      team.each_piece({blocks, 1, m / blocks * n * padded_k(k), 1, 1}, [&](Range mine, bool /*more*/) {
        for (int64_t b = mine.begin; b < mine.end; ++b) {
          const Range rows = share(m, static_cast<int>(b), static_cast<int>(blocks));
          Team alone;
          quantize(rows.begin, Range{0, rows.size()}, q, scales);
          multiply(rows.begin, rows.size(), q, scales, alone);
        }
      });
      return;
    }
    int64_t copy = redundant ? team.thread() : 0;
    for (int64_t row = 0; row < m; row += chunk, copy = (copy + 1) % copies) {
      const int64_t rows = m - row < chunk ? m - row : chunk;
      uint8_t* const q = codes + copy * room * stride;
      RowScale* const scales = all_scales + copy * room;
      if (redundant) {
        quantize(row, Range{0, rows}, q, scales);
      } else {
        team.each_piece(conversion(ceil_div(rows, unit), unit * k), [&](Range units, bool /*more*/) {
          const int64_t end = units.end * unit;
          quantize(row, Range{units.begin * unit, end < rows ? end : rows}, q, scales);
        });
        barrier(team.size());
      }
      multiply(row, rows, q, scales, team);
      // The next chunk overwrites this one. With two, whoever has left the barrier above is done with the other.
      if (row + chunk < m && copies == 1) barrier(team.size());
    }
  });
}

}  // namespace
}  // namespace qk
