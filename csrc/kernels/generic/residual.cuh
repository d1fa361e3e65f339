// What residual's forward and backward share: which operands a variant has, and its gate.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <type_traits>

#include "generic/rows.cuh"
#include "ops/residual.h"

namespace pgolf::generic {

// Places of operands among a variant's tensors in RowSlots and vectors in RowVectors.
template <bool kBranch, bool kSkip, bool kMix>
struct Variant {
    static constexpr bool kHasBranch = kBranch, kHasSkip = kSkip, kHasMix = kMix;
    static constexpr bool kChanges = kBranch || kSkip || kMix;  // u is not x

    static constexpr int kX = 0, kBranchAt = 1, kSkipAt = 1 + kBranch, kX0 = 1 + kBranch + kSkip;
    static constexpr int kTensors = 1 + kBranch + kSkip + kMix;

    static constexpr int kScale = 0, kWeight = kBranch, kGate = kBranch + 1, kMixAt = kBranch + 2 * kSkip;
    static constexpr int kVectors = kBranch + 2 * kSkip + 2 * kMix;
};

// The gradients among a variant's tensors, that of the blend where kBlend.
template <typename V, bool kBlend>
struct Gradients {
    static constexpr int kSum = V::kTensors, kStream = kSum + 1, kNormed = kSum + 2, kX0 = kSum + 3;
    static constexpr int kBlendAt = kX0 + V::kHasMix, kTensors = kBlendAt + kBlend;
};

// One row's values in a thread's columns, as far as the variant has them.
struct Values {
    float s[kColumns], skipped[kColumns];  // skipped = skip_weight * skip
    float t[kColumns], x0[kColumns], u[kColumns];
};

// What the sum 1 + exp(-|x|) loses is given back: near 1, where the slope is a small difference, its gradient shows it.
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    const float sum = 1.0f + e;
    const float lost = e - (sum - 1.0f);
    const float y = 1.0f / sum;
    const float above = fmaf(-lost * y, y, y);
    return x < 0.0f ? e * above : above;
}

// 1 / sqrt(x), with a Newton step: the error of rsqrtf alone would be a whole row's.
__device__ __forceinline__ float inverse_root(float x) {
    const float y = rsqrtf(x);
    return x < INFINITY ? fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y) : y;
}

template <typename V>
__device__ __forceinline__ void fill_vectors(const RowVectors& vectors, const ResidualInputs& in) {
    const auto as_is = [](float x) { return x; };
    if constexpr (V::kHasBranch) vectors.fill(V::kScale, in.branch_scale, in.dim, as_is);
    if constexpr (V::kHasSkip) {
        vectors.fill(V::kWeight, in.skip_weight, in.dim, as_is);
        vectors.fill(V::kGate, in.skip_gate, in.dim, [](float x) { return sigmoid(x); });
    }
    if constexpr (V::kHasMix) {
        vectors.fill(V::kMixAt, in.mix, in.dim, as_is);
        vectors.fill(V::kMixAt + 1, in.mix + in.dim, in.dim, as_is);
    }
}

template <typename V, typename Slots>
__device__ __forceinline__ void fetch_inputs(const Slots& slots, int stage, const ResidualInputs& in, int64_t offset,
                                             bool inside) {
    slots.fetch(stage, V::kX, in.x, offset, inside);
    if constexpr (V::kHasBranch) slots.fetch(stage, V::kBranchAt, in.branch, offset, inside);
    if constexpr (V::kHasSkip) slots.fetch(stage, V::kSkipAt, in.skip, offset, inside);
    if constexpr (V::kHasMix) slots.fetch(stage, V::kX0, in.x0, offset, inside);
}

// s to u of a row that has arrived.
template <typename V, typename Slots>
__device__ __forceinline__ void compute_values(const Slots& slots, int stage, const RowVectors& vectors, int thread,
                                               const ResidualInputs& in, Values& v) {
    slots.read(stage, V::kX, v.s);
    if constexpr (V::kHasBranch) {
        float branch[kColumns], scale[kColumns];
        slots.read(stage, V::kBranchAt, branch);
        vectors.read(V::kScale, thread, scale);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) v.s[i] = fmaf(scale[i], branch[i], v.s[i]);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v.t[i] = v.s[i];
    if constexpr (V::kHasSkip) {
        float weight[kColumns], gate[kColumns];
        slots.read(stage, V::kSkipAt, v.skipped);
        vectors.read(V::kWeight, thread, weight);
        vectors.read(V::kGate, thread, gate);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            v.skipped[i] = weight[i] * (in.skip != nullptr ? v.skipped[i] : v.s[i]);
            // As torch.lerp has it, from the nearer end: exact at both, and infinite where that is.
            const bool near = gate[i] < 0.5f;
            v.t[i] = fmaf(near ? gate[i] : gate[i] - 1.0f, v.s[i] - v.skipped[i], near ? v.skipped[i] : v.s[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v.u[i] = v.t[i];
    if constexpr (V::kHasMix) {
        float mix[kColumns], mix0[kColumns];
        slots.read(stage, V::kX0, v.x0);
        vectors.read(V::kMixAt, thread, mix);
        vectors.read(V::kMixAt + 1, thread, mix0);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) v.u[i] = fmaf(mix0[i], v.x0[i], mix[i] * v.t[i]);
    }
}

// The gate's part of shared memory: weights transposed, a row of them longer than the heads, so that lanes that run
// along either dimension read other banks; and for each group a few vectors of one value a lane.
constexpr int kGateStride = kResidualMaxGate + 1;

__host__ __device__ constexpr int gate_weight_floats(int window) { return window * kGateStride; }

__device__ __forceinline__ void fill_gate_weight(float* shared, const ResidualInputs& in) {
#pragma unroll 1
    for (int i = threadIdx.x; i < in.heads * in.window; i += kRowThreads) {
        shared[i % in.window * kGateStride + i / in.window] = in.gate_weight[i];
    }
}

// The first 32 columns of the row, rounded to T, for all lanes of its first warp.
template <typename T>
__device__ __forceinline__ void share_normed(const float (&n)[kColumns], int lane, float* shared) {
    if (lane < kWarpSize / kColumns) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) shared[lane * kColumns + i] = to_float(from_float<T>(n[i]));
    }
    __syncwarp();
}

// Call function(Variant<...>{}) for the operands that are there.
template <typename Function>
void with_variant(const ResidualInputs& in, Function function) {
    const auto flag = [](bool value, auto next) { value ? next(std::true_type{}) : next(std::false_type{}); };
    flag(in.branch != nullptr, [&](auto branch) {
        flag(in.skip_weight != nullptr, [&](auto skip) {
            flag(in.x0 != nullptr, [&](auto mix) { function(Variant<branch.value, skip.value, mix.value>{}); });
        });
    });
}

}  // namespace pgolf::generic
