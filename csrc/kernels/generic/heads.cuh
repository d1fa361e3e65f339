// What the operators on attention heads share: a head lies in kLanes neighbouring lanes of a warp, eight columns a
// lane.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/reduce.cuh"

namespace pgolf::generic {

constexpr int kColumns = 8;  // of a head, a lane's share

// Eight values as they lie in memory, in words until they are used: the compiler takes structures of 16-bit values
// apart.
template <typename T>
struct Eight {
    static constexpr int kParts = kColumns * sizeof(T) / sizeof(uint4);
    uint4 part[kParts];
};

// `source` is a multiple of 16 bytes; zeros, and nothing read, unless `exists`.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* source, bool exists) {
    Eight<T> x{};
    if (exists) {
#pragma unroll
        for (int i = 0; i < Eight<T>::kParts; ++i) x.part[i] = reinterpret_cast<const uint4*>(source)[i];
    }
    return x;
}

__device__ __forceinline__ void unpack(const Eight<float>& packed, float (&x)[kColumns]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        x[4 * i] = __uint_as_float(packed.part[i].x);
        x[4 * i + 1] = __uint_as_float(packed.part[i].y);
        x[4 * i + 2] = __uint_as_float(packed.part[i].z);
        x[4 * i + 3] = __uint_as_float(packed.part[i].w);
    }
}

__device__ __forceinline__ void unpack(const Eight<__nv_bfloat16>& packed, float (&x)[kColumns]) {
    const uint32_t words[] = {packed.part[0].x, packed.part[0].y, packed.part[0].z, packed.part[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of the float32
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void store_eight(float* target, const float (&x)[kColumns]) {
    float4* const parts = reinterpret_cast<float4*>(target);
    parts[0] = make_float4(x[0], x[1], x[2], x[3]);
    parts[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store_eight(__nv_bfloat16* target, const float (&x)[kColumns]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

// The values of lane `source`; all lanes of the warp call it together.
template <typename T>
__device__ __forceinline__ Eight<T> shuffle(const Eight<T>& x, int source) {
    Eight<T> y;
#pragma unroll
    for (int i = 0; i < Eight<T>::kParts; ++i) {
        y.part[i].x = __shfl_sync(kAllLanes, x.part[i].x, source);
        y.part[i].y = __shfl_sync(kAllLanes, x.part[i].y, source);
        y.part[i].z = __shfl_sync(kAllLanes, x.part[i].z, source);
        y.part[i].w = __shfl_sync(kAllLanes, x.part[i].w, source);
    }
    return y;
}

// A lane's part of the dot product of a head: two sums, for a shorter chain of dependent instructions.
__device__ __forceinline__ float dot_eight(const float (&x)[kColumns], const float (&y)[kColumns]) {
    float even = x[0] * y[0], odd = x[1] * y[1];
#pragma unroll
    for (int i = 2; i < kColumns; i += 2) {
        even = fmaf(x[i], y[i], even);
        odd = fmaf(x[i + 1], y[i + 1], odd);
    }
    return even + odd;
}

// Sums over the kLanes lanes of a head, the same bits in each; all lanes of the warp call it together.
template <int kLanes, typename... Float>
__device__ __forceinline__ void head_sums(Float&... x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) ((x += __shfl_xor_sync(kAllLanes, x, offset)), ...);
}

}  // namespace pgolf::generic
