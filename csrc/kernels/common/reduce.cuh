// Sums in an order that depends on nothing but the shape: the same bits on every run.
#pragma once

namespace pgolf {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

// Sum over a block of kThreads threads, valid in the first warp. Called once per kernel: it does not protect its shared
// memory against a second call.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
    static_assert(kThreads % kWarpSize == 0 && kThreads <= kWarpSize * kWarpSize);
    __shared__ float partial[kThreads / kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp == 0 ? warp_sum(lane < kThreads / kWarpSize ? partial[lane] : 0.0f) : 0.0f;
}

}  // namespace pgolf
