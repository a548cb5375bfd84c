// Canonical [N, K] int8 weights to and from the packed layout of layout.h.
#pragma once

#include <cstdint>

namespace qk {

// Writes the packed weight and colsum [N]; returns whether a -128 occurs. packed must be 64-byte aligned.
bool pack_w8(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* colsum, int threads);
void unpack_w8(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, int threads);

// Canonical uint8 [N, ceil(K / 2)], low nibble first, to and from the packed int4 layout.
void pack_w4(const uint8_t* weight, int64_t n, int64_t k, uint8_t* packed, int threads);
void unpack_w4(const uint8_t* packed, int64_t n, int64_t k, uint8_t* weight, int threads);

// [N, groups] elements of 1, 2 or 4 bytes to and from [N/64][groups][64].
void pack_groups(const void* source, int64_t bytes, int64_t n, int64_t groups, void* packed);
void unpack_groups(const void* packed, int64_t bytes, int64_t n, int64_t groups, void* target);

}  // namespace qk
