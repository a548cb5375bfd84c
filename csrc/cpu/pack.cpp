#include "pack.h"

#include <atomic>
#include <cstring>

#include "../layout.h"
#include "threads.h"

namespace qk {
namespace {

// Bytes of a row that are read before the next row's turn: whole cache lines, one after the other, so that rows whose
// distance is a power of two do not push each other out of the cache. The packed block of 64 such pieces is 16 KiB.
constexpr int64_t kPiece = 256;

struct Dwords {
  uint32_t v[4];
};

// Four rows of four dwords become four dwords of four columns.
inline void transpose(const int8_t* const rows[4], int64_t at, int8_t* out) {
  Dwords r[4], t[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows[i] + at, sizeof(Dwords));
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) t[i].v[j] = r[j].v[i];
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * kBlockN * kPackK, &t[i], sizeof(Dwords));
}

// Packs one 64-column superblock. Returns whether a -128 occurs.
bool pack_superblock(const int8_t* weight, int64_t columns, int64_t k, int8_t* packed, int32_t* colsum) {
  alignas(kAlign) int8_t tail[4][kPiece];
  uint8_t found = 0;
  for (int64_t c = 0; c < columns; ++c) colsum[c] = 0;
  for (int64_t k0 = 0; k0 < k; k0 += kPiece) {
    const int64_t depth = k - k0 < kPiece ? k - k0 : kPiece, padded = padded_k(depth);
    for (int64_t c0 = 0; c0 < kBlockN; c0 += 4) {
      const int8_t* rows[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t c = c0 + i;
        rows[i] = weight + c * k + k0;
        if (c < columns) {
          int32_t sum = 0;
          uint8_t lowest = 0;
          for (int64_t j = 0; j < depth; ++j) {
            sum += rows[i][j];
            lowest |= static_cast<uint8_t>(rows[i][j] == -128);
          }
          colsum[c] += sum;
          found |= lowest;
        }
        if (c >= columns || depth < padded) {  // zero padding, and no read past the end of the weight
          std::memset(tail[i], 0, kPiece);
          if (c < columns) std::memcpy(tail[i], rows[i], static_cast<size_t>(depth));
          rows[i] = tail[i];
        }
      }
      int8_t* out = packed + k0 * kBlockN + c0 * kPackK;
      for (int64_t j = 0; j < padded; j += 16) transpose(rows, j, out + j * kBlockN);
    }
  }
  return found != 0;
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
          for (int64_t i = 0; i < kBlockK / kPackK; ++i)
            std::memcpy(row + i * kPackK, block + i * kBlockN * kPackK + c * kPackK, kPackK);
          std::memcpy(weight + (n0 + c) * k + k0, row, static_cast<size_t>(depth));
        }
      }
    }
  });
}

}  // namespace qk
