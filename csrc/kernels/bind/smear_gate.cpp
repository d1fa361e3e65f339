#include "ops/smear_gate.h"

#include "bind.h"

namespace pgolf {
namespace {

void smear_gate_forward(int device, uintptr_t stream, int dtype, uintptr_t e, uintptr_t ids, uintptr_t weight,
                        uintptr_t lambda, uintptr_t out, int64_t rows, int64_t length, int dim, int window,
                        int64_t bos) {
    const SmearGateForward params{.dtype = static_cast<DType>(dtype),
                                  .e = pointer<const void>(e),
                                  .ids = pointer<const int64_t>(ids),
                                  .weight = pointer<const float>(weight),
                                  .lambda = pointer<const float>(lambda),
                                  .out = pointer<void>(out),
                                  .rows = rows,
                                  .length = length,
                                  .dim = dim,
                                  .window = window,
                                  .bos = bos};
    generic::smear_gate_forward(params, enter(device, stream));
}

void smear_gate_backward(int device, uintptr_t stream, int dtype, uintptr_t grad, uintptr_t e, uintptr_t ids,
                         uintptr_t weight, uintptr_t lambda, uintptr_t grad_e, uintptr_t grad_weight,
                         uintptr_t grad_lambda, uintptr_t scratch, int64_t rows, int64_t length, int dim, int window,
                         int64_t bos) {
    const SmearGateBackward params{.dtype = static_cast<DType>(dtype),
                                   .grad = pointer<const void>(grad),
                                   .e = pointer<const void>(e),
                                   .ids = pointer<const int64_t>(ids),
                                   .weight = pointer<const float>(weight),
                                   .lambda = pointer<const float>(lambda),
                                   .grad_e = pointer<void>(grad_e),
                                   .grad_weight = pointer<float>(grad_weight),
                                   .grad_lambda = pointer<float>(grad_lambda),
                                   .scratch = pointer<float>(scratch),
                                   .rows = rows,
                                   .length = length,
                                   .dim = dim,
                                   .window = window,
                                   .bos = bos};
    generic::smear_gate_backward(params, enter(device, stream));
}

}  // namespace

void bind_smear_gate(py::module_& m) {
    m.def("smear_gate_forward", &smear_gate_forward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "e"_a, "ids"_a,
          "weight"_a, "lam"_a, "out"_a, "rows"_a, "length"_a, "dim"_a, "window"_a, "bos"_a);
    m.def("smear_gate_backward", &smear_gate_backward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "grad"_a,
          "e"_a, "ids"_a, "weight"_a, "lam"_a, "grad_e"_a, "grad_weight"_a, "grad_lam"_a, "scratch"_a, "rows"_a,
          "length"_a, "dim"_a, "window"_a, "bos"_a);
    m.def("smear_gate_scratch", &generic::smear_gate_scratch, "rows"_a, "window"_a);
}

}  // namespace pgolf
