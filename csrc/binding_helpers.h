// What the binding files share: pointers from Python integers, codes to enums, the GIL, the calling thread's workspace.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <new>
#include <string>

#include "args.h"
#include "check.h"
#include "cpu/pages.h"
#include "layout.h"

namespace qk {

// Work above this takes longer than about 10 us, so other Python threads may run meanwhile.
constexpr int64_t kReleaseGilBytes = 256 << 10;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype(int code) {
  QK_CHECK_GE(code, 0);
  QK_CHECK_LE(code, 2);
  return static_cast<DType>(code);
}

inline QKind kind(int code) {
  QK_CHECK_GE(code, 0);
  QK_CHECK_LE(code, 2);
  return static_cast<QKind>(code);
}

inline Activation activation(int code) {
  QK_CHECK_GE(code, 0);
  QK_CHECK_LE(code, 4);
  return static_cast<Activation>(code);
}

inline ResidualArgs residual(uintptr_t rows, int64_t stride) { return {pointer<const void>(rows), stride}; }

template <class Call>
void run_released(bool release, const Call& call) {
  if (!release) return call();
  pybind11::gil_scoped_release released;
  call();
}

// What expect_output asks for, for m rows of a layer's output.
template <class Args>
void expect_rows(const Args& args, int64_t m, int threads) {
  const int64_t elements = m > 0 ? (m - 1) * args.y_stride + args.n : 0;
  expect_output(args.y, elements * (args.y_dtype == DType::kF32 ? 4 : 2), threads);
}

inline thread_local std::string last_kernel;  // "op.tier" of the newest call on this thread

inline void note(const char* op, const char* isa) { (last_kernel = op).append(".").append(isa); }

// Workspace of the calling thread; grows and is kept, so that a forward pass allocates nothing. From 2 MB on in huge
// pages: AMX tiles of a product walk through more small ones than the processor remembers.
inline uint8_t* scratch(int64_t bytes) {
  struct Free {
    std::align_val_t alignment;
    void operator()(uint8_t* p) const { ::operator delete(p, alignment); }
  };
  thread_local std::unique_ptr<uint8_t, Free> buffer(nullptr, Free{});
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    capacity = 0;
    const int64_t unit = bytes < kHugePage ? kAlign : kHugePage, size = round_up(bytes, unit);
    const std::align_val_t alignment{static_cast<size_t>(unit)};
    buffer = {static_cast<uint8_t*>(::operator new(static_cast<size_t>(size), alignment)), Free{alignment}};
    capacity = size;
    if (unit == kHugePage) ask_for_huge_pages(buffer.get(), size);
  }
  return buffer.get();
}

}  // namespace qk
