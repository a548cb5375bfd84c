#include <cstring>

#include "../layout.h"
#include "pack.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int64_t kLineK = 2 * kPackK;  // k of one packed line
constexpr int64_t kLineBytes = kBlockN * kPackK;

// Four canonical bytes hold k0..k7 in order; four packed bytes hold (k4:k0) (k5:k1) (k6:k2) (k7:k3).
inline uint32_t interleave(uint32_t canonical) {
  const uint32_t low = canonical & 0x0F0F0F0Fu, high = (canonical >> 4) & 0x0F0F0F0Fu;  // k0 k2 k4 k6, k1 k3 k5 k7
  const uint32_t first = (low & 0xFFu) | (high & 0xFFu) << 8 | (low & 0xFF00u) << 8 | (high & 0xFF00u) << 16;
  const uint32_t second = ((low >> 16) & 0xFFu) | ((high >> 16) & 0xFFu) << 8 | ((low >> 16) & 0xFF00u) << 8 |
                          ((high >> 16) & 0xFF00u) << 16;
  return first | second << 4;
}

inline uint32_t deinterleave(uint32_t packed) {
  const uint32_t first = packed & 0x0F0F0F0Fu, second = (packed >> 4) & 0x0F0F0F0Fu;
  const auto pairs = [](uint32_t q) {  // q0 q1 q2 q3 become q1:q0 q3:q2
    const uint32_t joined = q | q >> 4;
    return (joined & 0xFFu) | ((joined >> 8) & 0xFF00u);
  };
  return pairs(first) | pairs(second) << 16;
}

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
  const int64_t row_bytes = ceil_div(k, 2), lines = padded_k(k) / kLineK, blocks = ceil_div(n, kBlockN);
  parallel(threads, [&](int thread, int team) {
    const Range range = share(blocks, thread, team);
    for (int64_t b = range.begin; b < range.end; ++b) {
      uint8_t* block = packed + b * lines * kLineBytes;
      for (int64_t c = 0; c < kBlockN; ++c) {
        const uint8_t* row = weight + (b * kBlockN + c) * row_bytes;
        const int64_t bytes = b * kBlockN + c < n ? row_bytes : 0;
        for (int64_t l = 0; l < lines; ++l) {
          uint32_t dword = 0;
          const int64_t left = bytes - l * kPackK;
          if (left > 0) std::memcpy(&dword, row + l * kPackK, static_cast<size_t>(left < kPackK ? left : kPackK));
          if (left > 0 && left <= kPackK && k % 2) dword &= (1u << (8 * left - 4)) - 1u;  // the unused last nibble
          dword = interleave(dword);
          std::memcpy(block + l * kLineBytes + c * kPackK, &dword, kPackK);
        }
      }
    }
  });
}

void unpack_w4(const uint8_t* packed, int64_t n, int64_t k, uint8_t* weight, int threads) {
  const int64_t row_bytes = ceil_div(k, 2), lines = padded_k(k) / kLineK, blocks = ceil_div(n, kBlockN);
  parallel(threads, [&](int thread, int team) {
    const Range range = share(blocks, thread, team);
    for (int64_t b = range.begin; b < range.end; ++b) {
      const uint8_t* block = packed + b * lines * kLineBytes;
      for (int64_t c = 0; c < kBlockN && b * kBlockN + c < n; ++c) {
        uint8_t* row = weight + (b * kBlockN + c) * row_bytes;
        for (int64_t i = 0; i < row_bytes; i += kPackK) {
          uint32_t dword;
          std::memcpy(&dword, block + i / kPackK * kLineBytes + c * kPackK, kPackK);
          dword = deinterleave(dword);
          std::memcpy(row + i, &dword, static_cast<size_t>(row_bytes - i < kPackK ? row_bytes - i : kPackK));
        }
      }
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
