#include "pack.h"

#include <atomic>
#include <cstring>

#include "../layout.h"
#include "threads.h"

namespace qk {
namespace {

// A 64 x 64 byte block is 4 KiB on both sides, so it is read and written within the L1 cache.
constexpr int64_t kDwords = kBlockK / kPackK;

// Packs one 64-column superblock. Returns whether a -128 occurs.
bool pack_superblock(const int8_t* weight, int64_t columns, int64_t k, int8_t* packed, int32_t* colsum) {
  alignas(kAlign) int8_t row[kBlockK];
  int8_t lowest = 0;
  for (int64_t c = 0; c < columns; ++c) colsum[c] = 0;
  for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
    const int64_t depth = k - k0 < kBlockK ? k - k0 : kBlockK;
    int8_t* block = packed + k0 * kBlockN;
    for (int64_t c = 0; c < kBlockN; ++c) {
      if (c < columns) {
        std::memcpy(row, weight + c * k + k0, static_cast<size_t>(depth));
        std::memset(row + depth, 0, static_cast<size_t>(kBlockK - depth));
        int32_t sum = 0;
        for (int64_t i = 0; i < kBlockK; ++i) sum += row[i];
        colsum[c] += sum;
        for (int64_t i = 0; i < kBlockK; ++i) lowest = row[i] < lowest ? row[i] : lowest;
      } else {
        std::memset(row, 0, kBlockK);
      }
      for (int64_t i = 0; i < kDwords; ++i)
        std::memcpy(block + i * kBlockN * kPackK + c * kPackK, row + i * kPackK, kPackK);
    }
  }
  return lowest == -128;
}

}  // namespace

bool pack_w8(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* colsum, int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), block_bytes = kBlockN * padded_k(k);
  std::atomic<bool> found{false};
  parallel(threads, [&](int thread, int team) {
    const Range range = share(blocks, thread, team);
    bool mine = false;
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      mine |= pack_superblock(weight + n0 * k, columns, k, packed + b * block_bytes, colsum + n0);
    }
    if (mine) found = true;
  });
  return found;
}

void unpack_w8(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), block_bytes = kBlockN * padded_k(k);
  parallel(threads, [&](int thread, int team) {
    const Range range = share(blocks, thread, team);
    alignas(kAlign) int8_t row[kBlockK];
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
        const int64_t depth = k - k0 < kBlockK ? k - k0 : kBlockK;
        const int8_t* block = packed + b * block_bytes + k0 * kBlockN;
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t i = 0; i < kDwords; ++i)
            std::memcpy(row + i * kPackK, block + i * kBlockN * kPackK + c * kPackK, kPackK);
          std::memcpy(weight + (n0 + c) * k + k0, row, static_cast<size_t>(depth));
        }
      }
    }
  });
}

}  // namespace qk
