// What the checks of smoke.cpp share: failures and their number, buffers without room to spare, floats of any dtype.
#pragma once

#include <cstdio>
#include <memory>
#include <new>
#include <string>

#include "../layout.h"
#include "contract.h"

namespace {

using qk::DType;

int failures = 0;
int64_t checks = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(qk::kAlign)); }
};

template <class T>
std::unique_ptr<T, FreeAligned> aligned(int64_t bytes) {
  return std::unique_ptr<T, FreeAligned>(
      static_cast<T*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(qk::kAlign))));
}

size_t slack = 0;  // bytes

template <class T>
std::vector<T> buffer(int64_t count, T fill = T()) {
  std::vector<T> result;
  result.reserve(static_cast<size_t>(count) + slack / sizeof(T));
  result.resize(static_cast<size_t>(count), fill);
  return result;
}

int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

void store(DType dtype, void* base, int64_t at, float value) {
  if (dtype == DType::kF32)
    static_cast<float*>(base)[at] = value;
  else
    static_cast<uint16_t*>(base)[at] = dtype == DType::kBF16 ? contract::to_bf16(value) : contract::to_f16(value);
}

float load(DType dtype, const void* base, int64_t at) {
  if (dtype == DType::kF32) return static_cast<const float*>(base)[at];
  const uint16_t half = static_cast<const uint16_t*>(base)[at];
  return dtype == DType::kBF16 ? contract::from_bf16(half) : contract::from_f16(half);
}

// Equal to the last bit; any NaN equals any other.
bool same(DType dtype, const void* base, int64_t at, float expected) {
  const float got = load(dtype, base, at);
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  if (dtype == DType::kF32) return contract::bits_of_float(got) == contract::bits_of_float(expected);
  const uint16_t half = dtype == DType::kBF16 ? contract::to_bf16(expected) : contract::to_f16(expected);
  return static_cast<const uint16_t*>(base)[at] == half;
}

}  // namespace
