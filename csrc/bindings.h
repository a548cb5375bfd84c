// The parts of the Python module _C that have a file of their own.
#pragma once

#include <pybind11/pybind11.h>

void bind_w4(pybind11::module_& m);  // bindings_w4.cpp: int4 packing, LinearW4A8
