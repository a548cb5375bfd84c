// What the binding files of qkernels._cuda share, beside binding_helpers.h.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "binding_helpers.h"
#include "w4.h"
#include "w8a8.h"

namespace qk::cuda {

using Address = uintptr_t;

inline cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline W8Layout w8_layout(int value) {
  QK_CHECK_GE(value, static_cast<int>(W8Layout::kRows));
  QK_CHECK_LE(value, static_cast<int>(W8Layout::kPairs));
  return static_cast<W8Layout>(value);
}

// A W4Plan in Python: (kernel, tokens, phases, ctas, counters, partial sums), and channels and tokens of a head.
W4Plan plan_of(const pybind11::tuple& v);
pybind11::tuple tuple_of(const W4Plan& p);

void bind_w4(pybind11::module_& m);  // 4-bit weights
void bind_w8a16(pybind11::module_& m);  // 8-bit weights, floating-point activations
void bind_rows(pybind11::module_& m);  // rows computed before they are quantized
void bind_attention(pybind11::module_& m);  // between the Linears of an attention block

}  // namespace qk::cuda
