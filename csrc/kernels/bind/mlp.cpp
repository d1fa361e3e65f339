#include "ops/mlp.h"

#include "bind.h"

namespace pgolf {
namespace {

void mlp_up(int device, uintptr_t stream, int build, int shared_memory, uintptr_t x, uintptr_t weight, uintptr_t hidden,
            uintptr_t signs, int64_t rows, int features, int dim) {
    const MlpUp params{.x = pointer<const void>(x),
                       .weight = pointer<const void>(weight),
                       .hidden = pointer<void>(hidden),
                       .signs = pointer<uint8_t>(signs),
                       .rows = rows,
                       .features = features,
                       .dim = dim};
    const Target target = enter(device, stream, build, shared_memory);
#ifdef PGOLF_SM90
    if (target.build == Build::kSm90) return sm90::mlp_up(params, target);
#endif
    generic::mlp_up(params, target);
}

void mlp_grad(int device, uintptr_t stream, int build, int shared_memory, uintptr_t grad, uintptr_t weight,
              uintptr_t hidden, uintptr_t signs, uintptr_t grad_pre, int64_t rows, int features, int dim) {
    const MlpGrad params{.grad = pointer<const void>(grad),
                         .weight = pointer<const void>(weight),
                         .hidden = pointer<const void>(hidden),
                         .signs = pointer<const uint8_t>(signs),
                         .grad_pre = pointer<void>(grad_pre),
                         .rows = rows,
                         .features = features,
                         .dim = dim};
    const Target target = enter(device, stream, build, shared_memory);
#ifdef PGOLF_SM90
    if (target.build == Build::kSm90) return sm90::mlp_grad(params, target);
#endif
    generic::mlp_grad(params, target);
}

}  // namespace

void bind_mlp(py::module_& m) {
    m.def("mlp_up", &mlp_up, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "x"_a, "weight"_a,
          "hidden"_a, "signs"_a, "rows"_a, "features"_a, "dim"_a);
    m.def("mlp_grad", &mlp_grad, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "grad"_a,
          "weight"_a, "hidden"_a, "signs"_a, "grad_pre"_a, "rows"_a, "features"_a, "dim"_a);
}

}  // namespace pgolf
