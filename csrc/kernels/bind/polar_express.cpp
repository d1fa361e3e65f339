#include "ops/polar_express.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace pgolf {
namespace {

void polar_express(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t grad,
                   uintptr_t momentum, uintptr_t out, uintptr_t scratch, int batch, int rows, int cols, float mu,
                   float lookahead, float floor, const std::vector<std::array<float, 3>>& coefficients) {
    const PolarExpress params{.grad_type = static_cast<DType>(dtype),
                              .grad = pointer<const void>(grad),
                              .momentum = pointer<void>(momentum),
                              .out = pointer<void>(out),
                              .scratch = pointer<void>(scratch),
                              .batch = batch,
                              .rows = rows,
                              .cols = cols,
                              .mu = mu,
                              .lookahead = lookahead,
                              .floor = floor,
                              .coefficients = coefficients};
    const Target target = enter(device, stream, build, shared_memory);
#ifdef PGOLF_SM90
    if (target.build == Build::kSm90) return sm90::polar_express(params, target);
#endif
    generic::polar_express(params, target);
}

}  // namespace

void bind_polar_express(py::module_& m) {
    m.attr("POLAR_EXPRESS_COLS") = kPolarExpressCols;
    m.def("polar_express", &polar_express, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "grad"_a, "momentum"_a, "out"_a, "scratch"_a, "batch"_a, "rows"_a, "cols"_a, "mu"_a, "lookahead"_a,
          "floor"_a, "coefficients"_a);
    m.def("polar_express_scratch", &polar_express_scratch, "batch"_a, "rows"_a, "cols"_a);
}

}  // namespace pgolf
