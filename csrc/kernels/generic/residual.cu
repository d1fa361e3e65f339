// The residual stream for any GPU from sm_80: bound by memory, one pass over the rows (rows.cuh). Computed in float32,
// each result rounded once.
#include "common/check.h"
#include "generic/residual.cuh"

namespace pgolf::generic {
namespace {

constexpr int kBlocks = 5;  // a multiprocessor

template <typename T, typename V>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    residual_forward_kernel(const ResidualForward p, int row_threads, float inverse_dim) {
    extern __shared__ uint4 shared[];
    __shared__ float2 sums[kStages][kRowThreads / kWarpSize];
    using Slots = RowSlots<T, V::kTensors>;
    const ResidualInputs& in = p.in;
    const RowWalk walk(in.dim, row_threads);
    const Slots slots(shared);
    const RowVectors vectors{reinterpret_cast<float4*>(shared + Slots::kBytes / sizeof(uint4)), row_threads};
    float* const gate_weight = reinterpret_cast<float*>(vectors.half(V::kVectors, 0, 0));
    float* const normed = gate_weight + gate_weight_floats(in.window) + walk.group * kWarpSize;  // the group's

    const auto fetch = [&](int stage, int64_t row) {
        if (row < in.rows) fetch_inputs<V>(slots, stage, in, row * in.dim + walk.column, walk.active);
        commit_copies();  // also when empty: the waits count groups
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, walk.first + stage * walk.step);
    fill_vectors<V>(vectors, in);
    if (p.gate != nullptr) fill_gate_weight(gate_weight, in);
    __syncthreads();

    int stage = 0;
    for (int64_t row = walk.first; row < in.rows; row += walk.step) {
        wait_copies<kStages - 1>();
        Values v;
        compute_values<V>(slots, stage, vectors, walk.thread, in, v);
        fetch(stage, row + kStages * walk.step);

        const int64_t offset = row * in.dim + walk.column;
        if (walk.active) {
            if constexpr (V::kHasBranch) {
                if (p.sum != nullptr) store_columns<T>(p.sum, offset, v.s);
            }
            if constexpr (V::kHasBranch || V::kHasSkip) {
                if (p.blend != nullptr) store_columns<T>(p.blend, offset, v.t);
            }
            if constexpr (V::kChanges) {
                if (p.stream != nullptr) store_columns<T>(p.stream, offset, v.u);
            }
        }
        float squares[2] = {};
#pragma unroll
        for (int i = 0; i < kColumns; ++i) squares[i % 2] = fmaf(v.u[i], v.u[i], squares[i % 2]);
        const float2 sum = row_sums(squares[0], squares[1], walk, &sums[stage][walk.group * walk.warps()]);
        const float scale = in.norm_scale * inverse_root(fmaf(sum.x + sum.y, inverse_dim, in.eps));
        float n[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) n[i] = scale * v.u[i];
        if (walk.active) store_columns<T>(p.normed, offset, n);

        if (p.gate != nullptr && walk.thread < kWarpSize) {
            share_normed<T>(n, walk.thread, normed);
            if (walk.thread < in.heads) {
                float logit[2] = {};
#pragma unroll 2
                for (int c = 0; c < in.window; c += 2) {
                    logit[0] = fmaf(normed[c], gate_weight[c * kGateStride + walk.thread], logit[0]);
                    if (c + 1 < in.window) {
                        logit[1] = fmaf(normed[c + 1], gate_weight[(c + 1) * kGateStride + walk.thread], logit[1]);
                    }
                }
                static_cast<T*>(p.gate)[row * in.heads + walk.thread] =
                    from_float<T>(sigmoid(in.gate_scale * (logit[0] + logit[1])));
            }
            __syncwarp();
        }
        stage ^= 1;
    }
}

template <typename T, typename V>
void launch(const ResidualForward& p, const Target& target) {
    const ResidualInputs& in = p.in;
    const int threads = row_threads(in.dim);
    const int groups = kRowThreads / threads;
    const int gate_floats = p.gate != nullptr ? gate_weight_floats(in.window) + groups * kWarpSize : 0;
    const int bytes = RowSlots<T, V::kTensors>::kBytes + RowVectors::bytes(V::kVectors, threads) +
                      gate_floats * static_cast<int>(sizeof(float));
    const auto kernel = residual_forward_kernel<T, V>;
    allow_shared(kernel, bytes, target, "residual_forward");
    const int blocks = row_blocks(in.rows, in.dim, kBlocks);
    kernel<<<blocks, kRowThreads, bytes, target.stream>>>(p, threads, 1.0f / static_cast<float>(in.dim));
    check_launch("residual_forward");
}

}  // namespace

void residual_forward(const ResidualForward& params, const Target& target) {
    if (params.in.rows == 0) return;  // an empty grid is an error to CUDA
    with_type(params.in.dtype, "residual_forward", [&](auto type) {
        with_variant(params.in, [&](auto variant) { launch<decltype(type), decltype(variant)>(params, target); });
    });
}

}  // namespace pgolf::generic
