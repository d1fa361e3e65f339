#include "ops/lanes.h"

#include "bind.h"

namespace pgolf {
namespace {

LanesInputs inputs(int dtype, uintptr_t lane0, uintptr_t lane1, uintptr_t a, uintptr_t m, uintptr_t attn_scale,
                   uintptr_t mlp_scale, uintptr_t post, uintptr_t resid, int64_t rows, int dim) {
    return {.dtype = static_cast<DType>(dtype),
            .lane = {pointer<const void>(lane0), pointer<const void>(lane1)},
            .a = pointer<const void>(a),
            .m = pointer<const void>(m),
            .attn_scale = pointer<const float>(attn_scale),
            .mlp_scale = pointer<const float>(mlp_scale),
            .post = pointer<const float>(post),
            .resid = pointer<const float>(resid),
            .rows = rows,
            .dim = dim};
}

void lanes_forward(int device, uintptr_t stream, int build, int shared_memory, const LanesInputs& in, uintptr_t out0,
                   uintptr_t out1) {
    const LanesForward params{.in = in, .out = {pointer<void>(out0), pointer<void>(out1)}};
    generic::lanes_forward(params, enter(device, stream, build, shared_memory));
}

void lanes_backward(int device, uintptr_t stream, int build, int shared_memory, const LanesInputs& in,
                    uintptr_t grad_out0, uintptr_t grad_out1, uintptr_t grad_lane0, uintptr_t grad_lane1,
                    uintptr_t grad_a, uintptr_t grad_m, uintptr_t grad_parameters, uintptr_t scratch) {
    const LanesBackward params{.in = in,
                               .grad_out = {pointer<const void>(grad_out0), pointer<const void>(grad_out1)},
                               .grad_lane = {pointer<void>(grad_lane0), pointer<void>(grad_lane1)},
                               .grad_a = pointer<void>(grad_a),
                               .grad_m = pointer<void>(grad_m),
                               .grad_parameters = pointer<float>(grad_parameters),
                               .scratch = pointer<float>(scratch)};
    generic::lanes_backward(params, enter(device, stream, build, shared_memory));
}

}  // namespace

// Null pointers are 0.
void bind_lanes(py::module_& m) {
    py::class_<LanesInputs>(m, "LanesInputs")
        .def(py::init(&inputs), py::kw_only(), "dtype"_a, "lane0"_a, "lane1"_a, "a"_a, "m"_a, "attn_scale"_a,
             "mlp_scale"_a, "post"_a, "resid"_a, "rows"_a, "dim"_a);
    m.def("lanes_forward", &lanes_forward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "inputs"_a, "out0"_a, "out1"_a);
    m.def("lanes_backward", &lanes_backward, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a,
          "inputs"_a, "grad_out0"_a, "grad_out1"_a, "grad_lane0"_a, "grad_lane1"_a, "grad_a"_a, "grad_m"_a,
          "grad_parameters"_a, "scratch"_a);
    m.def("lanes_scratch", &generic::lanes_scratch, "rows"_a, "dim"_a, "floats of scratch on the current device");
}

}  // namespace pgolf
