// Cross-entropy of softcapped logits for any GPU from sm_80: the product, whose epilogue keeps one bfloat16 of each
// logit; and, for every build, the work on rows around it, bound by memory.
#include <cmath>

#include "common/check.h"
#include "common/reduce.cuh"
#include "common/softcap.cuh"
#include "common/vec.cuh"
#include "generic/gemm.cuh"
#include "ops/cross_entropy.h"

namespace pgolf::generic {
namespace {

// --- The product --------------------------------------------------------------------------------------------------

template <bool kTerms>
struct LogitsEpilogue {
    CrossEntropyLogits p;
    Softcap cap;

    __device__ __forceinline__ void operator()(int, int64_t row, int col, float (&x)[8]) const {
        // Through the read-only path: the reads of many rows are under way together, whatever is written meanwhile. Of
        // a bad target 32 bits are as good as all: whatever is summed, cross_entropy_rows gives NaN.
        const int skip = static_cast<int>(__ldg(p.targets + (row < p.rows ? row : 0)) - col);
        if constexpr (kTerms) {
            finish(row, col, x, skip, OneCap{cap});
        } else {
            finish(row, col, x, skip, TwoCaps{softcap(__ldg(p.caps)), softcap(__ldg(p.caps + 1))});
        }
    }

    template <typename Caps>
    __device__ __forceinline__ void finish(int64_t row, int col, float (&x)[8], int skip, const Caps& caps) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const Softcap used[2] = {caps.of(x[i]), caps.of(x[i + 1])};
            float r[2];
            softcap_reciprocals(x[i], x[i + 1], used[0], used[1], r[0], r[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float value = softcapped_exp(r[e], used[e]);
                if (i + e != skip) sum += value;
                x[i + e] = value * quarter_slope(r[e]);
            }
        }
        const bool exists = row < p.rows && col < p.vocab;  // of all 8 columns
        if (!exists) sum = 0.0f;
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (!exists) return;
        if (col % kCrossEntropyTile == 0) p.sums[col / kCrossEntropyTile * p.rows + row] = sum;
        if constexpr (kTerms) store<8>(static_cast<__nv_bfloat16*>(p.terms) + row * p.vocab + col, x);
    }
};

// --- The rows -----------------------------------------------------------------------------------------------------

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kVector = kVectorBytes / sizeof(__nv_bfloat16);

unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

__device__ __forceinline__ int64_t warp_row() {
    return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

// A warp a row.
template <bool kTerms>
__global__ void __launch_bounds__(kThreads) cross_entropy_rows_kernel(const CrossEntropyRows p) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = warp_row();
    if (row >= p.rows) return;
    const int64_t target = p.targets[row];
    const bool known = target >= 0 && target < p.vocab;
    const auto* const h = static_cast<const __nv_bfloat16*>(p.h) + row * p.dim;
    const auto* const weight = static_cast<const __nv_bfloat16*>(p.weight) + (known ? target : 0) * p.dim;

    float others = 0.0f;
    for (int tile = lane; tile * kCrossEntropyTile < p.vocab; tile += kWarpSize) others += p.sums[tile * p.rows + row];
    float dots[2] = {};
    for (int c = lane * kVector; c < p.dim; c += kWarpSize * kVector) {
        float x[kVector], y[kVector];
        load<kVector>(h + c, x);
        load<kVector>(weight + c, y);
#pragma unroll
        for (int i = 0; i < kVector; ++i) dots[i % 2] = fmaf(x[i], y[i], dots[i % 2]);
    }
    others = warp_sum(others);
    const float logit = known ? warp_sum(dots[0] + dots[1]) : NAN;

    float cap = p.cap;
    if constexpr (!kTerms) {
        const float above = p.caps[0], elsewhere = p.caps[1];
        const bool fit = above > 0.0f && above <= kMaxSoftcap && elsewhere > 0.0f && elsewhere <= kMaxSoftcap;
        cap = !fit ? NAN : logit > 0.0f ? above : elsewhere;
    }
    const float x = logit / cap;
    const float z = cap * tanhf(x);
    const float of_target = expf(z);
    const float sum = others + of_target;
    // The first form loses nothing where the target is all but certain, the second nowhere else and cannot overflow.
    const float loss = others < of_target ? log1pf(others / of_target) : logf(sum) - z;
    if (lane == 0) p.losses[row] = loss;
    if constexpr (kTerms) {
        const float scale = 4.0f * p.loss_weight / sum;
        if (lane == 0) {
            p.row_scale[row] = scale;
            // (1 - tanh^2) / 4 = w / (1 + w)^2 with w = e^(-2 |x|): no difference of nearly equal numbers.
            const float w = expf(-2.0f * fabsf(x));
            const float r = 1.0f / (1.0f + w);
            if (known) {
                auto* const terms = static_cast<__nv_bfloat16*>(p.terms) + row * p.vocab;
                terms[target] = from_float<__nv_bfloat16>(-others * (w * r * r));
            }
        }
        if (p.scaled_h == nullptr) return;
        auto* const scaled_h = static_cast<__nv_bfloat16*>(p.scaled_h) + row * p.dim;
        for (int c = lane * kVector; c < p.dim; c += kWarpSize * kVector) {
            float y[kVector];
            load<kVector>(h + c, y);
#pragma unroll
            for (int i = 0; i < kVector; ++i) y[i] *= scale;
            store<kVector>(scaled_h + c, y);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) cross_entropy_scale_kernel(const CrossEntropyScale p) {
    const int64_t row = warp_row();
    if (row >= p.rows) return;
    const auto* const x = static_cast<const T*>(p.x) + row * p.dim;
    auto* const out = static_cast<__nv_bfloat16*>(p.out) + row * p.dim;
    const float scale = (p.row_scale ? p.row_scale[row] : 1.0f) * *p.grad;
    for (int c = threadIdx.x % kWarpSize * kVector; c < p.dim; c += kWarpSize * kVector) {
        float y[kVector];
        load<kVector>(x + c, y);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] *= scale;
        store<kVector>(out + c, y);
    }
}

}  // namespace

void cross_entropy_logits(const CrossEntropyLogits& p, const Target& target) {
    const GemmShape shape{
        .a = p.h, .b = p.weight, .m = p.rows, .n = p.vocab, .k = p.dim, .row_a = p.dim, .row_b = p.dim};
    if (p.terms) {
        launch_gemm(shape, LogitsEpilogue<true>{p, softcap(p.cap)}, target, "cross_entropy_logits");
    } else {
        launch_gemm(shape, LogitsEpilogue<false>{p, {}}, target, "cross_entropy_logits (no terms)");
    }
}

void cross_entropy_rows(const CrossEntropyRows& p, cudaStream_t stream) {
    if (p.rows == 0) return;
    if (p.terms) {
        cross_entropy_rows_kernel<true><<<blocks_for(p.rows), kThreads, 0, stream>>>(p);
    } else {
        cross_entropy_rows_kernel<false><<<blocks_for(p.rows), kThreads, 0, stream>>>(p);
    }
    check_launch("cross_entropy_rows");
}

void cross_entropy_scale(const CrossEntropyScale& p, cudaStream_t stream) {
    if (p.rows == 0) return;
    if (p.dtype == DType::kFloat32) {
        cross_entropy_scale_kernel<float><<<blocks_for(p.rows), kThreads, 0, stream>>>(p);
    } else {
        cross_entropy_scale_kernel<__nv_bfloat16><<<blocks_for(p.rows), kThreads, 0, stream>>>(p);
    }
    check_launch("cross_entropy_scale");
}

}  // namespace pgolf::generic
