#include "ops/embed.h"

#include "bind.h"

namespace pgolf {
namespace {

void embed_forward(int device, uintptr_t stream, int build, int shared_memory, int dtype, uintptr_t ids,
                   uintptr_t weight, uintptr_t gate_weight, uintptr_t lambda, uintptr_t out, uintptr_t statistics,
                   int64_t rows, int length, int dim, int window, int vocab, int64_t bos, float eps) {
    const EmbedForward params{.dtype = static_cast<DType>(dtype),
                              .ids = pointer<const int64_t>(ids),
                              .weight = pointer<const void>(weight),
                              .gate_weight = pointer<const float>(gate_weight),
                              .lambda = pointer<const float>(lambda),
                              .out = pointer<void>(out),
                              .statistics = pointer<float>(statistics),
                              .rows = rows,
                              .length = length,
                              .dim = dim,
                              .window = window,
                              .vocab = vocab,
                              .bos = bos,
                              .eps = eps};
    generic::embed_forward(params, enter(device, stream, build, shared_memory));
}

void embed_backward(int device, uintptr_t stream, int build, int shared_memory, int dtype, int grad_dtype,
                    uintptr_t grad, uintptr_t ids, uintptr_t weight, uintptr_t gate_weight, uintptr_t lambda,
                    uintptr_t statistics, uintptr_t grad_weight, uintptr_t grad_gate_weight, uintptr_t grad_lambda,
                    uintptr_t scratch, int64_t rows, int dim, int window, int vocab) {
    const EmbedBackward params{.dtype = static_cast<DType>(dtype),
                               .grad_dtype = static_cast<DType>(grad_dtype),
                               .grad = pointer<const void>(grad),
                               .ids = pointer<const int64_t>(ids),
                               .weight = pointer<const void>(weight),
                               .gate_weight = pointer<const float>(gate_weight),
                               .lambda = pointer<const float>(lambda),
                               .statistics = pointer<const float>(statistics),
                               .grad_weight = pointer<void>(grad_weight),
                               .grad_gate_weight = pointer<float>(grad_gate_weight),
                               .grad_lambda = pointer<float>(grad_lambda),
                               .scratch = pointer<void>(scratch),
                               .rows = rows,
                               .dim = dim,
                               .window = window,
                               .vocab = vocab};
    generic::embed_backward(params, enter(device, stream, build, shared_memory));
}

}  // namespace

void bind_embed(py::module_& m) {
    m.def("embed_forward", &embed_forward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "ids"_a, "weight"_a, "gate_weight"_a, "lam"_a, "out"_a, "statistics"_a, "rows"_a, "length"_a,
          "dim"_a, "window"_a, "vocab"_a, "bos"_a, "eps"_a);
    m.def("embed_backward", &embed_backward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "dtype"_a, "grad_dtype"_a, "grad"_a, "ids"_a, "weight"_a, "gate_weight"_a, "lam"_a, "statistics"_a,
          "grad_weight"_a, "grad_gate_weight"_a, "grad_lam"_a, "scratch"_a, "rows"_a, "dim"_a, "window"_a, "vocab"_a);
    m.def("embed_scratch", &generic::embed_scratch, "rows"_a, "dim"_a, "vocab"_a);
}

}  // namespace pgolf
