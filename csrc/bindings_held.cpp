// Tensors whose addresses a native object borrowed: whether a layer still holds them, and they are where they were.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace {

// A call of a layer asks this first. In Python it would take longer than the rest of what stands before a launch.
class Held {
 public:
  // Those of `tensors` under `names`; a name that is missing counts as None.
  Held(const py::dict& tensors, const py::tuple& names) {
    for (const py::handle name : names) {
      PyObject* tensor = entry(tensors, name);
      entries_.push_back({py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(tensor),
                          tensor == Py_None ? 0 : address(tensor)});
    }
  }

  bool holds(const py::dict& tensors) const {
    for (const Entry& e : entries_) {
      PyObject* tensor = entry(tensors, e.name);
      if (tensor != e.tensor.ptr() || (tensor != Py_None && address(tensor) != e.address)) return false;
    }
    return true;
  }

 private:
  struct Entry {
    py::object name, tensor;
    uintptr_t address;
  };

  static PyObject* entry(const py::dict& tensors, const py::handle name) {
    PyObject* found = PyDict_GetItemWithError(tensors.ptr(), name.ptr());  // borrowed
    if (found) return found;
    if (PyErr_Occurred()) throw py::error_already_set();
    return Py_None;
  }

  static uintptr_t address(PyObject* tensor) {
    static PyObject* const method = PyUnicode_InternFromString("data_ptr");
    const auto value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
    if (!value) throw py::error_already_set();
    return value.cast<uintptr_t>();
  }

  std::vector<Entry> entries_;
};

}  // namespace

void bind_held(py::module_& m) {
  py::class_<Held>(m, "Held")
      .def(py::init<py::dict, py::tuple>(), py::arg("tensors"), py::arg("names"))
      .def("holds", &Held::holds, py::arg("tensors"));
}
