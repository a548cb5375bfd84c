#include "../layout.h"
#include "pack.h"
#include "pack_tile.h"
#include "team.h"

namespace qk {
namespace {

template <class Element>
void pack_groups_of(const Element* source, int64_t n, int64_t groups, Element* packed) {
  for (int64_t c = 0; c < round_up(n, kBlockN); ++c)
    for (int64_t g = 0; g < groups; ++g)
      packed[(c / kBlockN * groups + g) * kBlockN + c % kBlockN] = c < n ? source[c * groups + g] : Element{};
}

template <class Element>
void unpack_groups_of(const Element* packed, int64_t n, int64_t groups, Element* target) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t g = 0; g < groups; ++g)
      target[c * groups + g] = packed[(c / kBlockN * groups + g) * kBlockN + c % kBlockN];
}

}  // namespace

void pack_w4(const uint8_t* weight, int64_t n, int64_t k, uint8_t* packed, int threads) {
  const int64_t row_bytes = ceil_div(k, 2), padded = padded_k(k) / 2, blocks = ceil_div(n, kBlockN);
  const uint8_t last_mask = k % 2 ? 0x0F : 0xFF;  // the last nibble of an odd K is nobody's
  parallel_pieces(threads, conversion(blocks, kBlockN * 2 * padded), [&](Range range) {
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      pack_superblock(weight + n0 * row_bytes, row_bytes, columns, padded, last_mask, packed + n0 * padded,
                      [](PackTile& tile, int64_t) { tile.interleave(); });
    }
  });
}

void unpack_w4(const uint8_t* packed, int64_t n, int64_t k, uint8_t* weight, int threads) {
  const int64_t row_bytes = ceil_div(k, 2), padded = padded_k(k) / 2, blocks = ceil_div(n, kBlockN);
  parallel_pieces(threads, conversion(blocks, kBlockN * 2 * padded), [&](Range range) {
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t n0 = b * kBlockN, columns = n - n0 < kBlockN ? n - n0 : kBlockN;
      unpack_superblock(packed + n0 * padded, row_bytes, columns, padded, weight + n0 * row_bytes,
                        [](PackTile& tile) { tile.deinterleave(); });
    }
  });
}

void pack_groups(const void* source, int64_t bytes, int64_t n, int64_t groups, void* packed) {
  if (bytes == 1)
    pack_groups_of(static_cast<const uint8_t*>(source), n, groups, static_cast<uint8_t*>(packed));
  else if (bytes == 2)
    pack_groups_of(static_cast<const uint16_t*>(source), n, groups, static_cast<uint16_t*>(packed));
  else
    pack_groups_of(static_cast<const uint32_t*>(source), n, groups, static_cast<uint32_t*>(packed));
}

void unpack_groups(const void* packed, int64_t bytes, int64_t n, int64_t groups, void* target) {
  if (bytes == 1)
    unpack_groups_of(static_cast<const uint8_t*>(packed), n, groups, static_cast<uint8_t*>(target));
  else if (bytes == 2)
    unpack_groups_of(static_cast<const uint16_t*>(packed), n, groups, static_cast<uint16_t*>(target));
  else
    unpack_groups_of(static_cast<const uint32_t*>(packed), n, groups, static_cast<uint32_t*>(target));
}

}  // namespace qk
