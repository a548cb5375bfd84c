#include "pack.h"

#include <atomic>

#include "../layout.h"
#include "pack_tile.h"
#include "team.h"

namespace qk {

bool pack_w8(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* colsum, int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), depth = padded_k(k);
  std::atomic<bool> found{false};
  parallel_pieces(threads, conversion(blocks, kBlockN * depth), [&](Range range) {
    bool mine = false;
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      Facts facts[kBlockN / 4];
      pack_superblock(reinterpret_cast<const uint8_t*>(weight + n0 * k), k, columns, depth, 0xFF,
                      reinterpret_cast<uint8_t*>(packed + n0 * depth),
                      [&](PackTile& tile, int64_t column) { facts[column / 4].see(tile); });
      for (int64_t c = 0; c < columns; ++c) {
        const RowFacts row = facts[c / 4].row(static_cast<int>(c % 4), depth);
        colsum[n0 + c] = row.sum;
        mine |= row.minus128;
      }
    }
    if (mine) found = true;
  });
  return found;
}

void unpack_w8(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), depth = padded_k(k);
  parallel_pieces(threads, conversion(blocks, kBlockN * depth), [&](Range range) {
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      unpack_superblock(reinterpret_cast<const uint8_t*>(packed + n0 * depth), k, columns, depth,
                        reinterpret_cast<uint8_t*>(weight + n0 * k), [](PackTile&) {});
    }
  });
}

}  // namespace qk
