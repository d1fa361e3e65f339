#include "ops/adamw.h"

#include "bind.h"

namespace pgolf {
namespace {

void adamw(int device, uintptr_t stream, int build, int shared_memory, int grad_type, int copy_type, uintptr_t weight,
           uintptr_t mean, uintptr_t square, uintptr_t grad, uintptr_t copy, uintptr_t count, int64_t size, double lr,
           double beta1, double beta2, double eps, double weight_decay) {
    const Adamw params{.grad_type = static_cast<DType>(grad_type),
                       .copy_type = static_cast<DType>(copy_type),
                       .weight = pointer<float>(weight),
                       .mean = pointer<float>(mean),
                       .square = pointer<float>(square),
                       .grad = pointer<const void>(grad),
                       .copy = pointer<void>(copy),
                       .count = pointer<const int64_t>(count),
                       .size = size,
                       .lr = lr,
                       .beta1 = beta1,
                       .beta2 = beta2,
                       .eps = eps,
                       .weight_decay = weight_decay};
    generic::adamw(params, enter(device, stream, build, shared_memory));
}

}  // namespace

// Null pointers are 0.
void bind_adamw(py::module_& m) {
    m.def("adamw", &adamw, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "grad_type"_a,
          "copy_type"_a, "weight"_a, "mean"_a, "square"_a, "grad"_a, "copy"_a, "count"_a, "size"_a, "lr"_a, "beta1"_a,
          "beta2"_a, "eps"_a, "weight_decay"_a);
}

}  // namespace pgolf
