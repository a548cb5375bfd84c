// 8-bit weights under floating-point activations, and tables of 8-bit rows; rules as in bindings.cpp.
#include "bindings.h"

#include "bindings_layers.h"
#include "w8a16.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

void check_sizes(Address packed, int64_t slab_rows, int64_t n, int64_t k) {
  QK_CHECK_GE(n, 1);
  QK_CHECK_LE(n, int64_t{0x7fffff00});
  QK_CHECK_GE(k, 1);
  QK_CHECK_LE(k, int64_t{0x7fffff00});
  QK_CHECK_EQ(packed % 16, Address{0});
  if (packed) {
    QK_CHECK_GE(slab_rows, packed_rows(n));
    QK_CHECK_EQ(slab_rows % kAtomRows, int64_t{0});
  }
}

// What a layer keeps.
GemmW8A16Args weight_w8a16(Address packed, int64_t slab_rows, Address weight_scale, Address bias, int64_t n,
                           int64_t k) {
  check_sizes(packed, slab_rows, n, k);
  GemmW8A16Args a = {};
  a.packed = pointer<const int8_t>(packed), a.slab_rows = slab_rows;
  a.weight_scale = pointer<const float>(weight_scale), a.bias = pointer<const float>(bias);
  a.n = static_cast<int32_t>(n), a.k = static_cast<int32_t>(k);
  return a;
}

void gemm_at(Address x, int x_dtype, int64_t m, int64_t x_stride, Address packed, int64_t slab_rows,
             Address weight_scale, Address bias, int64_t n, int64_t k, Address y, int y_dtype, int64_t y_stride,
             const py::tuple& plan, Address counters, Address partials, bool dependent, Address stream) {
  GemmW8A16Args a = weight_w8a16(packed, slab_rows, weight_scale, bias, n, k);
  put_floats(a, x, x_dtype, m, x_stride, y, y_dtype, y_stride, counters, partials);
  QK_CHECK_LE(m * n, int64_t{1} << 37);  // a grid of tiles of at least 128
  gemm_w8a16(a, plan_of(plan), dependent, stream_of(stream));
}

void gather_at(Address table, int layout, int64_t slab_rows, Address scale, int64_t n, int64_t k, Address ids,
               bool wide_ids, int64_t first, int64_t count, Address out, int out_dtype, Address stream) {
  const W8Layout order = w8_layout(layout);
  check_sizes(order == W8Layout::kRows ? 0 : table, slab_rows, n, k);
  QK_CHECK_GE(count, 0);
  GatherW8Args a = {};
  a.table = pointer<const int8_t>(table), a.layout = order, a.slab_rows = slab_rows;
  a.scale = pointer<const float>(scale);
  a.n = static_cast<int32_t>(n), a.k = static_cast<int32_t>(k);
  a.ids = pointer<const void>(ids), a.wide_ids = wide_ids, a.first = first, a.count = count;
  a.out = pointer<void>(out), a.out_dtype = dtype(out_dtype);
  gather_w8(a, stream_of(stream));
}

}  // namespace

void bind_w8a16(py::module_& m) {
  bind_floats<GemmW8A16Args>(m, "LinearW8A16")
      .def(py::init([](Address packed, int64_t slab_rows, Address weight_scale, Address bias, int64_t n, int64_t k) {
             return FloatLayer<GemmW8A16Args>(weight_w8a16(packed, slab_rows, weight_scale, bias, n, k));
           }),
           py::arg("packed"), py::arg("slab_rows"), py::arg("weight_scale"), py::arg("bias"), py::arg("n"),
           py::arg("k"));
  m.def(
      "plan_w8a16",
      [](int64_t rows, int64_t n, int64_t k, int capability, int sms) {
        return tuple_of(plan_w8a16(rows, n, k, capability, sms));
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("capability"), py::arg("sms"));
  m.def("gemm_w8a16", &gemm_at, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("x_stride"), py::arg("packed"),
        py::arg("slab_rows"), py::arg("weight_scale"), py::arg("bias"), py::arg("n"), py::arg("k"), py::arg("y"),
        py::arg("y_dtype"), py::arg("y_stride"), py::arg("plan"), py::arg("counters"), py::arg("partials"),
        py::arg("dependent"), py::arg("stream"));
  m.def("gather_w8", &gather_at, py::arg("table"), py::arg("layout"), py::arg("slab_rows"), py::arg("scale"),
        py::arg("n"), py::arg("k"), py::arg("ids"), py::arg("wide_ids"), py::arg("first"), py::arg("count"),
        py::arg("out"), py::arg("out_dtype"), py::arg("stream"));
}

}  // namespace qk::cuda
