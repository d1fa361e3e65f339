// Walking the rows of several matrices at once: what operators that are bound by memory and sum over rows share.
//
// A row belongs to a group of 1, 2 or 4 warps, a thread has 8 of its columns in every matrix, and the groups of the
// grid take the rows by turns. Each thread copies the 16-byte pieces that it will read itself to shared memory, two
// rows ahead: no barrier guards them, and values needed before and after a sum over the row are read again instead of
// held, so that registers are left for sums over the columns.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/async_copy.cuh"
#include "common/check.h"
#include "common/grid.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops.h"

namespace pgolf::generic {

constexpr int kColumns = 8;       // of a row, a thread's
constexpr int kStages = 2;        // rows under way
constexpr int kRowThreads = 128;  // of a block

template <typename T>
constexpr int kRowVectors = kColumns * sizeof(T) / kVectorBytes;

// Threads of a row.
inline int row_threads(int dim) { return dim <= 32 * kColumns ? 32 : dim <= 64 * kColumns ? 64 : 128; }

// Blocks of a grid that walks `rows` rows, at most `per_processor` a multiprocessor.
inline int row_blocks(int64_t rows, int dim, int per_processor) {
    const int64_t groups = kRowThreads / row_threads(dim);
    return static_cast<int>(filling_blocks((rows + groups - 1) / groups, per_processor, "rows"));
}

// Which rows and columns a thread works on.
struct RowWalk {
    int threads;  // of a row
    int group;    // of the block, that the thread is in
    int thread;   // of the group
    int column;   // the first of the thread's
    bool active;  // whether the row has these columns
    int64_t first, step;

    __device__ __forceinline__ RowWalk(int dim, int row_threads) : threads(row_threads) {
        group = static_cast<int>(threadIdx.x) / threads;
        thread = static_cast<int>(threadIdx.x) % threads;
        column = thread * kColumns;
        active = column < dim;
        const int groups = kRowThreads / threads;
        first = static_cast<int64_t>(blockIdx.x) * groups + group;
        step = static_cast<int64_t>(gridDim.x) * groups;
    }

    __device__ __forceinline__ int warps() const { return threads / kWarpSize; }  // of a row

    // Wait for the other warps of the group, which see what this one wrote. Constant numbers of barriers: for one in a
    // register the compiler reserves all sixteen.
    __device__ __forceinline__ void sync() const {
        if (threads == kWarpSize) return;
        if (group == 0) {
            asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
        } else {
            asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
        }
    }
};

// The sums of two values over the row, the same bits in all of its threads. Called once a row, with `shared`
// [walk.warps()] of the group, another one than for the row before.
__device__ __forceinline__ float2 row_sums(float a, float b, const RowWalk& walk, float2* shared) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (walk.threads == kWarpSize) return {a, b};
    if (walk.thread % kWarpSize == 0) shared[walk.thread / kWarpSize] = {a, b};
    walk.sync();
    float2 sum = shared[0];
#pragma unroll 1
    for (int warp = 1; warp < walk.warps(); ++warp) {
        sum.x += shared[warp].x;
        sum.y += shared[warp].y;
    }
    return sum;
}

// A thread's pieces of kTensors rows, kStages times.
template <typename T, int kTensors>
struct RowSlots {
    static constexpr int kBytes = kStages * kTensors * kRowVectors<T> * kRowThreads * kVectorBytes;

    uint4* mine;

    __device__ __forceinline__ explicit RowSlots(uint4* shared) : mine(shared + threadIdx.x) {}

    __device__ __forceinline__ uint4* slot(int stage, int tensor, int vector) const {
        return mine + ((stage * kTensors + tensor) * kRowVectors<T> + vector) * kRowThreads;
    }

    // Begin to copy the thread's columns at `offset` of `matrix`; zeros where it is null or not `inside`.
    __device__ __forceinline__ void fetch(int stage, int tensor, const void* matrix, int64_t offset,
                                          bool inside) const {
        inside = inside && matrix != nullptr;
        const char* const source = static_cast<const char*>(matrix) + (inside ? offset * int64_t{sizeof(T)} : 0);
#pragma unroll
        for (int v = 0; v < kRowVectors<T>; ++v) {
            copy16(static_cast<uint32_t>(__cvta_generic_to_shared(slot(stage, tensor, v))), source + v * kVectorBytes,
                   inside);
        }
    }

    __device__ __forceinline__ void read(int stage, int tensor, float (&x)[kColumns]) const {
#pragma unroll
        for (int v = 0; v < kRowVectors<T>; ++v) {
            const uint4 raw = *slot(stage, tensor, v);
            const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (sizeof(T) == sizeof(float)) {
                    x[v * 4 + i] = __uint_as_float(word[i]);
                } else {  // a bfloat16 is the upper half of the float32
                    x[2 * i] = __uint_as_float(word[i] << 16);
                    x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
                }
            }
        }
    }
};

// Round the thread's columns to T and write them at `offset` of `matrix`.
template <typename T>
__device__ __forceinline__ void store_columns(void* matrix, int64_t offset, const float (&x)[kColumns]) {
    T* const target = static_cast<T*>(matrix) + offset;
    constexpr int N = kVectorBytes / sizeof(T);
#pragma unroll
    for (int v = 0; v < kRowVectors<T>; ++v) {
        Packed<T, N> packed;
#pragma unroll
        for (int i = 0; i < N; ++i) packed.value[i] = from_float<T>(x[v * N + i]);
        uint4 raw;
        memcpy(&raw, &packed, sizeof(raw));
        *reinterpret_cast<uint4*>(target + v * N) = raw;
    }
}

// Vectors of `dim` float32 in shared memory, the first and the second half of each thread's columns apart: so a warp
// reads them without bank conflicts. Columns from `dim` on are zeros.
struct RowVectors {
    float4* shared;
    int threads;  // of a row

    __host__ __device__ static constexpr int bytes(int count, int threads) {
        return count * threads * kColumns * static_cast<int>(sizeof(float));
    }

    __device__ __forceinline__ float4* half(int index, int which, int thread) const {
        return shared + (index * 2 + which) * threads + thread;
    }

    // Fill the vector `index` by the whole block with f(source[column]), of ones where source is null.
    template <typename Function>
    __device__ __forceinline__ void fill(int index, const float* source, int dim, Function f) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < 2 * threads; i += kRowThreads) {
            const int column = i * 4;
            float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
            if (column < dim) {
                x = source ? *reinterpret_cast<const float4*>(source + column) : float4{1.0f, 1.0f, 1.0f, 1.0f};
                x = {f(x.x), f(x.y), f(x.z), f(x.w)};
            }
            *half(index, i % 2, i / 2) = x;
        }
    }

    __device__ __forceinline__ void read(int index, int thread, float (&x)[kColumns]) const {
        const float4 low = *half(index, 0, thread), high = *half(index, 1, thread);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
};

// Sums over the rows of a block: the groups' sums [kSums][8] of a thread are added up in order and written to
// target[kSums, dim]. `shared` holds kSums * kRowThreads * 32 bytes; what the block had there is lost.
template <int kSums>
__device__ __forceinline__ void write_column_sums(const float (&sum)[kSums][kColumns], const RowWalk& walk,
                                                  float4* shared, float* target, int dim) {
    const int groups = kRowThreads / walk.threads;
    const int count = kSums * 2 * walk.threads;  // of a group
    const auto at = [&](int group, int index) -> float4& { return shared[group * count + index]; };
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
        const float (&x)[kColumns] = sum[k];
        at(walk.group, (2 * k) * walk.threads + walk.thread) = {x[0], x[1], x[2], x[3]};
        at(walk.group, (2 * k + 1) * walk.threads + walk.thread) = {x[4], x[5], x[6], x[7]};
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kRowThreads) {
        float4 total = at(0, i);
#pragma unroll 1
        for (int g = 1; g < groups; ++g) {
            const float4 x = at(g, i);
            total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
        }
        const int half = i / walk.threads;
        const int column = i % walk.threads * kColumns + half % 2 * 4;
        if (column < dim) *reinterpret_cast<float4*>(target + (half / 2) * dim + column) = total;
    }
}

// Floats from one block's sums to the next block's: rows of whole vectors.
__host__ __device__ constexpr int sums_stride(int width) { return (width + 3) / 4 * 4; }

// out[i] = sum of partial[block, i] over the blocks, i < width, in an order that `blocks` alone decides (rows.cu).
// `what` is told where the launch fails.
void sum_blocks(const float* partial, int blocks, int width, float* out, cudaStream_t stream, const char* what);

// Floats of scratch for sums of `width` values by each block of a grid as `row_blocks` has it.
inline int64_t row_scratch(int64_t rows, int dim, int per_processor, int width) {
    return static_cast<int64_t>(row_blocks(rows, dim, per_processor)) * sums_stride(width);
}

// Call function(T{}) for the type of the activations.
template <typename Function>
void with_type(DType dtype, const char* what, Function function) {
    switch (dtype) {
        case DType::kFloat32:
            return function(float{});
        case DType::kBFloat16:
            return function(__nv_bfloat16{});
    }
    throw std::runtime_error(std::string(what) + ": dtype: expected 0 (float32) or 1 (bfloat16), got " +
                             std::to_string(static_cast<int>(dtype)));
}

// Let `kernel` use `bytes` bytes of shared memory.
template <typename Kernel>
void allow_shared(Kernel kernel, int bytes, const Target& target, const char* what) {
    if (bytes > target.shared_memory) {
        throw std::runtime_error(std::string(what) + ": shared memory: expected at most " +
                                 std::to_string(target.shared_memory) + " bytes, got " + std::to_string(bytes));
    }
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
}

}  // namespace pgolf::generic
