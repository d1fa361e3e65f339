#include "ops/residual.h"

#include "bind.h"

namespace pgolf {
namespace {

ResidualInputs inputs(int dtype, uintptr_t x, uintptr_t branch, uintptr_t branch_scale, uintptr_t skip,
                      uintptr_t skip_weight, uintptr_t skip_gate, uintptr_t x0, uintptr_t mix, uintptr_t gate_weight,
                      int64_t rows, int dim, int heads, int window, float gate_scale, float norm_scale, float eps) {
    return {.dtype = static_cast<DType>(dtype),
            .x = pointer<const void>(x),
            .branch = pointer<const void>(branch),
            .skip = pointer<const void>(skip),
            .x0 = pointer<const void>(x0),
            .branch_scale = pointer<const float>(branch_scale),
            .skip_weight = pointer<const float>(skip_weight),
            .skip_gate = pointer<const float>(skip_gate),
            .mix = pointer<const float>(mix),
            .gate_weight = pointer<const float>(gate_weight),
            .rows = rows,
            .dim = dim,
            .heads = heads,
            .window = window,
            .gate_scale = gate_scale,
            .norm_scale = norm_scale,
            .eps = eps};
}

void residual_forward(int device, uintptr_t stream, int build, int shared_memory, const ResidualInputs& in,
                      uintptr_t sum, uintptr_t blend, uintptr_t stream_out, uintptr_t normed, uintptr_t gate) {
    const ResidualForward params{.in = in,
                                 .sum = pointer<void>(sum),
                                 .blend = pointer<void>(blend),
                                 .stream = pointer<void>(stream_out),
                                 .normed = pointer<void>(normed),
                                 .gate = pointer<void>(gate)};
    generic::residual_forward(params, enter(device, stream, build, shared_memory));
}

void residual_backward(int device, uintptr_t stream, int build, int shared_memory, const ResidualInputs& in,
                       uintptr_t gate, uintptr_t grad_sum, uintptr_t grad_blend, uintptr_t grad_stream,
                       uintptr_t grad_normed, uintptr_t grad_gate, uintptr_t grad_x0_out, uintptr_t grad_x,
                       uintptr_t grad_branch, uintptr_t grad_skip, uintptr_t grad_x0, uintptr_t grad_parameters,
                       uintptr_t scratch) {
    const ResidualBackward params{.in = in,
                                  .gate = pointer<const void>(gate),
                                  .grad_sum = pointer<const void>(grad_sum),
                                  .grad_blend = pointer<const void>(grad_blend),
                                  .grad_stream = pointer<const void>(grad_stream),
                                  .grad_normed = pointer<const void>(grad_normed),
                                  .grad_gate = pointer<const void>(grad_gate),
                                  .grad_x0_out = pointer<const void>(grad_x0_out),
                                  .grad_x = pointer<void>(grad_x),
                                  .grad_branch = pointer<void>(grad_branch),
                                  .grad_skip = pointer<void>(grad_skip),
                                  .grad_x0 = pointer<void>(grad_x0),
                                  .grad_parameters = pointer<float>(grad_parameters),
                                  .scratch = pointer<float>(scratch)};
    generic::residual_backward(params, enter(device, stream, build, shared_memory));
}

}  // namespace

// Null pointers are 0.
void bind_residual(py::module_& m) {
    py::class_<ResidualInputs>(m, "ResidualInputs")
        .def(py::init(&inputs), py::kw_only(), "dtype"_a, "x"_a, "branch"_a, "branch_scale"_a, "skip"_a,
             "skip_weight"_a, "skip_gate"_a, "x0"_a, "mix"_a, "gate_weight"_a, "rows"_a, "dim"_a, "heads"_a, "window"_a,
             "gate_scale"_a, "norm_scale"_a, "eps"_a);
    m.def("residual_forward", &residual_forward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "inputs"_a, "sum"_a, "blend"_a, "stream_out"_a, "normed"_a, "gate"_a);
    m.def("residual_backward", &residual_backward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "inputs"_a, "gate"_a, "grad_sum"_a, "grad_blend"_a, "grad_stream"_a, "grad_normed"_a, "grad_gate"_a,
          "grad_x0_out"_a, "grad_x"_a, "grad_branch"_a, "grad_skip"_a, "grad_x0"_a, "grad_parameters"_a, "scratch"_a);
    m.def("residual_scratch", &generic::residual_scratch, "rows"_a, "dim"_a, "parameters"_a,
          "floats of scratch on the current device");
}

}  // namespace pgolf
