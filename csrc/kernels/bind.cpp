// pgolf._kernels: integers in (pointers, sizes, stream), exceptions out. Shapes, types and devices are checked in
// pgolf/ops, which knows tensors; nothing here does.
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "dispatch.h"
#include "ops.h"

namespace py = pybind11;
using namespace py::literals;
using namespace pgolf;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The stream to launch on, after making its device current for this module's copy of the CUDA runtime.
cudaStream_t enter(int device, uintptr_t stream) {
    check(cudaSetDevice(device), "set device");
    return reinterpret_cast<cudaStream_t>(stream);
}

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

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "pgolf's CUDA kernels; called by pgolf.ops, which checks the arguments";
    m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
    m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
    m.def("archs", [] { return py::str(PGOLF_ARCHS).attr("split")(","); });
    m.def("build_for", &build_for, "major"_a, "minor"_a, "shared_memory"_a);

    m.def("smear_gate_forward", &smear_gate_forward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "e"_a, "ids"_a,
          "weight"_a, "lam"_a, "out"_a, "rows"_a, "length"_a, "dim"_a, "window"_a, "bos"_a);
    m.def("smear_gate_backward", &smear_gate_backward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "grad"_a,
          "e"_a, "ids"_a, "weight"_a, "lam"_a, "grad_e"_a, "grad_weight"_a, "grad_lam"_a, "scratch"_a, "rows"_a,
          "length"_a, "dim"_a, "window"_a, "bos"_a);
    m.def("smear_gate_scratch", &generic::smear_gate_scratch, "rows"_a, "window"_a);
}
