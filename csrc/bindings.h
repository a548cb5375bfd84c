// The parts of the Python module _C that have a file of their own.
#pragma once

#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& m);  // bindings_attention.cpp: Attention, Rotary
void bind_held(pybind11::module_& m);  // bindings_held.cpp: what a layer still holds
void bind_w4(pybind11::module_& m);  // bindings_w4.cpp: int4 packing, LinearW4A8
void bind_weight_only(pybind11::module_& m);  // bindings_weight_only.cpp: LinearW8A16, LinearW4A16
