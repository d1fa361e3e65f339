// The fused MLP products for any GPU from sm_80: the activation and its slope are the epilogue of a matrix product.
#include "generic/gemm.cuh"
#include "ops/mlp.h"

namespace pgolf::generic {
namespace {

// Squares, then rounds once; a bit of `signs` for each of the 8 columns.
struct UpEpilogue {
    __nv_bfloat16* hidden;
    uint8_t* signs;
    int64_t rows;
    int features;

    __device__ __forceinline__ void operator()(int, int64_t row, int col, float (&x)[8]) const {
        unsigned negative = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool below = x[i] < 0.0f;
            negative |= static_cast<unsigned>(below) << i;
            const float leaky = below ? 0.5f * x[i] : x[i];
            x[i] = leaky * leaky;
        }
        if (row >= rows) return;
        const int64_t offset = row * features + col;
        store<8>(hidden + offset, x);
        signs[offset / 8] = static_cast<uint8_t>(negative);
    }
};

struct GradEpilogue {
    const __nv_bfloat16* hidden;
    const uint8_t* signs;
    __nv_bfloat16* grad_pre;
    int64_t rows;
    int features;

    struct Operand {
        uint4 hidden;  // 8 of bfloat16
        unsigned negative;
    };

    __device__ __forceinline__ Operand read(int, int64_t row, int col) const {
        if (row >= rows) return {};
        const int64_t offset = row * features + col;
        return {__ldg(reinterpret_cast<const uint4*>(hidden + offset)), __ldg(signs + offset / 8)};
    }

    __device__ __forceinline__ void operator()(int, int64_t row, int col, float (&x)[8], const Operand& operand) const {
        if (row >= rows) return;
        const unsigned pairs[4] = {operand.hidden.x, operand.hidden.y, operand.hidden.z, operand.hidden.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // A bfloat16 is the upper half of a float32.
            const float squared = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
            float root;  // to 2^-23, far below the rounding of `squared`; 0 where that is below 2^-126
            asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(squared));
            x[i] *= root * (operand.negative >> i & 1 ? -1.0f : 2.0f);
        }
        store<8>(grad_pre + row * features + col, x);
    }
};

}  // namespace

void mlp_up(const MlpUp& p, const Target& target) {
    const GemmShape shape{
        .a = p.x, .b = p.weight, .m = p.rows, .n = p.features, .k = p.dim, .row_a = p.dim, .row_b = p.dim};
    const UpEpilogue epilogue{static_cast<__nv_bfloat16*>(p.hidden), p.signs, p.rows, p.features};
    launch_gemm(shape, epilogue, target, "mlp_up");
}

void mlp_grad(const MlpGrad& p, const Target& target) {
    const GemmShape shape{
        .a = p.grad, .b = p.weight, .m = p.rows, .n = p.features, .k = p.dim, .row_a = p.dim, .row_b = p.dim};
    const GradEpilogue epilogue{static_cast<const __nv_bfloat16*>(p.hidden), p.signs,
                                static_cast<__nv_bfloat16*>(p.grad_pre), p.rows, p.features};
    launch_gemm(shape, epilogue, target, "mlp_grad");
}

}  // namespace pgolf::generic
