#include "ops/gptq.h"

#include "bind.h"

namespace pgolf {
namespace {

void gptq(int device, uintptr_t stream, int build, int shared_memory, uintptr_t weight, uintptr_t factor,
          uintptr_t scale, uintptr_t group, uintptr_t limit, uintptr_t q, uintptr_t errors, int64_t matrices,
          int64_t rows, int cols, int groups) {
    const Gptq params{.weight = pointer<const float>(weight),
                      .factor = pointer<const double>(factor),
                      .scale = pointer<const float>(scale),
                      .group = pointer<const uint8_t>(group),
                      .limit = pointer<const int>(limit),
                      .q = pointer<int8_t>(q),
                      .errors = pointer<double>(errors),
                      .matrices = matrices,
                      .rows = rows,
                      .cols = cols,
                      .groups = groups};
    generic::gptq(params, enter(device, stream, build, shared_memory).stream);
}

}  // namespace

void bind_gptq(py::module_& m) {
    m.def("gptq", &gptq, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "weight"_a, "factor"_a,
          "scale"_a, "group"_a, "limit"_a, "q"_a, "errors"_a, "matrices"_a, "rows"_a, "cols"_a, "groups"_a);
}

}  // namespace pgolf
