// The fused MLP products for any GPU from sm_80: the activation and its slope are the epilogue of a matrix product.
#include "common/reduce.cuh"
#include "generic/gemm.cuh"
#include "ops/mlp.h"

namespace pgolf::generic {
namespace {

// Bit i of the low half moved to bit 2 i.
__device__ __forceinline__ unsigned spread(unsigned x) {
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
}

// Squares, then rounds once; the signs of a row's 128 columns are gathered from the 16 lanes that hold them.
struct UpEpilogue {
    __nv_bfloat16* hidden;
    uint8_t* signs;
    int64_t rows;
    int features;

    __device__ __forceinline__ void operator()(int, int64_t row, int col, float (&x)[8]) const {
        const int lane = threadIdx.x % kWarpSize, place = lane % 16;  // columns 8 * place to 8 * place + 7 of the tile
        unsigned word = 0;                                            // of lanes 0 to 3: word `place`
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const unsigned negative = __ballot_sync(kAllLanes, x[i] < 0.0f) >> (lane - place) & 0xffff;
            if (i / 2 == place) word |= spread(negative) << i % 2;
            const float leaky = fmaxf(x[i], 0.5f * x[i]);
            x[i] = leaky * leaky;
        }
        if (row >= rows) return;
        const int64_t offset = row * features + col;
        store<8>(hidden + offset, x);
        if (place < 4) reinterpret_cast<uint32_t*>(signs + (col / 128 * rows + row) * 16)[place] = word;
    }
};

struct GradEpilogue {
    const __nv_bfloat16* hidden;
    const uint8_t* signs;
    __nv_bfloat16* grad_pre;
    int64_t rows;
    int features;

    struct Operand {
        uint4 hidden;   // 8 of bfloat16
        uint32_t word;  // of the tile's signs: the lane's of four, the same in every fourth lane
    };

    __device__ __forceinline__ Operand read(int, int64_t row, int col) const {
        if (row >= rows) return {};
        const int64_t offset = row * features + col;
        const auto* const words = reinterpret_cast<const uint32_t*>(signs + (col / 128 * rows + row) * 16);
        return {__ldg(reinterpret_cast<const uint4*>(hidden + offset)), __ldg(words + threadIdx.x % 4)};
    }

    __device__ __forceinline__ void operator()(int, int64_t row, int col, float (&x)[8], const Operand& operand) const {
        const int place = threadIdx.x % 16;
        unsigned negative = 0;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            negative |= (__shfl_sync(kAllLanes, operand.word, q, 4) >> (2 * place) & 3) << (2 * q);
        }
        if (row >= rows) return;
        const unsigned pairs[4] = {operand.hidden.x, operand.hidden.y, operand.hidden.z, operand.hidden.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // A bfloat16 is the upper half of a float32.
            const float squared = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
            float root;  // to 2^-23, far below the rounding of `squared`; 0 where that is below 2^-126
            asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(squared));
            x[i] *= root * (negative >> i & 1 ? -1.0f : 2.0f);
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
