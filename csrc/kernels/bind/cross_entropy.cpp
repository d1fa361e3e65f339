#include "ops/cross_entropy.h"

#include "bind.h"

namespace pgolf {
namespace {

void cross_entropy_logits(int device, uintptr_t stream, int build, int shared_memory, uintptr_t h, uintptr_t weight,
                          uintptr_t targets, float cap, uintptr_t caps, uintptr_t terms, uintptr_t sums, int64_t rows,
                          int vocab, int dim) {
    const CrossEntropyLogits params{.h = pointer<const void>(h),
                                    .weight = pointer<const void>(weight),
                                    .targets = pointer<const int64_t>(targets),
                                    .cap = cap,
                                    .caps = pointer<const float>(caps),
                                    .terms = pointer<void>(terms),
                                    .sums = pointer<float>(sums),
                                    .rows = rows,
                                    .vocab = vocab,
                                    .dim = dim};
    const Target target = enter(device, stream, build, shared_memory);
#ifdef PGOLF_SM90
    if (target.build == Build::kSm90) return sm90::cross_entropy_logits(params, target);
#endif
    generic::cross_entropy_logits(params, target);
}

void cross_entropy_rows(int device, uintptr_t stream, uintptr_t h, uintptr_t weight, uintptr_t targets, float cap,
                        uintptr_t caps, uintptr_t sums, float loss_weight, uintptr_t terms, uintptr_t scaled_h,
                        uintptr_t row_scale, uintptr_t losses, int64_t rows, int vocab, int dim) {
    const CrossEntropyRows params{.h = pointer<const void>(h),
                                  .weight = pointer<const void>(weight),
                                  .targets = pointer<const int64_t>(targets),
                                  .cap = cap,
                                  .caps = pointer<const float>(caps),
                                  .sums = pointer<const float>(sums),
                                  .loss_weight = loss_weight,
                                  .terms = pointer<void>(terms),
                                  .scaled_h = pointer<void>(scaled_h),
                                  .row_scale = pointer<float>(row_scale),
                                  .losses = pointer<float>(losses),
                                  .rows = rows,
                                  .vocab = vocab,
                                  .dim = dim};
    generic::cross_entropy_rows(params, enter(device, stream));
}

void cross_entropy_scale(int device, uintptr_t stream, int dtype, uintptr_t x, uintptr_t row_scale, uintptr_t grad,
                         uintptr_t out, int64_t rows, int dim) {
    const CrossEntropyScale params{.dtype = static_cast<DType>(dtype),
                                   .x = pointer<const void>(x),
                                   .row_scale = pointer<const float>(row_scale),
                                   .grad = pointer<const float>(grad),
                                   .out = pointer<void>(out),
                                   .rows = rows,
                                   .dim = dim};
    generic::cross_entropy_scale(params, enter(device, stream));
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
    m.def("cross_entropy_logits", &cross_entropy_logits, py::kw_only(), "device"_a, "stream"_a, "build"_a,
          "shared_memory"_a, "h"_a, "weight"_a, "targets"_a, "cap"_a, "caps"_a, "terms"_a, "sums"_a, "rows"_a,
          "vocab"_a, "dim"_a);
    m.def("cross_entropy_rows", &cross_entropy_rows, py::kw_only(), "device"_a, "stream"_a, "h"_a, "weight"_a,
          "targets"_a, "cap"_a, "caps"_a, "sums"_a, "loss_weight"_a, "terms"_a, "scaled_h"_a, "row_scale"_a, "losses"_a,
          "rows"_a, "vocab"_a, "dim"_a);
    m.def("cross_entropy_scale", &cross_entropy_scale, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "x"_a,
          "row_scale"_a, "grad"_a, "out"_a, "rows"_a, "dim"_a);
    m.def("cross_entropy_tiles", &cross_entropy_tiles, "vocab"_a);
}

}  // namespace pgolf
