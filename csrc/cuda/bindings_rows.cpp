// Bindings of the kernels that compute a row before they round it, to codes or to its own dtype. Arguments as in
// bindings.cpp.
#include "bindings.h"

#include "launch.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

// Where the codes of a row go, and the grid they are on: (q, q_stride, scale, zero_point, inv_smooth, static_scale,
// static_zero_point, shifted). Empty where the rows themselves go to `y`.
QuantizeRowsArgs codes_of(Address x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, const py::tuple& codes,
                          Address y, bool dependent, bool settled) {
  QK_CHECK_GE(m, 0);
  QK_CHECK_GE(k, 1);
  QK_CHECK_EQ(codes.size(), size_t{y ? 0u : 8u});
  QuantizeRowsArgs a = {};
  a.x = pointer<const void>(x), a.x_dtype = dtype(x_dtype), a.m = m, a.k = k, a.x_stride = x_stride;
  a.dependent = dependent, a.settled = settled && m <= kSettledRows;
  if (y) return a;
  const auto address = [&](int i) { return codes[i].cast<Address>(); };
  a.q = pointer<int8_t>(address(0)), a.q_stride = codes[1].cast<int64_t>(), a.scale = pointer<float>(address(2));
  a.zero_point = pointer<int32_t>(address(3)), a.inv_smooth = pointer<const float>(address(4));
  a.is_static = address(5) != 0, a.static_scale = pointer<const float>(address(5));
  a.static_zero_point = pointer<const int32_t>(address(6));
  a.shifted = codes[7].cast<bool>();
  return a;
}

void quantize_norm_at(Address x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, const py::tuple& codes, Address y,
                      bool layer, float eps, Address residual, int64_t residual_stride, Address total, Address weight,
                      Address bias, bool wide_factors, bool dependent, bool settled, Address stream) {
  QK_CHECK_EQ(residual == 0, total == 0);
  QuantizeNormArgs a = {};
  a.codes = codes_of(x, x_dtype, m, k, x_stride, codes, y, dependent, settled);
  a.y = pointer<void>(y);
  a.layer = layer, a.eps = eps, a.residual = pointer<const void>(residual), a.residual_stride = residual_stride;
  a.total = pointer<void>(total), a.weight = pointer<const void>(weight), a.bias = pointer<const void>(bias);
  a.wide_factors = wide_factors;
  quantize_norm(a, stream_of(stream));
}

void quantize_activation_at(Address x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, const py::tuple& codes,
                            Address y, int activation, Address up, int64_t up_stride, bool dependent, bool settled,
                            Address stream) {
  QK_CHECK_GE(activation, 0);
  QK_CHECK_LE(activation, 4);
  QuantizeActivationArgs a = {};
  a.codes = codes_of(x, x_dtype, m, k, x_stride, codes, y, dependent, settled);
  a.y = pointer<void>(y);
  a.activation = static_cast<Activation>(activation), a.up = pointer<const void>(up), a.up_stride = up_stride;
  quantize_activation(a, stream_of(stream));
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("quantize_norm", &quantize_norm_at, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"),
        py::arg("x_stride"), py::arg("codes"), py::arg("y"), py::arg("layer"), py::arg("eps"), py::arg("residual"),
        py::arg("residual_stride"), py::arg("total"), py::arg("weight"), py::arg("bias"), py::arg("wide_factors"),
        py::arg("dependent"), py::arg("settled"), py::arg("stream"));
  m.def("quantize_activation", &quantize_activation_at, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"),
        py::arg("x_stride"), py::arg("codes"), py::arg("y"), py::arg("activation"), py::arg("up"), py::arg("up_stride"),
        py::arg("dependent"), py::arg("settled"), py::arg("stream"));
}

}  // namespace qk::cuda
