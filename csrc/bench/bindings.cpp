// qkernels._bench: the machine's ceilings, for qkernels.bench.ceilings. Callers ask only for tiers that
// qkernels._C.info()["usable"] names: the loops are not guarded by a look at the processor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "ceilings.h"

namespace py = pybind11;

namespace {

const qk::LoopTable& table_of(const std::string& tier) {
  const qk::LoopTable* table = qk::loops_of(tier.c_str());
  if (table == nullptr) throw std::invalid_argument("tier: this build has no loops for '" + tier + "'");
  return *table;
}

// (operations, seconds) of all threads together, or None where the tier has no such loop.
py::object peak_loop(const std::string& tier, const std::string& kind, int64_t steps, int threads) {
  if (kind != "int8" && kind != "fp32") throw std::invalid_argument("kind: expected int8 or fp32, got '" + kind + "'");
  if (steps < 1 || threads < 1) throw std::invalid_argument("steps and threads: expected at least 1");
  const qk::LoopTable& table = table_of(tier);
  const bool int8 = kind == "int8";
  void (*loop)(int64_t) = int8 ? table.int8 : table.fp32;
  if (loop == nullptr) return py::none();
  double seconds;
  {
    py::gil_scoped_release release;
    seconds = qk::time_loop(loop, steps, threads);
  }
  const double ops = static_cast<double>(int8 ? table.int8_ops : table.fp32_ops) * static_cast<double>(steps) * threads;
  return py::make_tuple(ops, seconds);
}

// Seconds, or None where the tier adds no wider load.
py::object read_loop(const std::string& tier, uintptr_t data, int64_t bytes, int64_t passes, int threads) {
  if (data % 64 != 0) throw std::invalid_argument("data: expected a 64-byte aligned address");
  if (bytes < 512 || bytes % 512 != 0) throw std::invalid_argument("bytes: expected a positive multiple of 512");
  if (passes < 1 || threads < 1) throw std::invalid_argument("passes and threads: expected at least 1");
  const qk::LoopTable& table = table_of(tier);
  if (table.read == nullptr) return py::none();
  double seconds;
  {
    py::gil_scoped_release release;
    seconds = qk::time_read(table, reinterpret_cast<const uint8_t*>(data), bytes, passes, threads);
  }
  return py::float_(seconds);
}

}  // namespace

PYBIND11_MODULE(_bench, m) {
  m.doc() = "Ceilings of this machine: register-only multiply-accumulate loops and memory-only read loops.";
  m.def("peak", &peak_loop, py::arg("tier"), py::arg("kind"), py::arg("steps"), py::arg("threads"));
  m.def("read", &read_loop, py::arg("tier"), py::arg("data"), py::arg("bytes"), py::arg("passes"), py::arg("threads"));
}
