// The Python module: checks sizes, releases the GIL where it pays, and calls the active KernelTable. No math here.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "binding_helpers.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"

namespace py = pybind11;
using qk::dtype;
using qk::kind;
using qk::note;
using qk::pointer;
using qk::run_released;

namespace {

// Runs members whose outputs are known; what they share is filled in at the first.
void launch_members(qk::LinearW8A8Args* members, size_t count, int64_t m, int64_t x_stride, int threads) {
  QK_CHECK_GE(m, 0);
  QK_CHECK_GE(threads, 1);
  qk::LinearW8A8Args& first = members[0];
  first.m = m;
  first.act.x_stride = x_stride;
  first.threads = threads;
  const qk::KernelTable& table = qk::kernels();
  first.scratch_bytes = table.linear_w8a8_scratch_bytes(m, first.k, threads);
  first.scratch = qk::scratch(first.scratch_bytes);
  int64_t columns = 0;
  for (size_t i = 0; i < count; ++i) columns += members[i].n;
  const char* isa = table.isa;
  run_released((m + 1) * columns * first.k > qk::kReleaseGilBytes, [&] {
    for (size_t i = 0; i < count; ++i) qk::expect_rows(members[i], m, threads);
    isa = table.linear_w8a8(members, static_cast<int>(count));
  });
  note("w8a8", isa);
}

// One layer's weights, by borrowed pointers: the Python owner keeps the tensors alive and makes a new object when they
// move.
class LinearW8A8 {
 public:
  LinearW8A8(uintptr_t packed, uintptr_t colsum, uintptr_t weight_scale, uintptr_t bias, int64_t n, int64_t k,
             bool has_minus128, bool act_symmetric, float act_scale, int32_t act_zero_point, uintptr_t inv_smooth,
             int function) {
    QK_CHECK_GE(n, 0);
    QK_CHECK_GE(k, 0);
    QK_CHECK_LE(k, qk::kMaxK);
    QK_CHECK_EQ(packed % qk::kAlign, 0u);
    args_.packed = pointer<const int8_t>(packed);
    args_.colsum = pointer<const int32_t>(colsum);
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const float>(bias);
    args_.n = n;
    args_.k = k;
    args_.has_minus128 = has_minus128;
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
    qk::LinearW8A8Args args = args_;
    args.residual = qk::residual(residual, residual_stride);
    args.act.x = pointer<const void>(x);
    args.act.x_dtype = dtype(x_dtype);
    launch(args, m, x_stride, y, y_dtype, y_stride, threads);
  }

  void run_quantized(uintptr_t xq, int64_t xq_stride, uintptr_t x_scale, uintptr_t x_zero_point, int64_t m, uintptr_t y,
                     int y_dtype, int64_t y_stride, int threads) const {
    qk::LinearW8A8Args args = args_;
    args.xq = pointer<const uint8_t>(xq);
    args.xq_scale = pointer<const float>(x_scale);
    args.xq_zero_point = pointer<const int32_t>(x_zero_point);
    launch(args, m, xq_stride, y, y_dtype, y_stride, threads);
  }

  const qk::LinearW8A8Args& args() const { return args_; }

 private:
  static void launch(qk::LinearW8A8Args& args, int64_t m, int64_t x_stride, uintptr_t y, int y_dtype, int64_t y_stride,
                     int threads) {
    args.y = pointer<void>(y);
    args.y_dtype = dtype(y_dtype);
    args.y_stride = y_stride;
    launch_members(&args, 1, m, x_stride, threads);
  }

  qk::LinearW8A8Args args_{};
};

// Several layers over the same rows, which are quantized once; see args.h.
class LinearW8A8Group {
 public:
  explicit LinearW8A8Group(const py::list& members) {
    for (const auto& member : members) members_.push_back(member.cast<const LinearW8A8&>().args());
    QK_CHECK_GE(members_.size(), 1u);
    for (const auto& member : members_) {
      QK_CHECK_EQ(member.k, members_[0].k);
      QK_CHECK_EQ(member.act.symmetric, members_[0].act.symmetric);
      QK_CHECK_EQ(member.act.scale, members_[0].act.scale);
      QK_CHECK_EQ(member.act.zero_point, members_[0].act.zero_point);
    }
  }

  void run(uintptr_t x, int x_dtype, int64_t m, int64_t x_stride, const py::list& y, int y_dtype, int threads) const {
    QK_CHECK_EQ(y.size(), members_.size());
    std::vector<qk::LinearW8A8Args> members = members_;
    for (size_t i = 0; i < members.size(); ++i) {
      members[i].y = pointer<void>(y[i].cast<uintptr_t>());
      members[i].y_dtype = dtype(y_dtype);
      members[i].y_stride = members[i].n;
    }
    members[0].act.x = pointer<const void>(x);
    members[0].act.x_dtype = dtype(x_dtype);
    launch_members(members.data(), members.size(), m, x_stride, threads);
  }

 private:
  std::vector<qk::LinearW8A8Args> members_;
};

void check_view(int64_t outer, int64_t channels, int64_t inner, int64_t group, qk::QKind q_kind, int threads) {
  QK_CHECK_GE(outer, 0);
  QK_CHECK_GE(channels, 0);
  QK_CHECK_GE(inner, 0);
  QK_CHECK_GE(group, 0);
  QK_CHECK_GE(threads, 1);
  if (group > 0 || q_kind == qk::QKind::kInt4) QK_CHECK_EQ(outer, 1);
  if (q_kind == qk::QKind::kInt4) QK_CHECK_EQ(group % 2, 0);
}

void quantize(uintptr_t x, int x_dtype, int64_t outer, int64_t channels, int64_t inner, int64_t group, uintptr_t out,
              int out_kind, uintptr_t scale, uintptr_t zero_point, bool symmetric, bool is_static, int threads) {
  check_view(outer, channels, inner, group, kind(out_kind), threads);
  const qk::QuantizeArgs args{pointer<const void>(x),
                              dtype(x_dtype),
                              outer,
                              channels,
                              inner,
                              group,
                              pointer<void>(out),
                              kind(out_kind),
                              pointer<float>(scale),
                              pointer<int32_t>(zero_point),
                              symmetric,
                              is_static,
                              threads};
  const qk::KernelTable& table = qk::kernels();
  run_released(outer * channels * inner > qk::kReleaseGilBytes, [&] {
    qk::expect_output(args.q, outer * channels * inner / (args.kind == qk::QKind::kInt4 ? 2 : 1), threads);
    table.quantize(args);
  });
  note("quantize", table.isa);
}

void dequantize(uintptr_t q, int q_kind, int64_t outer, int64_t channels, int64_t inner, int64_t group, uintptr_t scale,
                uintptr_t zero_point, uintptr_t out, int out_dtype, int threads) {
  check_view(outer, channels, inner, group, kind(q_kind), threads);
  const qk::DequantizeArgs args{pointer<const void>(q),
                                kind(q_kind),
                                outer,
                                channels,
                                inner,
                                group,
                                pointer<const float>(scale),
                                pointer<const int32_t>(zero_point),
                                pointer<void>(out),
                                dtype(out_dtype),
                                threads};
  const qk::KernelTable& table = qk::kernels();
  run_released(outer * channels * inner > qk::kReleaseGilBytes, [&] {
    qk::expect_output(args.out, outer * channels * inner * (args.out_dtype == qk::DType::kF32 ? 4 : 2), threads);
    table.dequantize(args);
  });
  note("dequantize", table.isa);
}

void embedding(uintptr_t table, bool packed, int64_t n, int64_t k, uintptr_t scale, uintptr_t ids, int64_t count,
               uintptr_t out, int out_dtype, int threads) {
  QK_CHECK_GE(k, 0);
  QK_CHECK_GE(count, 0);
  QK_CHECK_GE(threads, 1);
  const qk::EmbeddingArgs args{pointer<const int8_t>(table),
                               packed,
                               n,
                               k,
                               pointer<const float>(scale),
                               pointer<const int64_t>(ids),
                               count,
                               pointer<void>(out),
                               dtype(out_dtype),
                               threads};
  for (int64_t i = 0; i < count; ++i)
    if (args.ids[i] < 0 || args.ids[i] >= n)
      throw py::index_error("index out of range: expected ids from 0 to " + std::to_string(n - 1) + ", got " +
                            std::to_string(args.ids[i]));
  const qk::KernelTable& table_of_isa = qk::kernels();
  run_released(count * k > qk::kReleaseGilBytes, [&] {
    qk::expect_output(args.out, count * k * (args.out_dtype == qk::DType::kF32 ? 4 : 2), threads);
    table_of_isa.embedding(args);
  });
  note("embedding", table_of_isa.isa);
}

void activation(uintptr_t x, int x_dtype, uintptr_t y, int y_dtype, int64_t count, int function, int threads) {
  QK_CHECK_GE(count, 0);
  QK_CHECK_GE(threads, 1);
  const qk::ActivationFunctionArgs args{
      pointer<const void>(x),   dtype(x_dtype), pointer<void>(y), dtype(y_dtype), count,
      qk::activation(function), threads};
  const qk::KernelTable& table = qk::kernels();
  run_released(count > qk::kReleaseGilBytes / 8, [&] { table.activation(args); });
  note("activation", table.isa);
}

void norm(uintptr_t x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, bool layer, float eps, uintptr_t weight,
          uintptr_t bias, uintptr_t y, int threads) {
  QK_CHECK_GE(m, 0);
  QK_CHECK_GE(k, 1);
  QK_CHECK_GE(threads, 1);
  const qk::NormArgs args{
      pointer<const void>(x),    dtype(x_dtype),   m,      k, x_stride, layer, eps, pointer<const void>(weight),
      pointer<const void>(bias), pointer<void>(y), threads};
  const qk::KernelTable& table = qk::kernels();
  run_released(m * k > qk::kReleaseGilBytes / 8, [&] {
    qk::expect_output(args.y, m * k * (args.dtype == qk::DType::kF32 ? 4 : 2), threads);
    table.norm(args);
  });
  note("norm", table.isa);
}

py::list names(const qk::TierList& tiers) {
  py::list result;
  for (int i = 0; i < tiers.count; ++i) result.append(tiers.names[i]);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  qk::init_dispatch();

  m.def("info", [] {
    py::dict result;
    result["isa"] = qk::kernels().isa;
    result["reason"] = qk::isa_reason();
    result["compiled"] = names(qk::compiled_tiers());
    result["usable"] = names(qk::usable_tiers());
    return result;
  });
  m.def("set_isa", [](const std::string& name) { qk::force_isa(name.c_str(), "forced by set_isa"); }, py::arg("name"));
  m.def("last_kernel", [] { return qk::last_kernel; });

  m.def(
      "packed_w8_bytes",
      [](int64_t n, int64_t k) {
        QK_CHECK_GE(n, 0);
        QK_CHECK_GE(k, 0);
        return qk::packed_w8_bytes(n, k);
      },
      py::arg("N"), py::arg("K"));
  m.def(
      "pack_w8",
      [](uintptr_t weight, int64_t n, int64_t k, uintptr_t packed, uintptr_t colsum, int threads) {
        QK_CHECK_GE(threads, 1);
        py::gil_scoped_release released;
        return qk::pack_w8(pointer<const int8_t>(weight), n, k, pointer<int8_t>(packed), pointer<int32_t>(colsum),
                           threads);
      },
      py::arg("weight"), py::arg("N"), py::arg("K"), py::arg("packed"), py::arg("colsum"), py::arg("threads"));
  m.def(
      "unpack_w8",
      [](uintptr_t packed, int64_t n, int64_t k, uintptr_t weight, int threads) {
        QK_CHECK_GE(threads, 1);
        py::gil_scoped_release released;
        qk::unpack_w8(pointer<const int8_t>(packed), n, k, pointer<int8_t>(weight), threads);
      },
      py::arg("packed"), py::arg("N"), py::arg("K"), py::arg("weight"), py::arg("threads"));

  py::class_<LinearW8A8>(m, "LinearW8A8")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, bool, bool, float, int32_t, uintptr_t,
                    int>(),
           py::arg("packed"), py::arg("colsum"), py::arg("weight_scale"), py::arg("bias"), py::arg("N"), py::arg("K"),
           py::arg("has_minus128"), py::arg("act_symmetric"), py::arg("act_scale"), py::arg("act_zero_point"),
           py::arg("inv_smooth"), py::arg("function") = 0)
      .def("run", &LinearW8A8::run)
      .def("run_plus", &LinearW8A8::run_plus)
      .def("run_quantized", &LinearW8A8::run_quantized);

  py::class_<LinearW8A8Group>(m, "LinearW8A8Group")
      .def(py::init<const py::list&>(), py::arg("members"))
      .def("run", &LinearW8A8Group::run);

  m.def("quantize", &quantize);
  m.def("dequantize", &dequantize);
  m.def("embedding", &embedding);
  m.def("activation", &activation);
  m.def("norm", &norm);
  bind_attention(m);
  bind_held(m);
  bind_w4(m);
  bind_weight_only(m);
}
