// The gradients of the residual stream for any GPU from sm_80: bound by memory, one pass over the rows (rows.cuh) that
// computes s to u again. Sums over rows stay in registers (the gate's in shared memory) until the block's last row.
//
// With n = norm_scale * r * u, r = 1 / sqrt(mean(u^2) + eps), and gradients written d(.):
//   dlogit[h] = gate_scale * dg[h] * g[h] * (1 - g[h]);  dn += dlogit gate_weight, on the first `window` columns
//   du = d(stream) + norm_scale * r * (dn - u * r^2 * mean(dn * u))
//   dt = mix[0] * du + d(blend);  d(x0) = d(x0 out) + mix[1] * du
//   ds = gate * dt + d(sum);  d(skip) = (1 - gate) * skip_weight * dt, a part of ds where skip is s
//   dx = ds;  d(branch) = branch_scale * ds
#include <algorithm>

#include "common/check.h"
#include "generic/residual.cuh"

namespace pgolf::generic {
namespace {

// A multiprocessor, what the registers of a variant allow.
template <typename T, typename V, bool kBlend>
constexpr int kBlocks = V::kVectors < 2                          ? 5
                        : V::kHasSkip || kBlend || sizeof(T) > 2 ? 3
                                                                 : 4;
constexpr int kMostBlocks = 5;

// For sm_100 the compiler needs a few registers more: a block less, where four would have it spill.
template <typename T, typename V, bool kBlend>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 10 == 100
constexpr int kBound = std::min(kBlocks<T, V, kBlend>, V::kHasMix ? 3 : kMostBlocks);
#else
constexpr int kBound = kBlocks<T, V, kBlend>;
#endif

// The gate's part of shared memory; a group's sums have `padded` columns a head, a power of two.
struct GateShared {
    float* weight;   // transposed, of residual.cuh
    float* dlogit;   // [32] of the group, as the next two
    float* grad;     // [32]: what the gate adds to dn
    float* normed;   // [32]
    float* sum;      // [heads, padded] of the first group
    int group_sums;  // floats of a group
    int log_padded;

    static constexpr int floats(int groups, int heads, int window, int log_padded) {
        return gate_weight_floats(window) + groups * (3 * kWarpSize + (heads << log_padded));
    }

    __device__ __forceinline__ GateShared(float* shared, const ResidualInputs& in, int group, int groups,
                                          int log_padded)
        : weight(shared), group_sums(in.heads << log_padded), log_padded(log_padded) {
        dlogit = weight + gate_weight_floats(in.window) + group * 3 * kWarpSize;
        grad = dlogit + kWarpSize;
        normed = grad + kWarpSize;
        sum = weight + gate_weight_floats(in.window) + groups * 3 * kWarpSize;
    }
};

// The gate's share of dn in the lane's columns, by the first warp of the row.
__device__ __forceinline__ void add_gate_gradient(const ResidualInputs& in, const GateShared& gate, float dlogit,
                                                  int lane, float (&dn)[kColumns]) {
    gate.dlogit[lane] = dlogit;
    __syncwarp();
    float sum = 0.0f;
    if (lane < in.window) {
#pragma unroll 4
        for (int h = 0; h < in.heads; ++h) sum = fmaf(gate.dlogit[h], gate.weight[lane * kGateStride + h], sum);
    }
    gate.grad[lane] = sum;
    __syncwarp();
    if (lane < kWarpSize / kColumns) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) dn[i] += gate.grad[lane * kColumns + i];
    }
}

// Add this row's part of the gate weight's gradient to the group's, by the first warp of the row.
template <typename T>
__device__ __forceinline__ void add_gate_weight_gradient(const ResidualInputs& in, const GateShared& gate, int group,
                                                         int lane, const float (&n)[kColumns]) {
    share_normed<T>(n, lane, gate.normed);
    float* const sum = gate.sum + group * gate.group_sums;
#pragma unroll 1
    for (int i = lane; i < gate.group_sums; i += kWarpSize) {
        const int column = i & ((1 << gate.log_padded) - 1);
        if (column < in.window) sum[i] = fmaf(gate.dlogit[i >> gate.log_padded], gate.normed[column], sum[i]);
    }
    __syncwarp();
}

template <typename T, typename V, bool kBlend>
__global__ void __launch_bounds__(kRowThreads, kBound<T, V, kBlend>)
    residual_backward_kernel(const ResidualBackward p, int row_threads, int log_padded, int sums_stride,
                             float inverse_dim) {
    extern __shared__ uint4 shared[];
    __shared__ float2 sums[kStages][kRowThreads / kWarpSize];
    using G = Gradients<V, kBlend>;
    using Slots = RowSlots<T, G::kTensors>;
    const ResidualInputs& in = p.in;
    const RowWalk walk(in.dim, row_threads);
    const int groups = kRowThreads / walk.threads;
    const Slots slots(shared);
    const RowVectors vectors{reinterpret_cast<float4*>(shared + Slots::kBytes / sizeof(uint4)), row_threads};
    const GateShared gate(reinterpret_cast<float*>(vectors.half(V::kVectors, 0, 0)), in, walk.group, groups,
                          log_padded);
    const bool has_gate = p.grad_gate != nullptr;
    const bool has_norm = has_gate || p.grad_normed != nullptr;

    const auto fetch = [&](int stage, int64_t row) {
        if (row < in.rows) {
            const int64_t offset = row * in.dim + walk.column;
            fetch_inputs<V>(slots, stage, in, offset, walk.active);
            slots.fetch(stage, G::kSum, p.grad_sum, offset, walk.active);
            slots.fetch(stage, G::kStream, p.grad_stream, offset, walk.active);
            slots.fetch(stage, G::kNormed, p.grad_normed, offset, walk.active);
            if constexpr (V::kHasMix) slots.fetch(stage, G::kX0, p.grad_x0_out, offset, walk.active);
            if constexpr (kBlend) slots.fetch(stage, G::kBlendAt, p.grad_blend, offset, walk.active);
        }
        commit_copies();  // also when empty: the waits count groups
    };
    // The lane's head of the next row: read a row ahead too.
    const bool has_head = has_gate && walk.thread < in.heads;
    float next_gate = 0.0f, next_grad = 0.0f;
    const auto fetch_gate = [&](int64_t row) {
        if (!has_head || row >= in.rows) return;
        next_gate = to_float(static_cast<const T*>(p.gate)[row * in.heads + walk.thread]);
        next_grad = to_float(static_cast<const T*>(p.grad_gate)[row * in.heads + walk.thread]);
    };

#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, walk.first + stage * walk.step);
    fetch_gate(walk.first);
    fill_vectors<V>(vectors, in);
    if (in.gate_weight != nullptr) {
        fill_gate_weight(gate.weight, in);
#pragma unroll 1
        for (int i = threadIdx.x; i < groups * gate.group_sums; i += kRowThreads) gate.sum[i] = 0.0f;
    }
    __syncthreads();

    // The last is not used where V has no vectors: an array has at least one element.
    float sum[V::kVectors > 0 ? V::kVectors : 1][kColumns] = {};
    int stage = 0;
    for (int64_t row = walk.first; row < in.rows; row += walk.step) {
        wait_copies<kStages - 1>();
        float dlogit = 0.0f;
        if (has_head) dlogit = in.gate_scale * next_grad * fmaf(-next_gate, next_gate, next_gate);
        fetch_gate(row + walk.step);

        float dn[kColumns];
        slots.read(stage, G::kNormed, dn);
        float scale = 0.0f, of_u = 0.0f;  // du = d(stream) + scale * dn + of_u * u
        if (has_norm) {
            if (has_gate && walk.thread < kWarpSize) add_gate_gradient(in, gate, dlogit, walk.thread, dn);
            Values v;
            compute_values<V>(slots, stage, vectors, walk.thread, in, v);
            float square = 0.0f, dot = 0.0f;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                square = fmaf(v.u[i], v.u[i], square);
                dot = fmaf(dn[i], v.u[i], dot);
            }
            const float2 total = row_sums(square, dot, walk, &sums[stage][walk.group * walk.warps()]);
            const float r = inverse_root(fmaf(total.x, inverse_dim, in.eps));
            scale = in.norm_scale * r;
            of_u = -scale * (total.y * inverse_dim) * r * r;
        }

        const int64_t offset = row * in.dim + walk.column;
        Values v;
        compute_values<V>(slots, stage, vectors, walk.thread, in, v);  // again, to hold fewer values across the sums
        float grad[kColumns];                                          // of u, then of t, then of s
        slots.read(stage, G::kStream, grad);
        if (has_norm) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) grad[i] += fmaf(scale, dn[i], of_u * v.u[i]);
        }
        if (has_gate && p.scratch != nullptr && walk.thread < kWarpSize) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) dn[i] = scale * v.u[i];  // now n
            add_gate_weight_gradient<T>(in, gate, walk.group, walk.thread, dn);
        }
        if constexpr (V::kHasMix) {
            float mix[kColumns], of_x0[kColumns];
            slots.read(stage, G::kX0, of_x0);
            vectors.read(V::kMixAt + 1, walk.thread, mix);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) of_x0[i] = fmaf(mix[i], grad[i], of_x0[i]);
            if (walk.active && p.grad_x0 != nullptr) store_columns<T>(p.grad_x0, offset, of_x0);
            vectors.read(V::kMixAt, walk.thread, mix);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                sum[V::kMixAt][i] = fmaf(grad[i], v.t[i], sum[V::kMixAt][i]);
                sum[V::kMixAt + 1][i] = fmaf(grad[i], v.x0[i], sum[V::kMixAt + 1][i]);
                grad[i] *= mix[i];
            }
        }
        if constexpr (kBlend) {
            float of_blend[kColumns];
            slots.read(stage, G::kBlendAt, of_blend);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) grad[i] += of_blend[i];
        }
        if constexpr (V::kHasSkip) {
            const bool is_stream = in.skip == nullptr;
            float weight[kColumns], keep[kColumns], skip[kColumns], of_skip[kColumns];
            slots.read(stage, V::kSkipAt, skip);
            vectors.read(V::kWeight, walk.thread, weight);
            vectors.read(V::kGate, walk.thread, keep);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float of_skipped = (1.0f - keep[i]) * grad[i];
                sum[V::kWeight][i] = fmaf(of_skipped, is_stream ? v.s[i] : skip[i], sum[V::kWeight][i]);
                sum[V::kGate][i] = fmaf(grad[i], v.s[i] - v.skipped[i], sum[V::kGate][i]);
                of_skip[i] = of_skipped * weight[i];
                grad[i] = fmaf(keep[i], grad[i], is_stream ? of_skip[i] : 0.0f);
            }
            if (walk.active && !is_stream) store_columns<T>(p.grad_skip, offset, of_skip);
        }
        float of_sum[kColumns];
        slots.read(stage, G::kSum, of_sum);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) grad[i] += of_sum[i];
        if constexpr (V::kHasBranch) {
            float branch[kColumns], branch_scale[kColumns];
            slots.read(stage, V::kBranchAt, branch);
            vectors.read(V::kScale, walk.thread, branch_scale);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                sum[V::kScale][i] = fmaf(grad[i], branch[i], sum[V::kScale][i]);
                branch[i] = branch_scale[i] * grad[i];
            }
            if (walk.active && p.grad_branch != nullptr) store_columns<T>(p.grad_branch, offset, branch);
        }
        if (walk.active) store_columns<T>(p.grad_x, offset, grad);
        fetch(stage, row + kStages * walk.step);
        stage ^= 1;
    }

    if (p.scratch == nullptr) return;
    float* target = p.scratch + static_cast<int64_t>(blockIdx.x) * sums_stride;
    if constexpr (V::kVectors > 0) {
        if constexpr (V::kHasSkip) {  // the slope of the sigmoid
            float keep[kColumns];
            vectors.read(V::kGate, walk.thread, keep);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) sum[V::kGate][i] *= keep[i] * (1.0f - keep[i]);
        }
        write_column_sums(sum, walk, reinterpret_cast<float4*>(shared), target, in.dim);
        target += V::kVectors * in.dim;
    }
    if (in.gate_weight == nullptr) return;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < in.heads * in.window; i += kRowThreads) {
        const int from = (i / in.window << log_padded) + i % in.window;
        float total = gate.sum[from];
#pragma unroll 1
        for (int g = 1; g < groups; ++g) total += gate.sum[g * gate.group_sums + from];
        target[i] = total;
    }
}

template <typename T, typename V, bool kBlend>
void launch(const ResidualBackward& p, const Target& target) {
    const ResidualInputs& in = p.in;
    using Slots = RowSlots<T, Gradients<V, kBlend>::kTensors>;
    static_assert(Slots::kBytes >= V::kVectors * kRowThreads * kColumns * sizeof(float), "write_column_sums");
    const int threads = row_threads(in.dim);
    const int groups = kRowThreads / threads;
    int log_padded = 0;
    while (1 << log_padded < in.window) ++log_padded;
    const bool has_gate = in.gate_weight != nullptr;
    const int gate_floats = has_gate ? GateShared::floats(groups, in.heads, in.window, log_padded) : 0;
    const int bytes =
        Slots::kBytes + RowVectors::bytes(V::kVectors, threads) + gate_floats * static_cast<int>(sizeof(float));
    const auto kernel = residual_backward_kernel<T, V, kBlend>;
    allow_shared(kernel, bytes, target, "residual_backward");
    const int blocks = row_blocks(in.rows, in.dim, kBlocks<T, V, kBlend>);
    const int parameters = residual_parameters(V::kHasBranch, V::kHasSkip, V::kHasMix, in.dim, in.heads, in.window);
    kernel<<<blocks, kRowThreads, bytes, target.stream>>>(p, threads, log_padded, sums_stride(parameters),
                                                          1.0f / static_cast<float>(in.dim));
    check_launch("residual_backward");
    if (p.grad_parameters == nullptr || parameters == 0) return;
    sum_blocks(p.scratch, blocks, parameters, p.grad_parameters, target.stream, "residual_backward: sums");
}

}  // namespace

int64_t residual_scratch(int64_t rows, int dim, int parameters) {
    return row_scratch(rows, dim, kMostBlocks, parameters);
}

void residual_backward(const ResidualBackward& params, const Target& target) {
    if (params.in.rows == 0) return;  // an empty grid is an error to CUDA
    with_type(params.in.dtype, "residual_backward", [&](auto type) {
        with_variant(params.in, [&](auto variant) {
            using T = decltype(type);
            using V = decltype(variant);
            if constexpr (V::kHasMix) {
                if (params.grad_blend != nullptr) return launch<T, V, true>(params, target);
            }
            launch<T, V, false>(params, target);
        });
    });
}

}  // namespace pgolf::generic
