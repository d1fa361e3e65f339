// pgolf._kernels: one function of bind/ an operator.
#include "bind/bind.h"

#include "dispatch.h"
#include "generic/tiles.h"

namespace pgolf {

void bind_adamw(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_embed(py::module_& m);
void bind_gptq(py::module_& m);
void bind_lanes(py::module_& m);
void bind_mlp(py::module_& m);
void bind_polar_express(py::module_& m);
void bind_qk_rope(py::module_& m);
void bind_residual(py::module_& m);
void bind_row_order(py::module_& m);
void bind_smear_gate(py::module_& m);
void bind_xsa_gate(py::module_& m);
void bind_trellis(py::module_& m);

}  // namespace pgolf

PYBIND11_MODULE(_kernels, m) {
    using namespace pgolf;
    m.doc() = "pgolf's CUDA kernels; called by pgolf.ops, which checks the arguments";
    m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
    m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
    py::dict builds("generic"_a = static_cast<int>(Build::kGeneric));
#ifdef PGOLF_SM90
    builds["sm90"] = static_cast<int>(Build::kSm90);
#endif
    m.attr("BUILDS") = builds;
    m.def("archs", [] { return py::str(PGOLF_ARCHS).attr("split")(","); });
    m.def(
        "build_for",
        [](int major, int minor, int shared_memory) { return name_of(build_for(major, minor, shared_memory)); },
        "major"_a, "minor"_a, "shared_memory"_a);
    m.def(
        "gemm_tile",
        [](int shared_memory) {
            const generic::GemmTile tile = generic::gemm_tile(shared_memory);
            return py::make_tuple(tile.m, tile.n, tile.k, tile.stages, tile.bytes());
        },
        "shared_memory"_a, "(m, n, k, stages, bytes of shared memory) of a block of the generic matrix products");

    bind_adamw(m);
    bind_cross_entropy(m);
    bind_embed(m);
    bind_gptq(m);
    bind_lanes(m);
    bind_mlp(m);
    bind_polar_express(m);
    bind_qk_rope(m);
    bind_residual(m);
    bind_row_order(m);
    bind_smear_gate(m);
    bind_xsa_gate(m);
    bind_trellis(m);
}
