#include "ops/xsa_gate.h"

#include "bind.h"

namespace pgolf {
namespace {

void xsa_gate_forward(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t y, uintptr_t v,
                      int64_t v_stride, uintptr_t gate, uintptr_t out, int64_t rows, int kv_heads, int group,
                      int head_dim) {
    const XsaGateForward params{.dtype = static_cast<DType>(dtype),
                                .y = pointer<const void>(y),
                                .v = pointer<const void>(v),
                                .gate = pointer<const void>(gate),
                                .out = pointer<void>(out),
                                .v_stride = v_stride,
                                .rows = rows,
                                .kv_heads = kv_heads,
                                .group = group,
                                .head_dim = head_dim};
    generic::xsa_gate_forward(params, enter(device, stream, build, shared_memory).stream);
}

void xsa_gate_backward(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t grad,
                       uintptr_t y, uintptr_t v, int64_t v_stride, uintptr_t gate, uintptr_t grad_y, uintptr_t grad_v,
                       uintptr_t grad_gate, int64_t rows, int kv_heads, int group, int head_dim) {
    const XsaGateBackward params{.dtype = static_cast<DType>(dtype),
                                 .grad = pointer<const void>(grad),
                                 .y = pointer<const void>(y),
                                 .v = pointer<const void>(v),
                                 .gate = pointer<const void>(gate),
                                 .grad_y = pointer<void>(grad_y),
                                 .grad_v = pointer<void>(grad_v),
                                 .grad_gate = pointer<void>(grad_gate),
                                 .v_stride = v_stride,
                                 .rows = rows,
                                 .kv_heads = kv_heads,
                                 .group = group,
                                 .head_dim = head_dim};
    generic::xsa_gate_backward(params, enter(device, stream, build, shared_memory).stream);
}

}  // namespace

void bind_xsa_gate(py::module_& m) {
    m.def("xsa_gate_forward", &xsa_gate_forward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "y"_a, "v"_a, "v_stride"_a, "gate"_a, "out"_a, "rows"_a, "kv_heads"_a, "group"_a, "head_dim"_a);
    m.def("xsa_gate_backward", &xsa_gate_backward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "grad"_a, "y"_a, "v"_a, "v_stride"_a, "gate"_a, "grad_y"_a, "grad_v"_a, "grad_gate"_a, "rows"_a,
          "kv_heads"_a, "group"_a, "head_dim"_a);
}

}  // namespace pgolf
