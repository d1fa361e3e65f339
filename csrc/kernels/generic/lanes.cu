// Two residual lanes for any GPU from sm_80: bound by memory, one pass over the rows (rows.cuh) forward and one
// backward. Computed in float32, each result rounded once.
#include "common/check.h"
#include "generic/rows.cuh"
#include "ops/lanes.h"

namespace pgolf::generic {
namespace {

constexpr int kForwardBlocks = 6;  // a multiprocessor
constexpr int kBackwardBlocks = 4;
constexpr int kScalars = 6;  // post and resid
constexpr int kHalfWarp = kWarpSize / 2;

// A row's operands, and the float32 vectors.
enum Tensor : int { kLane0, kLane1, kA, kM, kInputs, kGrad0 = kInputs, kGrad1, kAll };
enum Vector : int { kAttnScale, kMlpScale, kVectors };

struct Scalars {
    float post[2][2], resid[2];

    __device__ __forceinline__ explicit Scalars(const LanesInputs& in)
        : post{{in.post[0], in.post[1]}, {in.post[2], in.post[3]}}, resid{in.resid[0], in.resid[1]} {}
};

template <typename Slots>
__device__ __forceinline__ void fetch_inputs(const Slots& slots, int stage, const LanesInputs& in, int64_t offset,
                                             bool inside) {
    slots.fetch(stage, kLane0, in.lane[0], offset, inside);
    slots.fetch(stage, kLane1, in.lane[1], offset, inside);
    slots.fetch(stage, kA, in.a, offset, inside);
    slots.fetch(stage, kM, in.m, offset, inside);
}

__device__ __forceinline__ void fill_vectors(const RowVectors& vectors, const LanesInputs& in) {
    const auto as_is = [](float x) { return x; };
    vectors.fill(kAttnScale, in.attn_scale, in.dim, as_is);
    vectors.fill(kMlpScale, in.mlp_scale, in.dim, as_is);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kForwardBlocks)
    lanes_forward_kernel(const LanesForward p, int row_threads) {
    extern __shared__ uint4 shared[];
    using Slots = RowSlots<T, kInputs>;
    const LanesInputs& in = p.in;
    const RowWalk walk(in.dim, row_threads);
    const Slots slots(shared);
    const RowVectors vectors{reinterpret_cast<float4*>(shared + Slots::kBytes / sizeof(uint4)), row_threads};
    const auto fetch = [&](int stage, int64_t row) {
        if (row < in.rows) fetch_inputs(slots, stage, in, row * in.dim + walk.column, walk.active);
        commit_copies();  // also when empty: the waits count groups
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, walk.first + stage * walk.step);
    const Scalars scalars(in);
    fill_vectors(vectors, in);
    __syncthreads();

    int stage = 0;
    for (int64_t row = walk.first; row < in.rows; row += walk.step) {
        wait_copies<kStages - 1>();
        float lane[2][kColumns], a[kColumns], m[kColumns], scale[kColumns];
        slots.read(stage, kLane0, lane[0]);
        slots.read(stage, kLane1, lane[1]);
        slots.read(stage, kA, a);
        slots.read(stage, kM, m);
        fetch(stage, row + kStages * walk.step);
        vectors.read(kAttnScale, walk.thread, scale);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) a[i] *= scale[i];
        vectors.read(kMlpScale, walk.thread, scale);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) m[i] *= scale[i];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float branches = fmaf(scalars.post[0][j], a[i], scalars.post[1][j] * m[i]);
                lane[j][i] = fmaf(scalars.resid[j], lane[j][i], branches);
            }
            if (walk.active) store_columns<T>(p.out[j], row * in.dim + walk.column, lane[j]);
        }
        stage ^= 1;
    }
}

// The sums of a and of b over two lanes 16 apart: the lower lane gets a's, the upper b's, so that a thread keeps one
// running sum for two.
__device__ __forceinline__ float half_sum(float a, float b, bool upper) {
    return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, kHalfWarp);
}

// With dA = post[0, 0] * dout_0 + post[0, 1] * dout_1 and dM likewise:
//   dlane_j = resid[j] * dout_j;  da = attn_scale * dA;  dm = mlp_scale * dM
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kBackwardBlocks)
    lanes_backward_kernel(const LanesBackward p, int row_threads, int sums_stride) {
    extern __shared__ uint4 shared[];
    __shared__ CompensatedSum warp_sums[kRowThreads / kWarpSize][kScalars];
    using Slots = RowSlots<T, kAll>;
    static_assert(Slots::kBytes >= kVectors * kRowThreads * kColumns * sizeof(float), "write_column_sums");
    const LanesInputs& in = p.in;
    const RowWalk walk(in.dim, row_threads);
    const Slots slots(shared);
    const RowVectors vectors{reinterpret_cast<float4*>(shared + Slots::kBytes / sizeof(uint4)), row_threads};
    const auto fetch = [&](int stage, int64_t row) {
        if (row < in.rows) {
            const int64_t offset = row * in.dim + walk.column;
            fetch_inputs(slots, stage, in, offset, walk.active);
            slots.fetch(stage, kGrad0, p.grad_out[0], offset, walk.active);
            slots.fetch(stage, kGrad1, p.grad_out[1], offset, walk.active);
        }
        commit_copies();  // also when empty: the waits count groups
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, walk.first + stage * walk.step);
    const Scalars scalars(in);
    fill_vectors(vectors, in);
    __syncthreads();

    float sum[kVectors][kColumns] = {};
    const bool upper = threadIdx.x & kHalfWarp;
    CompensatedSum scalar_sum[kScalars / 2] = {};  // post[0, upper]; post[1, upper]; resid[upper]
    int stage = 0;
    for (int64_t row = walk.first; row < in.rows; row += walk.step) {
        wait_copies<kStages - 1>();
        const int64_t offset = row * in.dim + walk.column;
        float grad[2][kColumns];
        slots.read(stage, kGrad0, grad[0]);
        slots.read(stage, kGrad1, grad[1]);
#pragma unroll
        for (int branch = 0; branch < 2; ++branch) {  // a, then m
            float x[kColumns], scale[kColumns], of_post[2] = {};
            slots.read(stage, kA + branch, x);
            vectors.read(kAttnScale + branch, walk.thread, scale);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float scaled = scale[i] * x[i];
                const float of_scaled = fmaf(scalars.post[branch][0], grad[0][i], scalars.post[branch][1] * grad[1][i]);
                of_post[0] = fmaf(grad[0][i], scaled, of_post[0]);
                of_post[1] = fmaf(grad[1][i], scaled, of_post[1]);
                sum[branch][i] = fmaf(of_scaled, x[i], sum[branch][i]);
                x[i] = scale[i] * of_scaled;
            }
            scalar_sum[branch].add(half_sum(of_post[0], of_post[1], upper));
            if (walk.active) store_columns<T>(branch == 0 ? p.grad_a : p.grad_m, offset, x);
        }
        float of_resid[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float lane[kColumns];
            slots.read(stage, kLane0 + j, lane);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                of_resid[j] = fmaf(grad[j][i], lane[i], of_resid[j]);
                lane[i] = scalars.resid[j] * grad[j][i];
            }
            if (walk.active) store_columns<T>(p.grad_lane[j], offset, lane);
        }
        scalar_sum[2].add(half_sum(of_resid[0], of_resid[1], upper));
        fetch(stage, row + kStages * walk.step);
        stage ^= 1;
    }

    if (p.scratch == nullptr) return;
    const int warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int k = 0; k < kScalars / 2; ++k) {
        const CompensatedSum total = warp_sum<kHalfWarp>(scalar_sum[k]);
        if (threadIdx.x % kHalfWarp == 0) warp_sums[warp][2 * k + upper] = total;
    }
    float* const target = p.scratch + static_cast<int64_t>(blockIdx.x) * sums_stride;
    write_column_sums(sum, walk, reinterpret_cast<float4*>(shared), target, in.dim);
    if (threadIdx.x >= kScalars) return;
    CompensatedSum total{};
    for (int w = 0; w < kRowThreads / kWarpSize; ++w) total.add(warp_sums[w][threadIdx.x]);
    target[kVectors * in.dim + threadIdx.x] = total.value();
}

template <typename T>
void launch_forward(const LanesForward& p, const Target& target) {
    const int threads = row_threads(p.in.dim);
    const int bytes = RowSlots<T, kInputs>::kBytes + RowVectors::bytes(kVectors, threads);
    allow_shared(lanes_forward_kernel<T>, bytes, target, "lanes_forward");
    const int blocks = row_blocks(p.in.rows, p.in.dim, kForwardBlocks);
    lanes_forward_kernel<T><<<blocks, kRowThreads, bytes, target.stream>>>(p, threads);
    check_launch("lanes_forward");
}

template <typename T>
void launch_backward(const LanesBackward& p, const Target& target) {
    const int threads = row_threads(p.in.dim);
    const int bytes = RowSlots<T, kAll>::kBytes + RowVectors::bytes(kVectors, threads);
    allow_shared(lanes_backward_kernel<T>, bytes, target, "lanes_backward");
    const int blocks = row_blocks(p.in.rows, p.in.dim, kBackwardBlocks);
    const int parameters = lanes_parameters(p.in.dim);
    lanes_backward_kernel<T><<<blocks, kRowThreads, bytes, target.stream>>>(p, threads, sums_stride(parameters));
    check_launch("lanes_backward");
    if (p.grad_parameters == nullptr) return;
    sum_blocks(p.scratch, blocks, parameters, p.grad_parameters, target.stream, "lanes_backward: sums");
}

}  // namespace

void lanes_forward(const LanesForward& params, const Target& target) {
    if (params.in.rows == 0) return;  // an empty grid is an error to CUDA
    with_type(params.in.dtype, "lanes_forward", [&](auto type) { launch_forward<decltype(type)>(params, target); });
}

int64_t lanes_scratch(int64_t rows, int dim) { return row_scratch(rows, dim, kBackwardBlocks, lanes_parameters(dim)); }

void lanes_backward(const LanesBackward& params, const Target& target) {
    if (params.in.rows == 0) {
        if (params.grad_parameters == nullptr) return;
        check(
            cudaMemsetAsync(params.grad_parameters, 0, lanes_parameters(params.in.dim) * sizeof(float), target.stream),
            "lanes_backward");
        return;
    }
    with_type(params.in.dtype, "lanes_backward", [&](auto type) { launch_backward<decltype(type)>(params, target); });
}

}  // namespace pgolf::generic
