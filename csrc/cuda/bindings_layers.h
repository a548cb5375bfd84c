// Layers as objects: what stays is checked and turned into pointers once, a call brings its rows. The Python owner
// keeps the tensors alive and makes a new object when they move.
#pragma once

#include "bindings.h"
#include "launch.h"
#include "launch_w4.h"
#include "w8a16.h"

namespace qk::cuda {

inline void put_rows(int64_t m, int32_t& rows) {
  QK_CHECK_GE(m, 0);
  QK_CHECK_LE(m, int64_t{0x7fffff00});
  rows = static_cast<int32_t>(m);
}

// 16-bit activations: Args is GemmW4A16Args or GemmW8A16Args.
template <typename Args>
void put_floats(Args& a, Address x, int x_dtype, int64_t m, int64_t x_stride, Address y, int y_dtype, int64_t y_stride,
                Address counters, Address partials) {
  put_rows(m, a.m);
  QK_CHECK_EQ(x % 16, Address{0});
  QK_CHECK_EQ(x_stride % 8, 0);
  QK_CHECK_GE(x_dtype, 1);
  a.x = pointer<const void>(x), a.x_dtype = dtype(x_dtype), a.x_stride = x_stride;
  a.y = pointer<void>(y), a.y_dtype = dtype(y_dtype), a.y_stride = y_stride;
  a.counters = pointer<int32_t>(counters), a.partials = pointer<float>(partials);
}

// 8-bit activations: Args is GemmW8A8Args or GemmW4A8Args.
template <typename Args>
void put_codes(Args& a, Address xq, int64_t m, int64_t x_stride, Address x_scale, Address x_zero_point, Address y,
               int y_dtype, int64_t y_stride) {
  put_rows(m, a.m);
  QK_CHECK_EQ(xq % 16, Address{0});
  QK_CHECK_EQ(x_stride % 16, 0);
  a.xq = pointer<const int8_t>(xq), a.x_stride = x_stride, a.x_scale = pointer<const float>(x_scale);
  a.x_zero_point = pointer<const int32_t>(x_zero_point);
  a.y = pointer<void>(y), a.y_dtype = dtype(y_dtype), a.y_stride = y_stride;
}

inline int64_t channels_of(const GemmW8A8Args& a) { return a.n; }
inline int64_t channels_of(const GemmW8A16Args& a) { return a.n; }
template <typename Args>
int64_t channels_of(const Args& a) {
  return a.weight.n;
}
inline int64_t features_of(const GemmW8A8Args& a) { return a.k; }
template <typename Args>
int64_t features_of(const Args& a) {
  return a.weight.k;
}

inline W4Plan plan_of(const GemmW4A16Args& a, int64_t m) {
  return plan_w4a16(m, a.weight.n, a.weight.k, a.weight.kind, device_capability(), multiprocessors());
}
inline W4Plan plan_of(const GemmW8A16Args& a, int64_t m) {
  return plan_w8a16(m, a.n, a.k, device_capability(), multiprocessors());
}
inline void multiply(const GemmW4A16Args& a, const W4Plan& plan, cudaStream_t s) { gemm_w4a16(a, plan, true, s); }
inline void multiply(const GemmW8A16Args& a, const W4Plan& plan, cudaStream_t s) { gemm_w8a16(a, plan, true, s); }

// A layer that multiplies 16-bit floats.
template <typename Args>
class FloatLayer {
 public:
  explicit FloatLayer(const Args& args) : args_(args) {}

  // Counters and partial sums that `run` is to be given for so many rows.
  pybind11::tuple needs(int64_t m) const {
    const W4Plan plan = plan_of(args_, m);
    return pybind11::make_tuple(plan.counters, plan.partial_floats);
  }

  void run(Address x, int x_dtype, int64_t m, int64_t x_stride, Address y, Address counters, Address partials,
           Address stream) const {
    Args a = args_;
    put_floats(a, x, x_dtype, m, x_stride, y, x_dtype, channels_of(a), counters, partials);
    multiply(a, plan_of(a, m), stream_of(stream));
  }

 private:
  Args args_;
};

// Where the codes of m rows lie in one piece of memory, 16-byte aligned:
//   q [M, activation_stride(K)] bytes, scale [M] fp32, zero_point [M] int32 (asymmetric grids only)
inline int64_t workspace_bytes(int64_t m, int64_t k) { return m * (activation_stride(k) + 8); }

// How a layer's inputs are quantized; the rest of QuantizeRowsArgs is a call's.
QuantizeRowsArgs grid_of(bool symmetric, Address inv_smooth, Address static_scale, Address static_zero_point);

void multiply(const GemmW8A8Args& a, int capability, cudaStream_t stream);
void multiply(const GemmW4A8Args& a, int capability, cudaStream_t stream);

// A layer that multiplies 8-bit integers.
template <typename Args>
class CodeLayer {
 public:
  // `settled`: no kernel still writes the weight.
  CodeLayer(const Args& args, bool symmetric, Address inv_smooth, Address static_scale, Address static_zero_point,
            bool settled)
      : args_(args), symmetric_(symmetric), grid_(grid_of(symmetric, inv_smooth, static_scale, static_zero_point)) {
    grid_.settled = settled;
  }

  // Quantizes into `workspace`, then multiplies.
  void run(Address x, int x_dtype, int64_t m, int64_t x_stride, Address workspace, Address y, int y_dtype,
           Address stream) const {
    const int capability = device_capability();
    Args a = args_;
    put_workspace(a, workspace, m, y, y_dtype);
    QuantizeRowsArgs g = grid_;
    g.x = pointer<const void>(x), g.x_dtype = dtype(x_dtype), g.m = m, g.k = features_of(a), g.x_stride = x_stride;
    g.q = pointer<int8_t>(workspace), g.q_stride = a.x_stride, g.scale = const_cast<float*>(a.x_scale);
    g.zero_point = const_cast<int32_t*>(a.x_zero_point);
    g.dependent = capability >= 90, g.settled = g.settled && m <= kSettledRows;
    quantize_rows(g, stream_of(stream));
    multiply(a, capability, stream_of(stream));
  }

  // Multiplies what a kernel before this quantized into `workspace`.
  void product(Address workspace, int64_t m, Address y, int y_dtype, Address stream) const {
    Args a = args_;
    put_workspace(a, workspace, m, y, y_dtype);
    multiply(a, device_capability(), stream_of(stream));
  }

 private:
  void put_workspace(Args& a, Address workspace, int64_t m, Address y, int y_dtype) const {
    const int64_t q_stride = activation_stride(features_of(a));
    const Address scale = workspace + static_cast<Address>(m * q_stride);
    const Address zero_point = symmetric_ ? 0 : scale + static_cast<Address>(m * 4);
    put_codes(a, workspace, m, q_stride, scale, zero_point, y, y_dtype, channels_of(a));
  }

  Args args_;
  bool symmetric_;
  QuantizeRowsArgs grid_;
};

template <typename Args>
auto bind_floats(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  return py::class_<FloatLayer<Args>>(m, name)
      .def("needs", &FloatLayer<Args>::needs, py::arg("m"))
      .def("run", &FloatLayer<Args>::run, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("x_stride"),
           py::arg("y"), py::arg("counters"), py::arg("partials"), py::arg("stream"));
}

template <typename Args>
auto bind_codes(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  return py::class_<CodeLayer<Args>>(m, name)
      .def("run", &CodeLayer<Args>::run, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("x_stride"),
           py::arg("workspace"), py::arg("y"), py::arg("y_dtype"), py::arg("stream"))
      .def("product", &CodeLayer<Args>::product, py::arg("workspace"), py::arg("m"), py::arg("y"), py::arg("y_dtype"),
           py::arg("stream"));
}

}  // namespace qk::cuda
