// XSA and the heads' gates for any GPU from sm_80: bound by memory. The lanes that hold a head of v take the heads of y
// that share it, two at a time, so that v is read once.
#include <cuda_bf16.h>

#include <stdexcept>

#include "common/check.h"
#include "common/grid.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "heads.cuh"
#include "ops/xsa_gate.h"

namespace pgolf::generic {
namespace {

constexpr int kThreads = 128;
constexpr float kMinNorm = 1e-12f;

constexpr int kForwardBlocks = 8;  // of a multiprocessor
constexpr int kBackwardBlocks = 6;

// Heads of v that a block takes at once.
template <int kLanes>
constexpr int kBlockHeads = kThreads / kLanes;

// A lane's head of v, counted over all rows, and its first column. The warp's heads follow each other.
template <int kLanes>
struct Place {
    int head, column;
    bool exists;

    template <typename Params>
    __device__ __forceinline__ Place(const Params& p, int first, int heads) {
        head = first + static_cast<int>(threadIdx.x) % kWarpSize / kLanes;
        column = static_cast<int>(threadIdx.x) % kLanes * kColumns;
        exists = head < heads && column < p.head_dim;
    }
};

// The first head of the warp's; the same in all lanes, so that they leave the loop over heads together.
template <int kLanes>
__device__ __forceinline__ int first_head() {
    constexpr int kWarpHeads = kWarpSize / kLanes;
    return static_cast<int>(blockIdx.x) * kBlockHeads<kLanes> + static_cast<int>(threadIdx.x) / kWarpSize * kWarpHeads;
}

template <bool kXsa, typename T, typename Params, int kLanes>
__device__ __forceinline__ Eight<T> load_v(const Params& p, const Place<kLanes>& at) {
    if constexpr (!kXsa) return {};
    const int row = at.head / p.kv_heads;
    const T* const in_row = static_cast<const T*>(p.v) + (at.head - row * p.kv_heads) * p.head_dim + at.column;
    return load_eight(in_row + row * p.v_stride, at.exists);
}

// Two heads of y of a group, with their gradients in the backward.
template <typename T>
struct Pair {
    int64_t first;  // counted over all rows
    bool exists[2];
    Eight<T> y_packed[2], grad_packed[2];
    T gates[2];  // not converted before they are used, which would wait for them before the other loads

    template <typename Params, int kLanes>
    __device__ __forceinline__ Pair(const Params& p, const Place<kLanes>& at, int start) {
        first = static_cast<int64_t>(at.head) * p.group + start;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            exists[i] = at.exists && start + i < p.group;
            y_packed[i] = load_eight(static_cast<const T*>(p.y) + offset(p, at, i), exists[i]);
            if constexpr (requires { p.grad; }) {
                grad_packed[i] = load_eight(static_cast<const T*>(p.grad) + offset(p, at, i), exists[i]);
            }
            gates[i] = from_float<T>(1.0f);
            if (exists[i] && p.gate != nullptr) gates[i] = static_cast<const T*>(p.gate)[first + i];
        }
    }

    template <typename Params, int kLanes>
    __device__ __forceinline__ int64_t offset(const Params& p, const Place<kLanes>& at, int i) const {
        return (first + i) * p.head_dim + at.column;
    }
};

__device__ __forceinline__ bool is_short(float squares) { return squares < kMinNorm * kMinNorm; }  // a NaN is not

// 1 / max(|v|, kMinNorm).
__device__ __forceinline__ float inverse_norm(float squares) {
    return is_short(squares) ? 1.0f / kMinNorm : rsqrtf(squares);
}

template <typename T, int kLanes, bool kXsa>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) xsa_gate_forward_kernel(const XsaGateForward p) {
    const int heads = static_cast<int>(p.rows) * p.kv_heads;
    T* const out = static_cast<T*>(p.out);
    for (int first = first_head<kLanes>(); first < heads; first += gridDim.x * kBlockHeads<kLanes>) {
        const Place<kLanes> at(p, first, heads);
        const Eight<T> v_packed = load_v<kXsa, T>(p, at);
        // The first pair outside of the loop: its loads must not wait until v is there to be unpacked.
        Pair<T> pair(p, at, 0);
        for (int next = 2;; next += 2) {
            float v[kColumns], y[2][kColumns];
            unpack(pair.y_packed[0], y[0]);
            unpack(pair.y_packed[1], y[1]);
            if constexpr (kXsa) {
                unpack(v_packed, v);
                float squares = dot_eight(v, v), dot0 = dot_eight(y[0], v), dot1 = dot_eight(y[1], v);
                head_sums<kLanes>(squares, dot0, dot1);
                const float inverse = inverse_norm(squares);
                const float along[] = {dot0 * inverse * inverse, dot1 * inverse * inverse};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) y[i][c] = fmaf(-along[i], v[c], y[i][c]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (float& value : y[i]) value *= to_float(pair.gates[i]);
                if (pair.exists[i]) store_eight(out + pair.offset(p, at, i), y[i]);
            }
            if (next >= p.group) break;
            pair = Pair<T>(p, at, next);
        }
    }
}

// With m = max(|v|, kMinNorm), u = v / m, and for each head of y a = y . u, b = grad . u:
//   grad_gate = grad . y - a b;  grad_y = gate (grad - b u)
//   grad_v = -1/m * sum over the group of gate (a grad + b y - 2 a b u), without the last term where m is not |v|
template <typename T, int kLanes, bool kXsa>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) xsa_gate_backward_kernel(const XsaGateBackward p) {
    const int heads = static_cast<int>(p.rows) * p.kv_heads;
    for (int first = first_head<kLanes>(); first < heads; first += gridDim.x * kBlockHeads<kLanes>) {
        const Place<kLanes> at(p, first, heads);
        const Eight<T> v_packed = load_v<kXsa, T>(p, at);
        float sum[kColumns] = {};  // of gate (a grad + b y)
        float excess = 0.0f;       // sum of gate 2 a b
        float squares = 0.0f, inverse = 0.0f;
        Pair<T> pair(p, at, 0);
        for (int next = 2;; next += 2) {
            float v[kColumns];
            if constexpr (kXsa) {
                unpack(v_packed, v);
                squares = dot_eight(v, v);
                head_sums<kLanes>(squares);
                inverse = inverse_norm(squares);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float y[kColumns], grad[kColumns];
                unpack(pair.y_packed[i], y);
                unpack(pair.grad_packed[i], grad);
                const float gate = to_float(pair.gates[i]);
                float grad_gate = dot_eight(grad, y);
                if constexpr (kXsa) {
                    float a = dot_eight(y, v), b = dot_eight(grad, v);
                    head_sums<kLanes>(grad_gate, a, b);
                    a *= inverse;
                    b *= inverse;
                    grad_gate = fmaf(-a, b, grad_gate);
                    excess = fmaf(2.0f * gate * a, b, excess);
                    const float along = b * inverse;
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) {
                        sum[c] += gate * fmaf(a, grad[c], b * y[c]);
                        grad[c] = gate * fmaf(-along, v[c], grad[c]);
                    }
                } else {
                    head_sums<kLanes>(grad_gate);
#pragma unroll
                    for (float& value : grad) value *= gate;
                }
                if (!pair.exists[i]) continue;
                store_eight(static_cast<T*>(p.grad_y) + pair.offset(p, at, i), grad);
                if (p.grad_gate != nullptr && at.column == 0) {
                    static_cast<T*>(p.grad_gate)[pair.first + i] = from_float<T>(grad_gate);
                }
            }
            if (next >= p.group) break;
            pair = Pair<T>(p, at, next);
        }
        if constexpr (kXsa) {
            float v[kColumns];
            unpack(v_packed, v);
            const float along = is_short(squares) ? 0.0f : excess * inverse;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) v[c] = -inverse * fmaf(-along, v[c], sum[c]);
            const int64_t target = static_cast<int64_t>(at.head) * p.head_dim + at.column;
            if (at.exists && p.grad_v != nullptr) store_eight(static_cast<T*>(p.grad_v) + target, v);
        }
    }
}

template <int kLanes, typename Params>
unsigned blocks_for(const Params& p, int per_processor) {
    const int64_t needed = (p.rows * p.kv_heads + kBlockHeads<kLanes> - 1) / kBlockHeads<kLanes>;
    return filling_blocks(needed, per_processor, "xsa_gate");
}

template <typename T, int kLanes, bool kXsa>
void launch(const XsaGateForward& p, cudaStream_t stream) {
    const unsigned blocks = blocks_for<kLanes>(p, kForwardBlocks);
    xsa_gate_forward_kernel<T, kLanes, kXsa><<<blocks, kThreads, 0, stream>>>(p);
}

template <typename T, int kLanes, bool kXsa>
void launch(const XsaGateBackward& p, cudaStream_t stream) {
    const unsigned blocks = blocks_for<kLanes>(p, kBackwardBlocks);
    xsa_gate_backward_kernel<T, kLanes, kXsa><<<blocks, kThreads, 0, stream>>>(p);
}

template <typename T, typename Params>
void launch_for_shape(const Params& p, cudaStream_t stream) {
    const bool xsa = p.v != nullptr;
    if (p.head_dim <= 8 * kColumns) {
        xsa ? launch<T, 8, true>(p, stream) : launch<T, 8, false>(p, stream);
    } else {
        xsa ? launch<T, 16, true>(p, stream) : launch<T, 16, false>(p, stream);
    }
}

template <typename Params>
void launch_for_dtype(const Params& p, cudaStream_t stream, const char* name) {
    if (p.rows == 0) return;  // an empty grid is an error to CUDA
    switch (p.dtype) {
        case DType::kFloat32:
            launch_for_shape<float>(p, stream);
            break;
        case DType::kBFloat16:
            launch_for_shape<__nv_bfloat16>(p, stream);
            break;
        default:
            throw std::runtime_error(std::string(name) + ": dtype: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(p.dtype)));
    }
    check_launch(name);
}

}  // namespace

void xsa_gate_forward(const XsaGateForward& params, cudaStream_t stream) {
    launch_for_dtype(params, stream, "xsa_gate_forward");
}

void xsa_gate_backward(const XsaGateBackward& params, cudaStream_t stream) {
    launch_for_dtype(params, stream, "xsa_gate_backward");
}

}  // namespace pgolf::generic
