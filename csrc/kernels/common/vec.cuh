// Short vectors moved by one instruction, computed with in float32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace pgolf {

constexpr int kVectorBytes = 16;  // the widest load of one thread

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <typename T, int N>
struct alignas(N * sizeof(T)) Packed {
    T value[N];
};

// Read N values from `source`, which is aligned to N * sizeof(T).
template <int N, typename T>
__device__ __forceinline__ void load(const T* source, float (&x)[N]) {
    const auto packed = *reinterpret_cast<const Packed<T, N>*>(source);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(packed.value[i]);
}

// Round N values to T and write them to `target`, which is aligned to N * sizeof(T).
template <int N, typename T>
__device__ __forceinline__ void store(T* target, const float (&x)[N]) {
    Packed<T, N> packed;
#pragma unroll
    for (int i = 0; i < N; ++i) packed.value[i] = from_float<T>(x[i]);
    *reinterpret_cast<Packed<T, N>*>(target) = packed;
}

// Whether a matrix of rows of `dim` values at `address` can be read in vectors of kVectorBytes.
template <typename T>
bool vectorizable(const void* address, int64_t dim) {
    return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0 && dim % (kVectorBytes / sizeof(T)) == 0;
}

}  // namespace pgolf
