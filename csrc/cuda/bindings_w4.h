// The part of qkernels._cuda that is about 4-bit weights.
#pragma once

#include <pybind11/pybind11.h>

namespace qk::cuda {

void bind_w4(pybind11::module_& m);

}  // namespace qk::cuda
