// pgolf._trellis: one matrix in, its levels out; the interpreter lock is released meanwhile, so that matrices can be
// quantized side by side in threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "quantize.h"

namespace py = pybind11;

namespace pgolf::trellis {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Levels = py::array_t<std::int8_t, py::array::c_style>;

void expect_shape(const Floats& array, const char* name, std::initializer_list<py::ssize_t> shape) {
    bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (py::ssize_t i = 0; fits && i < array.ndim(); ++i) fits = array.shape(i) == shape.begin()[i];
    if (!fits) throw py::value_error(std::string(name) + " does not have the shape that weight asks for");
}

Levels quantize_matrix(const Floats& weight, const Floats& upper, const Floats& row_step, const Floats& row_variance,
                       const Floats& column_factor, int states, float rate, int block) {
    if (weight.ndim() != 2) throw py::value_error("weight must have the shape [columns, rows]");
    const py::ssize_t cols = weight.shape(0), rows = weight.shape(1);
    expect_shape(upper, "upper", {cols, cols});
    expect_shape(row_step, "row_step", {rows});
    expect_shape(row_variance, "row_variance", {rows});
    expect_shape(column_factor, "column_factor", {cols});
    if (!known(states)) throw py::value_error("states must be 4, 8, 32, 64 or 256");
    if (block < 1) throw py::value_error("block must be at least 1");
    Levels levels({cols, rows});
    std::vector<float> work(weight.data(), weight.data() + weight.size());
    const Problem problem{static_cast<std::size_t>(rows),
                          static_cast<std::size_t>(cols),
                          work.data(),
                          upper.data(),
                          row_step.data(),
                          row_variance.data(),
                          column_factor.data(),
                          rate,
                          static_cast<std::size_t>(block)};
    std::int8_t* out = levels.mutable_data();
    {
        py::gil_scoped_release unlocked;
        quantize(problem, states, out);
    }
    return levels;
}

}  // namespace
}  // namespace pgolf::trellis

PYBIND11_MODULE(_trellis, m) {
    m.doc() = "Trellis search inside GPTQ's column loop; use pgolf.quantize.trellis.";
    m.def("quantize", &pgolf::trellis::quantize_matrix, py::arg("weight"), py::arg("upper"), py::arg("row_step"),
          py::arg("row_variance"), py::arg("column_factor"), py::arg("states"), py::arg("rate"), py::arg("block"));
}
