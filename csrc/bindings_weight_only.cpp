// LinearW8A16 and LinearW4A16 of the Python module: 8-bit or 4-bit weights, floating-point activations.
#include "binding_helpers.h"
#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using qk::pointer;

namespace {

// Borrowed pointers, as LinearW8A8: the Python owner keeps the tensors alive and makes a new object when they move.
class WeightOnly {
 public:
  void run(uintptr_t x, int x_dtype, int64_t m, int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride,
           int threads) const {
    run_plus(x, x_dtype, m, x_stride, y, y_dtype, y_stride, threads, 0, 0);
  }

  void run_plus(uintptr_t x, int x_dtype, int64_t m, int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride,
                int threads, uintptr_t residual, int64_t residual_stride) const {
    QK_CHECK_GE(m, 0);
    QK_CHECK_GE(threads, 1);
    qk::LinearWxA16Args args = args_;
    args.x = pointer<const void>(x);
    args.x_dtype = qk::dtype(x_dtype);
    args.m = m;
    args.x_stride = x_stride;
    args.y = pointer<void>(y);
    args.y_dtype = qk::dtype(y_dtype);
    args.y_stride = y_stride;
    args.residual = qk::residual(residual, residual_stride);
    args.threads = threads;
    const qk::WeightOnlyTable& table = qk::weight_only_kernels(args);
    args.scratch = qk::scratch(table.scratch_bytes(m, args.k, args.group_size, threads));
    const auto kernel = bits_ == 8 ? table.linear_w8a16 : table.linear_w4a16;
    qk::run_released((m + 1) * args.n * args.k > qk::kReleaseGilBytes, [&] {
      qk::expect_rows(args, m, threads);
      kernel(args);
    });
    qk::note(bits_ == 8 ? "w8a16" : "w4a16", qk::kernels().isa);
    qk::last_kernel.append(table.suffix);
  }

 protected:
  WeightOnly(int bits, uintptr_t packed, uintptr_t weight_scale, uintptr_t bias, int64_t n, int64_t k,
             int64_t group_size, uintptr_t inv_smooth, int function)
      : bits_(bits) {
    QK_CHECK_GE(n, 0);
    QK_CHECK_GE(k, 0);
    QK_CHECK_GE(group_size, 1);
    QK_CHECK_EQ(packed % qk::kAlign, 0u);
    args_.packed = pointer<const uint8_t>(packed);
    args_.weight_scale = pointer<const void>(weight_scale);
    args_.bias = pointer<const float>(bias);
    args_.inv_smooth = pointer<const float>(inv_smooth);
    args_.function = qk::activation(function);
    args_.n = n;
    args_.k = k;
    args_.group_size = group_size;
  }

  const int bits_;
  qk::LinearWxA16Args args_{};
};

class LinearW8A16 : public WeightOnly {
 public:
  LinearW8A16(uintptr_t packed, uintptr_t weight_scale, uintptr_t bias, int64_t n, int64_t k, uintptr_t inv_smooth,
              int function)
      : WeightOnly(8, packed, weight_scale, bias, n, k, k < 1 ? 1 : k, inv_smooth, function) {}
};

class LinearW4A16 : public WeightOnly {
 public:
  LinearW4A16(uintptr_t packed, uintptr_t weight_scale, uintptr_t weight_zero_point, uintptr_t weight_min,
              int scale_dtype, uintptr_t codebook, uintptr_t bias, int64_t n, int64_t k, int64_t group_size,
              uintptr_t inv_smooth, int function)
      : WeightOnly(4, packed, weight_scale, bias, n, k, group_size, inv_smooth, function) {
    if (group_size < k) QK_CHECK_EQ(group_size % 8, 0);
    if (scale_dtype != 0) QK_CHECK_EQ(scale_dtype, 2);
    QK_CHECK_LE((weight_zero_point != 0) + (weight_min != 0) + (codebook != 0), 1);
    args_.weight_zero_point = pointer<const uint8_t>(weight_zero_point);
    args_.weight_min = pointer<const void>(weight_min);
    args_.scale_type = static_cast<qk::ScaleType>(scale_dtype);
    args_.codebook = pointer<const float>(codebook);
  }
};

}  // namespace

void bind_weight_only(py::module_& m) {
  py::class_<LinearW8A16>(m, "LinearW8A16")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, int>(), py::arg("packed"),
           py::arg("weight_scale"), py::arg("bias"), py::arg("N"), py::arg("K"), py::arg("inv_smooth") = 0,
           py::arg("function") = 0)
      .def("run", &LinearW8A16::run)
      .def("run_plus", &LinearW8A16::run_plus);
  py::class_<LinearW4A16>(m, "LinearW4A16")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, uintptr_t, uintptr_t, int64_t, int64_t, int64_t,
                    uintptr_t, int>(),
           py::arg("packed"), py::arg("weight_scale"), py::arg("weight_zero_point"), py::arg("weight_min"),
           py::arg("scale_dtype"), py::arg("codebook"), py::arg("bias"), py::arg("N"), py::arg("K"),
           py::arg("group_size"), py::arg("inv_smooth") = 0, py::arg("function") = 0)
      .def("run", &LinearW4A16::run)
      .def("run_plus", &LinearW4A16::run_plus);
}
