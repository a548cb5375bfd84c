// int4 packing and LinearW4A8 of the Python module.
#include "binding_helpers.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"

namespace py = pybind11;
using qk::pointer;

namespace {

qk::ScaleType scale_type(int code) {
  if (code != 0) QK_CHECK_EQ(code, 2);
  return static_cast<qk::ScaleType>(code);
}

// Borrowed pointers, as LinearW8A8: the Python owner keeps the tensors alive and makes a new object when they move.
class LinearW4A8 {
 public:
  LinearW4A8(uintptr_t packed, uintptr_t weight_scale, uintptr_t weight_zero_point, uintptr_t weight_min,
             uintptr_t weight_multiplier, int scale_code, uintptr_t bias, int64_t n, int64_t k, int64_t group_size,
             bool act_symmetric, float act_scale, int32_t act_zero_point, uintptr_t inv_smooth, int function) {
    QK_CHECK_GE(n, 0);
    QK_CHECK_GE(k, 0);
    QK_CHECK_LE(k, qk::kMaxK);
    QK_CHECK_GE(group_size, 1);
    if (group_size < k) QK_CHECK_EQ(group_size % 8, 0);
    QK_CHECK_EQ(packed % qk::kAlign, 0u);
    args_.packed = pointer<const uint8_t>(packed);
    args_.weight_scale = pointer<const void>(weight_scale);
    args_.weight_zero_point = pointer<const uint8_t>(weight_zero_point);
    args_.weight_min = pointer<const void>(weight_min);
    args_.weight_multiplier = pointer<const uint8_t>(weight_multiplier);
    args_.scale_type = scale_type(scale_code);
    if (weight_multiplier) {
      QK_CHECK_EQ(scale_code, 0);
      QK_CHECK_EQ(weight_min, 0u);
    }
    args_.bias = pointer<const float>(bias);
    args_.n = n;
    args_.k = k;
    args_.group_size = group_size;
    args_.function = qk::activation(function);
    args_.act.symmetric = act_symmetric;
    args_.act.scale = act_scale;
    args_.act.zero_point = act_zero_point;
    args_.act.inv_smooth = pointer<const float>(inv_smooth);
  }

  void run(uintptr_t x, int x_dtype, int64_t m, int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride,
           int threads) const {
    run_plus(x, x_dtype, m, x_stride, y, y_dtype, y_stride, threads, 0, 0);
  }

  void run_plus(uintptr_t x, int x_dtype, int64_t m, int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride,
                int threads, uintptr_t residual, int64_t residual_stride) const {
    QK_CHECK_GE(m, 0);
    QK_CHECK_GE(threads, 1);
    qk::LinearW4A8Args args = args_;
    args.act.x = pointer<const void>(x);
    args.act.x_dtype = qk::dtype(x_dtype);
    args.act.x_stride = x_stride;
    args.m = m;
    args.y = pointer<void>(y);
    args.y_dtype = qk::dtype(y_dtype);
    args.y_stride = y_stride;
    args.residual = qk::residual(residual, residual_stride);
    args.threads = threads;
    const qk::KernelTable& table = qk::kernels();
    const int64_t groups = args.group_size < args.k ? qk::ceil_div(args.k, args.group_size) : 1;
    args.scratch = qk::scratch(table.linear_w4a8_scratch_bytes(m, args.k, groups, threads));
    const char* isa = table.isa;
    qk::run_released((m + 1) * args.n * args.k > qk::kReleaseGilBytes, [&] {
      qk::expect_rows(args, m, threads);
      isa = table.linear_w4a8(args);
    });
    qk::note("w4a8", isa);
  }

 private:
  qk::LinearW4A8Args args_{};
};

void check_groups(int64_t bytes, int64_t n, int64_t groups) {
  QK_CHECK_GE(n, 0);
  QK_CHECK_GE(groups, 0);
  if (bytes != 1 && bytes != 2) QK_CHECK_EQ(bytes, 4);
}

}  // namespace

void bind_w4(py::module_& m) {
  m.def(
      "packed_w4_bytes",
      [](int64_t n, int64_t k) {
        QK_CHECK_GE(n, 0);
        QK_CHECK_GE(k, 0);
        return qk::packed_w4_bytes(n, k);
      },
      py::arg("N"), py::arg("K"));
  m.def(
      "pack_w4",
      [](uintptr_t weight, int64_t n, int64_t k, uintptr_t packed, int threads) {
        QK_CHECK_GE(threads, 1);
        py::gil_scoped_release released;
        qk::pack_w4(pointer<const uint8_t>(weight), n, k, pointer<uint8_t>(packed), threads);
      },
      py::arg("weight"), py::arg("N"), py::arg("K"), py::arg("packed"), py::arg("threads"));
  m.def(
      "unpack_w4",
      [](uintptr_t packed, int64_t n, int64_t k, uintptr_t weight, int threads) {
        QK_CHECK_GE(threads, 1);
        py::gil_scoped_release released;
        qk::unpack_w4(pointer<const uint8_t>(packed), n, k, pointer<uint8_t>(weight), threads);
      },
      py::arg("packed"), py::arg("N"), py::arg("K"), py::arg("weight"), py::arg("threads"));
  m.def(
      "packed_group_elements",
      [](int64_t n, int64_t groups) {
        check_groups(1, n, groups);
        return qk::packed_group_elements(n, groups);
      },
      py::arg("N"), py::arg("groups"));
  m.def(
      "pack_groups",
      [](uintptr_t source, int64_t bytes, int64_t n, int64_t groups, uintptr_t packed) {
        check_groups(bytes, n, groups);
        py::gil_scoped_release released;
        qk::pack_groups(pointer<const void>(source), bytes, n, groups, pointer<void>(packed));
      },
      py::arg("source"), py::arg("element_bytes"), py::arg("N"), py::arg("groups"), py::arg("packed"));
  m.def(
      "unpack_groups",
      [](uintptr_t packed, int64_t bytes, int64_t n, int64_t groups, uintptr_t target) {
        check_groups(bytes, n, groups);
        py::gil_scoped_release released;
        qk::unpack_groups(pointer<const void>(packed), bytes, n, groups, pointer<void>(target));
      },
      py::arg("packed"), py::arg("element_bytes"), py::arg("N"), py::arg("groups"), py::arg("target"));

  py::class_<LinearW4A8>(m, "LinearW4A8")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, uintptr_t, int64_t, int64_t, int64_t,
                    bool, float, int32_t, uintptr_t, int>(),
           py::arg("packed"), py::arg("weight_scale"), py::arg("weight_zero_point"), py::arg("weight_min"),
           py::arg("weight_multiplier"), py::arg("scale_dtype"), py::arg("bias"), py::arg("N"), py::arg("K"),
           py::arg("group_size"), py::arg("act_symmetric"), py::arg("act_scale"), py::arg("act_zero_point"),
           py::arg("inv_smooth"), py::arg("function") = 0)
      .def("run", &LinearW4A8::run)
      .def("run_plus", &LinearW4A8::run_plus);
}
