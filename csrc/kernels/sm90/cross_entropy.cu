// The product of the softcapped cross-entropy on Hopper. A warpgroup's epilogue hides behind the other's products if it
// takes less than their 4096 cycles a tile: 2560 of the special-function unit (common/softcap.cuh) leave room for the
// rest, which is why two logits share a reciprocal.
#include "common/reduce.cuh"
#include "common/softcap.cuh"
#include "ops/cross_entropy.h"
#include "sm90/gemm.cuh"

namespace pgolf::sm90 {
namespace {

static_assert(kTile == kCrossEntropyTile);

template <bool kTerms>
struct Logits {
    struct Params {
        CUtensorMap out_map;  // of the terms
        Softcap cap;          // with terms
        const float* caps;    // without
        const int64_t* targets;
        float* sums;
        int64_t rows;
        int vocab;
    };
    static constexpr bool kLoads = false, kStores = kTerms;

    // [half][i], of the lane's rows: the target, and the sum of exp(z) over the lane's columns. Of a bad target 32 bits
    // are as good as all: whatever is summed, cross_entropy_rows gives NaN.
    int target[2][2];
    float sum[2][2] = {};

    static __device__ __forceinline__ int64_t row_of(int row, int half, int i, int thread) {
        const int lane = thread % kWarpSize, warp = thread / kWarpSize;
        return static_cast<int64_t>(row) + 64 * half + 16 * warp + 8 * i + lane / 4;
    }

    __device__ void begin(const Params& p, int row, int, int thread) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t global_row = row_of(row, half, i, thread);
                target[half][i] = global_row < p.rows ? static_cast<int>(__ldg(p.targets + global_row)) : 0;
            }
        }
    }

    template <int kBox>
    __device__ void box(const Params& p, const float (&logits)[2][kTile / 2], char* box, int, int col, int thread) {
        if constexpr (kTerms) {
            add<kBox>(p, logits, box, col, thread, OneCap{p.cap});
        } else {
            add<kBox>(p, logits, box, col, thread, TwoCaps{softcap(__ldg(p.caps)), softcap(__ldg(p.caps + 1))});
        }
    }

    template <int kBox, typename Caps>
    __device__ __forceinline__ void add(const Params& p, const float (&logits)[2][kTile / 2], char* box, int col,
                                        int thread, const Caps& caps) {
        const int lane = thread % kWarpSize, warp = thread / kWarpSize;
        const int first = col + kBox * kDepth;
        const int chunks = (p.vocab - first) / 8;  // of 8 columns, within the vocabulary; the rest is not summed
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // What a lane gives to stmatrix for the first 16 columns of its warp's 16 rows: matrices in the order rows
            // 0-7, rows 8-15, then the same of the next 8 columns. An XOR with 16 `chunk` reaches the columns from 8
            // `chunk`.
            const uint32_t address = shared_address(box) + swizzled(64 * half + 16 * warp + lane % 16, lane / 16);
            // Where 8 j + e is this, the column is the row's target.
            const int skip[2] = {target[half][0] - first - lane % 4 * 2, target[half][1] - first - lane % 4 * 2};
#pragma unroll
            for (int chunk = 0; chunk < kDepth / 8; chunk += 2) {
                uint32_t packed[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int j = chunk + k / 2, i = k % 2;
                    const float* const u = &logits[half][32 * kBox + 4 * j + 2 * i];
                    const Softcap used[2] = {caps.of(u[0]), caps.of(u[1])};
                    float r[2], value[2];
                    softcap_reciprocals(u[0], u[1], used[0], used[1], r[0], r[1]);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        value[e] = softcapped_exp(r[e], used[e]);
                        if (j < chunks && 8 * j + e != skip[i]) sum[half][i] += value[e];
                    }
                    packed[k] = pack(value[0] * quarter_slope(r[0]), value[1] * quarter_slope(r[1]));
                }
                if constexpr (kTerms) {
                    stmatrix(address ^ 16 * chunk, packed[0], packed[1], packed[2], packed[3]);
                }
            }
        }
    }

    __device__ void end(const Params& p, int row, int col, int thread) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float of_row = sum[half][i];  // the four lanes of a row add up their columns
                of_row += __shfl_xor_sync(kAllLanes, of_row, 1);
                of_row += __shfl_xor_sync(kAllLanes, of_row, 2);
                const int64_t global_row = row_of(row, half, i, thread);
                if (thread % 4 == 0 && global_row < p.rows && col < p.vocab) {
                    p.sums[col / kTile * p.rows + global_row] = of_row;
                }
            }
        }
    }
};

template <bool kTerms>
void launch(const CrossEntropyLogits& p, const Target& target, const char* name) {
    typename Logits<kTerms>::Params params{.out_map = {},
                                           .cap = softcap(p.cap),
                                           .caps = p.caps,
                                           .targets = p.targets,
                                           .sums = p.sums,
                                           .rows = p.rows,
                                           .vocab = p.vocab};
    if constexpr (kTerms) params.out_map = tensor_map(p.terms, p.rows, p.vocab, kTile);
    gemm<Logits<kTerms>>(p.h, p.weight, p.rows, p.vocab, p.dim, params, target.stream, name);
}

}  // namespace

void cross_entropy_logits(const CrossEntropyLogits& p, const Target& target) {
    if (p.rows == 0) return;
    if (p.terms) {
        launch<true>(p, target, "cross_entropy_logits");
    } else {
        launch<false>(p, target, "cross_entropy_logits (no terms)");
    }
}

}  // namespace pgolf::sm90
