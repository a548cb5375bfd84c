// Canonical [N, K] int8 weights to and from the packed layout of layout.h.
#pragma once

#include <cstdint>

namespace qk {

// Writes the packed weight and colsum [N]; returns whether a -128 occurs. packed must be 64-byte aligned.
bool pack_w8(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* colsum, int threads);
void unpack_w8(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, int threads);

}  // namespace qk
