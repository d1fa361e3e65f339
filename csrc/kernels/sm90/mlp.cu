// The MLP's two fused products on Hopper (sm90/gemm.cuh has the product, this file what happens to its tiles).
//
// Bound by the tensor cores only if the epilogues move little: instead of the pre-activation and the activation (what a
// backward through an activation usually keeps), one bfloat16 and one bit a value are written. The bit is the sign of
// the pre-activation, which the square loses; its size comes back as the root of `hidden`.
#include "common/reduce.cuh"
#include "ops/mlp.h"
#include "sm90/gemm.cuh"

namespace pgolf::sm90 {
namespace {

// The address, in a box, that a lane gives to stmatrix or ldmatrix for a warp's 16 rows from `row` and the 16 columns
// from 8 * chunk: matrices in the order rows 0-7, rows 8-15, then the same of the next 8 columns, as wgmma's registers
// are.
__device__ __forceinline__ uint32_t matrix_address(const char* box, int row, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    return shared_address(box) + swizzled(row + lane % 16, chunk + lane / 16);
}

struct Up {
    struct Params {
        CUtensorMap out_map;
        uint8_t* signs;
        int64_t rows;
        int features;
    };
    static constexpr bool kLoads = false, kStores = true;

    uint32_t signs[2][2] = {};  // [half][i]: of the lane's rows, in the order of `sums`, from the top bit down

    __device__ void begin(const Params&, int, int, int) {}

    template <int kBox>
    __device__ void box(const Params&, const float (&sums)[2][kTile / 2], char* box, int, int, int thread) {
        const int warp = thread / kWarpSize;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int chunk = 0; chunk < kDepth / 8; chunk += 2) {
                uint32_t packed[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    float value[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float x = sums[half][32 * kBox + 4 * chunk + 2 * r + e];
                        signs[half][r % 2] = __funnelshift_l(__float_as_uint(x), signs[half][r % 2], 1);
                        const float leaky = fmaxf(x, 0.5f * x);
                        value[e] = leaky * leaky;
                    }
                    packed[r] = pack(value[0], value[1]);
                }
                stmatrix(matrix_address(box, 64 * half + 16 * warp, chunk), packed[0], packed[1], packed[2], packed[3]);
            }
        }
    }

    __device__ void end(const Params& p, int row, int col, int thread) {
        const int lane = thread % kWarpSize, warp = thread / kWarpSize;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t global_row = static_cast<int64_t>(row) + 64 * half + 16 * warp + 8 * i + lane / 4;
                if (global_row < p.rows && col < p.features) {
                    auto* const target =
                        reinterpret_cast<uint32_t*>(p.signs + (col / kTile * p.rows + global_row) * 16);
                    target[lane % 4] = __brev(signs[half][i]);  // the first column last in, so first out
                }
            }
        }
    }
};

struct Grad {
    struct Params {
        CUtensorMap in_map, out_map;
        const uint8_t* signs;
        int64_t rows;
        int features;
    };
    static constexpr bool kLoads = true, kStores = true;

    uint32_t signs[2][2];  // [half][i]: of the lane's rows and columns, in the order of `sums`

    __device__ void begin(const Params& p, int row, int col, int thread) {
        const int lane = thread % kWarpSize, warp = thread / kWarpSize;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t global_row = static_cast<int64_t>(row) + 64 * half + 16 * warp + 8 * i + lane / 4;
                signs[half][i] = 0;
                if (global_row < p.rows && col < p.features) {
                    const auto* const source = p.signs + (col / kTile * p.rows + global_row) * 16;
                    signs[half][i] = __ldg(reinterpret_cast<const uint32_t*>(source) + lane % 4);
                }
            }
        }
    }

    template <int kBox>
    __device__ void box(const Params&, const float (&sums)[2][kTile / 2], char* box, int, int, int thread) {
        const int warp = thread / kWarpSize;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int chunk = 0; chunk < kDepth / 8; chunk += 2) {
                const uint32_t address = matrix_address(box, 64 * half + 16 * warp, chunk);
                uint32_t hidden[4];
                ldmatrix(address, hidden);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int j = kDepth / 8 * kBox + chunk + r / 2;
                    const float size[2] = {low_half(hidden[r]), high_half(hidden[r])};
                    float value[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float root;
                        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(size[e]));
                        const float product = sums[half][4 * j + 2 * (r % 2) + e] * root;
                        const bool negative = signs[half][r % 2] >> (2 * j + e) & 1;
                        value[e] = negative ? -product : product + product;
                    }
                    hidden[r] = pack(value[0], value[1]);
                }
                stmatrix(address, hidden[0], hidden[1], hidden[2], hidden[3]);
            }
        }
    }

    __device__ void end(const Params&, int, int, int) {}
};

}  // namespace

void mlp_up(const MlpUp& p, const Target& target) {
    if (p.rows == 0) return;
    const Up::Params params{.out_map = tensor_map(p.hidden, p.rows, p.features, kTile),
                            .signs = p.signs,
                            .rows = p.rows,
                            .features = p.features};
    gemm<Up>(p.x, p.weight, p.rows, p.features, p.dim, params, target.stream, "mlp_up");
}

void mlp_grad(const MlpGrad& p, const Target& target) {
    if (p.rows == 0) return;
    const Grad::Params params{.in_map = tensor_map(p.hidden, p.rows, p.features, kTile),
                              .out_map = tensor_map(p.grad_pre, p.rows, p.features, kTile),
                              .signs = p.signs,
                              .rows = p.rows,
                              .features = p.features};
    gemm<Grad>(p.grad, p.weight, p.rows, p.features, p.dim, params, target.stream, "mlp_grad");
}

}  // namespace pgolf::sm90
