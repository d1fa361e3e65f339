// SmearGate for any GPU from sm_80: bound by memory, so a warp streams a few consecutive rows, and the row it needs
// again (the previous embedding, the next gradient) comes from the cache. Computed in float32, rounded once.
//
// The gates of a warp's rows are computed first, one lane a row: the streaming loop then waits for no reduction.
#include <cuda_bf16.h>

#include <stdexcept>

#include "common/check.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops/smear_gate.h"

namespace pgolf::generic {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowsPerWarp = 8;
constexpr int kRowsPerBlock = kWarps * kRowsPerWarp;
static_assert(kRowsPerWarp < kWarpSize, "one lane a row, and one for the row after them");

int64_t blocks_for(int64_t rows) { return (rows + kRowsPerBlock - 1) / kRowsPerBlock; }

// sigmoid(weight . row[:window]) of the lane's own row. Four sums: a shorter chain of dependent instructions, and an
// error as small as that of a matrix product's blocked sum.
template <typename T>
__device__ __forceinline__ float row_sigmoid(const T* row, const float* weight, int window) {
    float sum[4] = {};
    for (int i = 0; i < window; i += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (i + j < window) sum[j] = fmaf(to_float(row[i + j]), weight[i + j], sum[j]);
        }
    }
    const float logit = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return 1.0f / (1.0f + expf(-logit));
}

// Whether the row before `row` is added to it.
template <typename Params>
__device__ __forceinline__ bool is_smeared(const Params& p, int64_t row) {
    return row < p.rows && row % p.length != 0 && p.ids[row] != p.bos;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) smear_gate_forward_kernel(const SmearGateForward p) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp * kRowsPerWarp;
    const T* const e = static_cast<const T*>(p.e);
    T* const out = static_cast<T*>(p.out);

    const bool smeared = lane < kRowsPerWarp && is_smeared(p, first + lane);
    const float my_gate = smeared ? *p.lambda * row_sigmoid(e + (first + lane) * p.dim, p.weight, p.window) : 0.0f;
    const unsigned smeared_rows = __ballot_sync(kAllLanes, smeared);

    for (int k = 0; k < kRowsPerWarp && first + k < p.rows; ++k) {
        const int64_t offset = (first + k) * p.dim;
        const float gate = __shfl_sync(kAllLanes, my_gate, k);
        // A branch, not a zero gate: zero times an infinite or NaN neighbour would leak into the next document.
        const bool add = smeared_rows >> k & 1;
        for (int c = lane * N; c < p.dim; c += kWarpSize * N) {
            float x[N];
            load<N>(e + offset + c, x);
            if (add) {
                float previous[N];
                load<N>(e + offset - p.dim + c, previous);
#pragma unroll
                for (int i = 0; i < N; ++i) x[i] = fmaf(gate, previous[i], x[i]);
            }
            store<N>(out + offset + c, x);
        }
    }
}

// With s = sigmoid(weight . e[r, :window]) and d = grad[r] . e[r - 1] for every smeared row r:
//   grad_e[r]   = grad[r] + lambda * s[r + 1] * grad[r + 1]   (if r + 1 is smeared)
//               + dlogit[r] * weight, on the first `window` columns   (if r is smeared)
//   grad_weight = sum of dlogit[r] * e[r, :window];  grad_lambda = sum of s[r] * d[r];  dlogit = lambda * s (1 - s) d
// The sums over this block's rows go to scratch[column, block]; column `window` is lambda's.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) smear_gate_backward_kernel(const SmearGateBackward p) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp * kRowsPerWarp;
    const T* const e = static_cast<const T*>(p.e);
    const T* const grad = static_cast<const T*>(p.grad);
    T* const grad_e = static_cast<T*>(p.grad_e);
    const float lambda = *p.lambda;
    constexpr int kSums = N < 4 ? N : 4;

    const bool smeared = lane <= kRowsPerWarp && is_smeared(p, first + lane);
    const float my_sigmoid = smeared ? row_sigmoid(e + (first + lane) * p.dim, p.weight, p.window) : 0.0f;
    const unsigned smeared_rows = __ballot_sync(kAllLanes, smeared);

    float my_dlogit = 0.0f;   // of row first + lane
    float lambda_sum = 0.0f;  // over this warp's rows, the same in every lane
    for (int k = 0; k < kRowsPerWarp && first + k < p.rows; ++k) {
        const int64_t offset = (first + k) * p.dim;
        const bool added = smeared_rows >> k & 1;       // the previous row was added to this one
        const bool adds = smeared_rows >> (k + 1) & 1;  // this row was added to the next one
        const float sigmoid = __shfl_sync(kAllLanes, my_sigmoid, k);
        const float next_gate = lambda * __shfl_sync(kAllLanes, my_sigmoid, k + 1);

        float dlogit = 0.0f;
        if (added) {
            float dots[kSums] = {};  // short chains of additions keep the error small
            for (int c = lane * N; c < p.dim; c += kWarpSize * N) {
                float g[N], previous[N];
                load<N>(grad + offset + c, g);
                load<N>(e + offset - p.dim + c, previous);
#pragma unroll
                for (int i = 0; i < N; ++i) dots[i % kSums] = fmaf(g[i], previous[i], dots[i % kSums]);
            }
#pragma unroll
            for (int width = kSums / 2; width > 0; width /= 2) {
#pragma unroll
                for (int i = 0; i < width; ++i) dots[i] += dots[i + width];
            }
            const float dot = warp_sum(dots[0]);
            lambda_sum = fmaf(sigmoid, dot, lambda_sum);
            dlogit = lambda * sigmoid * (1.0f - sigmoid) * dot;
            if (lane == k) my_dlogit = dlogit;
        }

        for (int c = lane * N; c < p.dim; c += kWarpSize * N) {
            float g[N];
            load<N>(grad + offset + c, g);
            if (adds) {
                float next[N];
                load<N>(grad + offset + p.dim + c, next);
#pragma unroll
                for (int i = 0; i < N; ++i) g[i] = fmaf(next_gate, next[i], g[i]);
            }
            if (added && c < p.window) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (c + i < p.window) g[i] = fmaf(dlogit, p.weight[c + i], g[i]);
                }
            }
            store<N>(grad_e + offset + c, g);
        }
    }

    if (p.scratch == nullptr) return;
    __shared__ float partial[kWarps][kWarpSize];
    for (int start = 0; start <= p.window; start += kWarpSize) {
        const int column = start + lane;
        float sum = column == p.window ? lambda_sum : 0.0f;
        for (int k = 0; k < kRowsPerWarp; ++k) {
            const float dlogit = __shfl_sync(kAllLanes, my_dlogit, k);
            if ((smeared_rows >> k & 1) && column < p.window) {
                sum = fmaf(dlogit, to_float(e[(first + k) * p.dim + column]), sum);
            }
        }
        partial[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && column <= p.window) {
            float block_total = 0.0f;
            for (int w = 0; w < kWarps; ++w) block_total += partial[w][lane];
            p.scratch[static_cast<int64_t>(column) * gridDim.x + blockIdx.x] = block_total;
        }
        __syncthreads();
    }
}

// Block i adds up row i of scratch [window + 1, count].
__global__ void __launch_bounds__(kThreads) smear_gate_finish_kernel(const SmearGateBackward p, int64_t count) {
    const float* const row = p.scratch + blockIdx.x * count;
    CompensatedSum sum{};
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(row[i]);
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x > 0) return;
    *(static_cast<int>(blockIdx.x) < p.window ? p.grad_weight + blockIdx.x : p.grad_lambda) = sum.value();
}

template <typename T>
void launch(const SmearGateForward& p, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(blocks_for(p.rows));
    if (vectorizable<T>(p.e, p.dim) && vectorizable<T>(p.out, p.dim)) {
        smear_gate_forward_kernel<T, kVectorBytes / sizeof(T)><<<blocks, kThreads, 0, stream>>>(p);
    } else {
        smear_gate_forward_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    }
}

template <typename T>
void launch(const SmearGateBackward& p, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(blocks_for(p.rows));
    if (vectorizable<T>(p.e, p.dim) && vectorizable<T>(p.grad, p.dim) && vectorizable<T>(p.grad_e, p.dim)) {
        smear_gate_backward_kernel<T, kVectorBytes / sizeof(T)><<<blocks, kThreads, 0, stream>>>(p);
    } else {
        smear_gate_backward_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    }
}

template <typename Params>
void launch_for_dtype(const Params& p, cudaStream_t stream, const char* name) {
    if (p.rows == 0) return;  // an empty grid is an error to CUDA
    switch (p.dtype) {
        case DType::kFloat32:
            launch<float>(p, stream);
            break;
        case DType::kBFloat16:
            launch<__nv_bfloat16>(p, stream);
            break;
        default:
            throw std::runtime_error(std::string(name) + ": dtype: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(p.dtype)));
    }
    check_launch(name);
}

}  // namespace

int64_t smear_gate_scratch(int64_t rows, int64_t window) { return blocks_for(rows) * (window + 1); }

void smear_gate_forward(const SmearGateForward& params, cudaStream_t stream) {
    launch_for_dtype(params, stream, "smear_gate_forward");
}

void smear_gate_backward(const SmearGateBackward& params, cudaStream_t stream) {
    launch_for_dtype(params, stream, "smear_gate_backward");
    if (params.grad_weight == nullptr) return;
    smear_gate_finish_kernel<<<static_cast<unsigned>(params.window + 1), kThreads, 0, stream>>>(
        params, blocks_for(params.rows));
    check_launch("smear_gate_backward (sums)");
}

}  // namespace pgolf::generic
