#include "ops/trellis.h"

#include <pybind11/stl.h>

#include <vector>

#include "bind.h"

namespace pgolf {
namespace {

void trellis(int device, uintptr_t stream, int build, int shared_memory, uintptr_t work, uintptr_t upper,
             uintptr_t row_step, uintptr_t row_variance, uintptr_t column_factor, uintptr_t words, uintptr_t levels,
             const std::vector<int>& rows, const std::vector<int>& cols, int states, float rate) {
    if (rows.size() != cols.size()) throw py::value_error("trellis: cols: not as many as rows");
    const Trellis params{.work = pointer<float>(work),
                         .upper = pointer<const float>(upper),
                         .row_step = pointer<const float>(row_step),
                         .row_variance = pointer<const float>(row_variance),
                         .column_factor = pointer<const float>(column_factor),
                         .words = pointer<uint32_t>(words),
                         .levels = pointer<int8_t>(levels),
                         .rows = rows.data(),
                         .cols = cols.data(),
                         .matrices = static_cast<int>(rows.size()),
                         .states = states,
                         .rate = rate};
    generic::trellis(params, enter(device, stream, build, shared_memory));
}

}  // namespace

void bind_trellis(py::module_& m) {
    m.def("trellis", &trellis, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "work"_a, "upper"_a,
          "row_step"_a, "row_variance"_a, "column_factor"_a, "words"_a, "levels"_a, "rows"_a, "cols"_a, "states"_a,
          "rate"_a);
    m.def("trellis_scratch", &generic::trellis_scratch, "rows"_a, "states"_a);
}

}  // namespace pgolf
