// Sums in an order that depends on nothing but the shape: the same bits on every run.
#pragma once

namespace pgolf {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A sum of float32 in about twice their precision: `rest` has what rounding takes from `sum` (Knuth's TwoSum, The Art
// of Computer Programming 2, section 4.2.2). For sums over all rows, whose terms largely cancel: the error of a plain
// sum grows with the terms, not with what is left of them. Begin with CompensatedSum{}.
struct CompensatedSum {
    float sum, rest;

    // The intrinsics are never contracted with the multiplication that x may come from.
    __device__ __forceinline__ void add(float x) {
        const float total = __fadd_rn(sum, x);
        const float added = __fsub_rn(total, sum);
        rest += __fadd_rn(__fsub_rn(sum, __fsub_rn(total, added)), __fsub_rn(x, added));
        sum = total;
    }

    // The same bits when the two change places.
    __device__ __forceinline__ void add(const CompensatedSum& x) {
        rest += x.rest;
        add(x.sum);
    }

    // Infinite or NaN where a plain sum is: `rest` is NaN then.
    __device__ __forceinline__ float value() const { return isfinite(sum) ? sum + rest : sum; }
};

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

// Sum over each kLanes neighbouring lanes of the warp, the same bits in all of them.
template <int kLanes = kWarpSize>
__device__ __forceinline__ CompensatedSum warp_sum(CompensatedSum x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        x.add({__shfl_xor_sync(kAllLanes, x.sum, offset), __shfl_xor_sync(kAllLanes, x.rest, offset)});
    }
    return x;
}

// Sum over a block of kThreads threads, valid in the first warp; X is float or CompensatedSum. Called once per kernel:
// it does not protect its shared memory against a second call.
template <int kThreads, typename X>
__device__ __forceinline__ X block_sum(X x) {
    static_assert(kThreads % kWarpSize == 0 && kThreads <= kWarpSize * kWarpSize);
    __shared__ X partial[kThreads / kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp == 0 ? warp_sum(lane < kThreads / kWarpSize ? partial[lane] : X{}) : X{};
}

}  // namespace pgolf
