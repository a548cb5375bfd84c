// What packing is made of: four rows of 16 bytes that become four lines of four columns, and the walk over a weight.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../layout.h"

namespace qk {
namespace {

constexpr int64_t kLineBytes = kBlockN * kPackK;

// Bytes of a row that are read before the next row's turn: whole cache lines, one after the other, so that rows whose
// distance is a power of two do not push each other out of the cache. The packed block of 64 such pieces is 16 KiB.
constexpr int64_t kPiece = 256;

// What is learnt of a row of int8 on the way.
struct RowFacts {
  int32_t sum = 0;
  bool minus128 = false;
};

#if defined(__SSE2__)

// SSE2 is part of every x86-64, so this needs no flags and no dispatch.
struct PackTile {
  __m128i v[4];

  void load_rows(const uint8_t* const rows[4], int64_t at) {
    for (int i = 0; i < 4; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at));
  }
  void store_rows(uint8_t* const rows[4], int64_t at) const {
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(rows[i] + at), v[i]);
  }
  void load_lines(const uint8_t* lines) {
    for (int i = 0; i < 4; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + i * kLineBytes));
  }
  void store_lines(uint8_t* lines) const {
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(lines + i * kLineBytes), v[i]);
  }

  // Dword j of row i becomes dword i of row j.
  void transpose() {
    const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpacklo_epi32(v[2], v[3]),
                  c = _mm_unpackhi_epi32(v[0], v[1]), d = _mm_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm_unpacklo_epi64(a, b);
    v[1] = _mm_unpackhi_epi64(a, b);
    v[2] = _mm_unpacklo_epi64(c, d);
    v[3] = _mm_unpackhi_epi64(c, d);
  }

  // In each dword, nibbles k0..k7 in order become the bytes (k4:k0) (k5:k1) (k6:k2) (k7:k3).
  void interleave() {
    const __m128i nibble = _mm_set1_epi8(15);
    for (__m128i& x : v) {
      const __m128i even = _mm_and_si128(x, nibble), odd = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
      const __m128 a = _mm_castsi128_ps(_mm_unpacklo_epi8(even, odd)),  // k0..k3, k4..k7 of two dwords
          b = _mm_castsi128_ps(_mm_unpackhi_epi8(even, odd));  // of the other two
      const __m128i first = _mm_castps_si128(_mm_shuffle_ps(a, b, 0x88)),
                    second = _mm_castps_si128(_mm_shuffle_ps(a, b, 0xDD));
      x = _mm_or_si128(first, _mm_slli_epi16(second, 4));
    }
  }
  void deinterleave() {
    const __m128i nibble = _mm_set1_epi8(15), low = _mm_set1_epi16(255);
    const auto pairs = [&](__m128i q) {  // bytes k0 k1 become the byte k1:k0
      return _mm_and_si128(_mm_or_si128(q, _mm_srli_epi16(q, 4)), low);
    };
    for (__m128i& x : v) {
      const __m128i first = _mm_and_si128(x, nibble), second = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
      x = _mm_packus_epi16(pairs(_mm_unpacklo_epi32(first, second)), pairs(_mm_unpackhi_epi32(first, second)));
    }
  }
};

// psadbw sums unsigned bytes, so the sign bit is turned over and 128 a byte taken off at the end.
class Facts {
 public:
  void see(const PackTile& tile) {
    const __m128i flip = _mm_set1_epi8(static_cast<char>(0x80));
    for (int i = 0; i < 4; ++i) {
      sums_[i] = _mm_add_epi64(sums_[i], _mm_sad_epu8(_mm_xor_si128(tile.v[i], flip), _mm_setzero_si128()));
      found_[i] = _mm_or_si128(found_[i], _mm_cmpeq_epi8(tile.v[i], flip));
    }
  }
  RowFacts row(int i, int64_t bytes) const {
    const int64_t sum = _mm_cvtsi128_si64(sums_[i]) + _mm_cvtsi128_si64(_mm_unpackhi_epi64(sums_[i], sums_[i]));
    return {static_cast<int32_t>(sum - 128 * bytes), _mm_movemask_epi8(found_[i]) != 0};
  }

 private:
  __m128i sums_[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
  __m128i found_[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
};

#else

struct PackTile {
  uint8_t v[4][16];

  void load_rows(const uint8_t* const rows[4], int64_t at) {
    for (int i = 0; i < 4; ++i) std::memcpy(v[i], rows[i] + at, 16);
  }
  void store_rows(uint8_t* const rows[4], int64_t at) const {
    for (int i = 0; i < 4; ++i) std::memcpy(rows[i] + at, v[i], 16);
  }
  void load_lines(const uint8_t* lines) {
    for (int i = 0; i < 4; ++i) std::memcpy(v[i], lines + i * kLineBytes, 16);
  }
  void store_lines(uint8_t* lines) const {
    for (int i = 0; i < 4; ++i) std::memcpy(lines + i * kLineBytes, v[i], 16);
  }

  void transpose() {
    uint8_t t[4][16];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) std::memcpy(t[j] + 4 * i, v[i] + 4 * j, 4);
    std::memcpy(v, t, sizeof(t));
  }
  void interleave() {
    for (auto& x : v)
      for (int d = 0; d < 16; d += 4) {
        uint8_t k[8];
        for (int i = 0; i < 4; ++i) k[2 * i] = x[d + i] & 15, k[2 * i + 1] = x[d + i] >> 4;
        for (int i = 0; i < 4; ++i) x[d + i] = static_cast<uint8_t>(k[i] | k[i + 4] << 4);
      }
  }
  void deinterleave() {
    for (auto& x : v)
      for (int d = 0; d < 16; d += 4) {
        uint8_t k[8];
        for (int i = 0; i < 4; ++i) k[i] = x[d + i] & 15, k[i + 4] = x[d + i] >> 4;
        for (int i = 0; i < 4; ++i) x[d + i] = static_cast<uint8_t>(k[2 * i] | k[2 * i + 1] << 4);
      }
  }
};

class Facts {
 public:
  void see(const PackTile& tile) {
    for (int i = 0; i < 4; ++i)
      for (uint8_t byte : tile.v[i]) {
        rows_[i].sum += static_cast<int8_t>(byte);
        rows_[i].minus128 |= byte == 0x80;
      }
  }
  RowFacts row(int i, int64_t /*bytes*/) const { return rows_[i]; }

 private:
  RowFacts rows_[4];
};

#endif

// Calls transform(tile, column) for every four columns x 16 bytes of a superblock and writes what comes out as lines.
// weight: `columns` rows of row_bytes; beyond them, and up to padded_bytes, there are zeros. last_mask is for the last
// byte of a row.
template <class Transform>
void pack_superblock(const uint8_t* weight, int64_t row_bytes, int64_t columns, int64_t padded_bytes, uint8_t last_mask,
                     uint8_t* packed, const Transform& transform) {
  alignas(kAlign) uint8_t tail[4][kPiece];
  for (int64_t at = 0; at < padded_bytes; at += kPiece) {
    const int64_t padded = padded_bytes - at < kPiece ? padded_bytes - at : kPiece;
    const int64_t bytes = row_bytes - at < padded ? row_bytes - at : padded;
    const bool masked = last_mask != 0xFF && at + bytes == row_bytes;
    for (int64_t c0 = 0; c0 < kBlockN; c0 += 4) {
      const uint8_t* rows[4];
      for (int64_t i = 0; i < 4; ++i) {
        rows[i] = weight + (c0 + i) * row_bytes + at;
        if (c0 + i >= columns || bytes < padded || masked) {  // no read past the end of the weight
          std::memset(tail[i], 0, kPiece);
          if (c0 + i < columns && bytes > 0) {
            std::memcpy(tail[i], rows[i], static_cast<size_t>(bytes));
            if (masked) tail[i][bytes - 1] &= last_mask;
          }
          rows[i] = tail[i];
        }
      }
      uint8_t* out = packed + at / kPackK * kLineBytes + c0 * kPackK;
      for (int64_t j = 0; j < padded; j += 16) {
        PackTile tile;
        tile.load_rows(rows, j);
        transform(tile, c0);
        tile.transpose();
        tile.store_lines(out + j / kPackK * kLineBytes);
      }
    }
  }
}

// The way back: transform(tile) makes rows of what were lines.
template <class Transform>
void unpack_superblock(const uint8_t* packed, int64_t row_bytes, int64_t columns, int64_t padded_bytes, uint8_t* weight,
                       const Transform& transform) {
  alignas(kAlign) uint8_t tail[4][kPiece];
  for (int64_t at = 0; at < row_bytes; at += kPiece) {
    const int64_t padded = padded_bytes - at < kPiece ? padded_bytes - at : kPiece;
    const int64_t bytes = row_bytes - at < padded ? row_bytes - at : padded;
    for (int64_t c0 = 0; c0 < columns; c0 += 4) {
      const bool whole = c0 + 4 <= columns && bytes == padded;
      uint8_t* rows[4];
      for (int64_t i = 0; i < 4; ++i) rows[i] = whole ? weight + (c0 + i) * row_bytes + at : tail[i];
      const uint8_t* in = packed + at / kPackK * kLineBytes + c0 * kPackK;
      for (int64_t j = 0; j < padded; j += 16) {
        PackTile tile;
        tile.load_lines(in + j / kPackK * kLineBytes);
        tile.transpose();
        transform(tile);
        tile.store_rows(rows, j);
      }
      for (int64_t i = 0; !whole && i < 4 && c0 + i < columns; ++i)
        std::memcpy(weight + (c0 + i) * row_bytes + at, tail[i], static_cast<size_t>(bytes));
    }
  }
}

}  // namespace
}  // namespace qk
