#include "ops/qk_rope.h"

#include "bind.h"

namespace pgolf {
namespace {

void qk_rope_forward(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t qkv,
                     uintptr_t gain, uintptr_t cos, uintptr_t sin, uintptr_t out, int64_t rows, int64_t length,
                     int heads, int kv_heads, int head_dim, int half, float eps) {
    const QkRopeForward params{.dtype = static_cast<DType>(dtype),
                               .qkv = pointer<const void>(qkv),
                               .gain = pointer<const float>(gain),
                               .cos = pointer<const float>(cos),
                               .sin = pointer<const float>(sin),
                               .out = pointer<void>(out),
                               .rows = rows,
                               .length = length,
                               .heads = heads,
                               .kv_heads = kv_heads,
                               .head_dim = head_dim,
                               .half = half,
                               .eps = eps};
    generic::qk_rope_forward(params, enter(device, stream, build, shared_memory).stream);
}

void qk_rope_backward(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t grad_q,
                      int grad_q_stride, uintptr_t grad_k, int grad_k_stride, uintptr_t grad_v, int grad_v_stride,
                      uintptr_t grad_v_self, int grad_v_self_stride, uintptr_t qkv, uintptr_t gain, uintptr_t cos,
                      uintptr_t sin, uintptr_t grad_qkv, uintptr_t grad_gain, uintptr_t scratch, int64_t rows,
                      int64_t length, int heads, int kv_heads, int head_dim, int half, float eps) {
    const QkRopeBackward params{.dtype = static_cast<DType>(dtype),
                                .grad_q = {pointer<const void>(grad_q), grad_q_stride},
                                .grad_k = {pointer<const void>(grad_k), grad_k_stride},
                                .grad_v = {pointer<const void>(grad_v), grad_v_stride},
                                .grad_v_self = {pointer<const void>(grad_v_self), grad_v_self_stride},
                                .qkv = pointer<const void>(qkv),
                                .gain = pointer<const float>(gain),
                                .cos = pointer<const float>(cos),
                                .sin = pointer<const float>(sin),
                                .grad_qkv = pointer<void>(grad_qkv),
                                .grad_gain = pointer<float>(grad_gain),
                                .scratch = pointer<float>(scratch),
                                .rows = rows,
                                .length = length,
                                .heads = heads,
                                .kv_heads = kv_heads,
                                .head_dim = head_dim,
                                .half = half,
                                .eps = eps};
    generic::qk_rope_backward(params, enter(device, stream, build, shared_memory).stream);
}

}  // namespace

void bind_qk_rope(py::module_& m) {
    m.def("qk_rope_forward", &qk_rope_forward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "qkv"_a, "gain"_a, "cos"_a, "sin"_a, "out"_a, "rows"_a, "length"_a, "heads"_a, "kv_heads"_a,
          "head_dim"_a, "half"_a, "eps"_a);
    m.def("qk_rope_backward", &qk_rope_backward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "grad_q"_a, "grad_q_stride"_a, "grad_k"_a, "grad_k_stride"_a, "grad_v"_a, "grad_v_stride"_a,
          "grad_v_self"_a, "grad_v_self_stride"_a, "qkv"_a, "gain"_a, "cos"_a, "sin"_a, "grad_qkv"_a, "grad_gain"_a,
          "scratch"_a, "rows"_a, "length"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "half"_a, "eps"_a);
    m.def("qk_rope_scratch", &generic::qk_rope_scratch, "rows"_a, "heads"_a);
}

}  // namespace pgolf
