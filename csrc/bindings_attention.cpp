// Attention of the Python module: between the Linears of a block, in floating point.
#include <pybind11/stl.h>

#include <array>

#include "binding_helpers.h"
#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using qk::pointer;

namespace {

using Steps = std::array<int64_t, 3>;

constexpr int64_t kMostAttentionSize = 256;  // a row of the scratch buffers that the kernels keep in L1

// Shapes and strides of a call, which many calls share; see args.h.
class Attention {
 public:
  Attention(const std::array<int64_t, 6>& sizes, const Steps& q, const Steps& k, const Steps& v, const Steps& mask,
            int dtype, int mask_kind, bool causal) {
    for (const int64_t size : sizes) QK_CHECK_GE(size, 1);
    QK_CHECK_LE(sizes[5], kMostAttentionSize);
    QK_CHECK_EQ(sizes[1] % sizes[2], 0);
    QK_CHECK_GE(mask_kind, 0);
    QK_CHECK_LE(mask_kind, 2);
    args_.batch = sizes[0];
    args_.heads = sizes[1];
    args_.key_heads = sizes[2];
    args_.queries = sizes[3];
    args_.keys = sizes[4];
    args_.size = sizes[5];
    args_.q_step = {q[0], q[1], q[2]};
    args_.k_step = {k[0], k[1], k[2]};
    args_.v_step = {v[0], v[1], v[2]};
    args_.mask_step = {mask[0], mask[1], mask[2]};
    args_.dtype = qk::dtype(dtype);
    args_.mask_kind = static_cast<qk::MaskKind>(mask_kind);
    args_.causal = causal;
  }

  bool run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t y, float scale, int threads) const {
    const qk::AttentionTable* table = qk::attention_kernels();
    if (table == nullptr) return false;
    QK_CHECK_GE(threads, 1);
    if (args_.mask_kind != qk::MaskKind::kNone) QK_CHECK_EQ(mask != 0, true);
    qk::AttentionArgs args = args_;
    args.q = pointer<const void>(q);
    args.k = pointer<const void>(k);
    args.v = pointer<const void>(v);
    args.mask = pointer<const void>(mask);
    args.y = pointer<void>(y);
    args.scale = scale;
    args.threads = threads;
    args.scratch = qk::scratch(table->scratch_bytes(args.size, threads));
    const int64_t elements = args.batch * args.heads * args.queries * args.size;
    qk::run_released(elements * args.keys > qk::kReleaseGilBytes, [&] {
      qk::expect_output(args.y, elements * (args.dtype == qk::DType::kF32 ? 4 : 2), threads);
      table->attention(args);
    });
    qk::note("attention", qk::kernels().isa);
    return true;
  }

 private:
  qk::AttentionArgs args_{};
};

// Rotary embedding of queries and keys, likewise.
class Rotary {
 public:
  Rotary(const std::array<int64_t, 5>& sizes, const Steps& q, const Steps& k, const Steps& angles, int dtype) {
    for (const int64_t size : sizes) QK_CHECK_GE(size, 1);
    QK_CHECK_EQ(sizes[4] % 2, 0);
    args_.batch = sizes[0];
    args_.heads = sizes[1];
    args_.key_heads = sizes[2];
    args_.tokens = sizes[3];
    args_.size = sizes[4];
    args_.q_step = {q[0], q[1], q[2]};
    args_.k_step = {k[0], k[1], k[2]};
    args_.angle_step = {angles[0], angles[1], angles[2]};
    args_.dtype = qk::dtype(dtype);
  }

  void run(uintptr_t q, uintptr_t k, uintptr_t cos, uintptr_t sin, uintptr_t q_out, uintptr_t k_out,
           int threads) const {
    QK_CHECK_GE(threads, 1);
    qk::RotaryArgs args = args_;
    args.q = pointer<const void>(q);
    args.k = pointer<const void>(k);
    args.cos = pointer<const void>(cos);
    args.sin = pointer<const void>(sin);
    args.q_out = pointer<void>(q_out);
    args.k_out = pointer<void>(k_out);
    args.threads = threads;
    const int64_t elements = args.batch * args.tokens * (args.heads + args.key_heads) * args.size;
    const qk::KernelTable& table = qk::kernels();
    qk::run_released(elements > qk::kReleaseGilBytes / 8, [&] { table.rotary(args); });
    qk::note("rotary", table.isa);
  }

 private:
  qk::RotaryArgs args_{};
};

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Rotary>(m, "Rotary")
      .def(py::init<const std::array<int64_t, 5>&, const Steps&, const Steps&, const Steps&, int>(), py::arg("sizes"),
           py::arg("q"), py::arg("k"), py::arg("angles"), py::arg("dtype"))
      .def("run", &Rotary::run);
  py::class_<Attention>(m, "Attention")
      .def(py::init<const std::array<int64_t, 6>&, const Steps&, const Steps&, const Steps&, const Steps&, int, int,
                    bool>(),
           py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("dtype"),
           py::arg("mask_kind"), py::arg("causal"))
      .def("run", &Attention::run);
  m.def("has_attention", [] { return qk::attention_kernels() != nullptr; });
  m.def("has_attention_of_few", [] { return qk::attention_kernels() != nullptr && qk::attention_kernels()->few; });
}
