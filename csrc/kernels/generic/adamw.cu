// One step of AdamW for any GPU from sm_80, in one pass: bound by memory. Computed in float32, each result rounded
// once.
#include <cuda_bf16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/grid.h"
#include "common/vec.cuh"
#include "ops/adamw.h"

namespace pgolf::generic {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;   // a multiprocessor
constexpr int kVector = 4;   // values of a load: a warp's loads lie side by side, in 16 bytes of float32 a thread
constexpr int kVectors = 2;  // under way a thread
constexpr int kTile = kThreads * kVectors;

// The numbers of every step, in the type that they are used in.
struct Constants {
    float decay;         // lr * weight_decay
    float beta1, rest1;  // rest = 1 - beta
    float beta2, rest2;
    float eps;
};

// What depends on the number of the step.
struct Corrections {
    float rate;  // lr / (1 - beta1^t)
    float root;  // 1 / sqrt(1 - beta2^t)
};

// N values, and where they are.
template <typename T, int N, bool kMean>
struct Values {
    int64_t at;
    float weight[N], mean[N], square[N], grad[N];

    __device__ __forceinline__ void read(const Adamw& p, int64_t first) {
        at = first;
        load<N>(p.weight + at, weight);
        if constexpr (kMean) load<N>(p.mean + at, mean);
        load<N>(p.square + at, square);
        load<N>(static_cast<const T*>(p.grad) + at, grad);
    }

    __device__ __forceinline__ void update(const Constants& c, const Corrections& corrections) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            weight[i] = fmaf(-c.decay, weight[i], weight[i]);
            mean[i] = kMean ? fmaf(c.beta1, mean[i], c.rest1 * grad[i]) : grad[i];
            square[i] = fmaf(c.beta2, square[i], c.rest2 * grad[i] * grad[i]);
            weight[i] -= corrections.rate * mean[i] / fmaf(sqrtf(square[i]), corrections.root, c.eps);
        }
    }

    __device__ __forceinline__ void write(const Adamw& p) const {
        store<N>(p.weight + at, weight);
        if constexpr (kMean) store<N>(p.mean + at, mean);
        store<N>(p.square + at, square);
        if (p.copy == nullptr) return;
        if (p.copy_type == DType::kFloat32) {
            store<N>(static_cast<float*>(p.copy) + at, weight);
        } else {
            store<N>(static_cast<__nv_bfloat16*>(p.copy) + at, weight);
        }
    }
};

template <typename T, int N, bool kMean>
__global__ void __launch_bounds__(kThreads, kBlocks) adamw_kernel(const Adamw p, const Constants c) {
    __shared__ Corrections shared;
    if (threadIdx.x == 0) {  // a power in float64 is long: once a block
        const double count = static_cast<double>(*p.count);
        shared.rate = static_cast<float>(p.lr / (1.0 - pow(p.beta1, count)));
        shared.root = static_cast<float>(1.0 / sqrt(1.0 - pow(p.beta2, count)));
    }
    __syncthreads();
    const Corrections corrections = shared;

    const int64_t vectors = p.size / N;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kTile;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x; first < vectors; first += step) {
        Values<T, N, kMean> values[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (first + v * kThreads < vectors) values[v].read(p, (first + v * kThreads) * N);
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (first + v * kThreads >= vectors) break;
            values[v].update(c, corrections);
            values[v].write(p);
        }
    }
    if (blockIdx.x == 0 && vectors * N + threadIdx.x < p.size) {  // what no whole vector has
        Values<T, 1, kMean> rest;
        rest.read(p, vectors * N + threadIdx.x);
        rest.update(c, corrections);
        rest.write(p);
    }
}

template <typename T, int N>
void launch(const Adamw& p, cudaStream_t stream) {
    const Constants constants{.decay = static_cast<float>(p.lr * p.weight_decay),
                              .beta1 = static_cast<float>(p.beta1),
                              .rest1 = static_cast<float>(1.0 - p.beta1),
                              .beta2 = static_cast<float>(p.beta2),
                              .rest2 = static_cast<float>(1.0 - p.beta2),
                              .eps = static_cast<float>(p.eps)};
    const int64_t tiles = (p.size + kTile * N - 1) / (kTile * N);
    const unsigned blocks = filling_blocks(tiles, kBlocks, "adamw");
    const auto kernel = p.mean == nullptr ? adamw_kernel<T, N, false> : adamw_kernel<T, N, true>;
    kernel<<<blocks, kThreads, 0, stream>>>(p, constants);
    check_launch("adamw");
}

template <typename T>
void launch_for_memory(const Adamw& p, cudaStream_t stream) {
    const uintptr_t floats = reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.mean) |
                             reinterpret_cast<uintptr_t>(p.square);
    const size_t copy_size = p.copy_type == DType::kFloat32 ? sizeof(float) : sizeof(__nv_bfloat16);
    const bool whole = floats % (kVector * sizeof(float)) == 0 &&
                       reinterpret_cast<uintptr_t>(p.grad) % (kVector * sizeof(T)) == 0 &&
                       reinterpret_cast<uintptr_t>(p.copy) % (kVector * copy_size) == 0;
    whole ? launch<T, kVector>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

void adamw(const Adamw& params, const Target& target) {
    if (params.size == 0) return;  // an empty grid is an error to CUDA
    switch (params.grad_type) {
        case DType::kFloat32:
            return launch_for_memory<float>(params, target.stream);
        case DType::kBFloat16:
            return launch_for_memory<__nv_bfloat16>(params, target.stream);
    }
    throw std::runtime_error("adamw: grad_type: expected 0 (float32) or 1 (bfloat16), got " +
                             std::to_string(static_cast<int>(params.grad_type)));
}

}  // namespace pgolf::generic
