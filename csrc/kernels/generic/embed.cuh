// What the files of `embed` share: a row in a warp's registers, and the sort of positions by token id.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops.h"

namespace pgolf::generic {

constexpr int kValues = 16;                        // a lane's share of a row
constexpr int kTileColumns = kValues * kWarpSize;  // what a warp holds of a row at once

// A lane's part of a tile of a row: vectors of N values, kWarpSize * N columns apart. N = 1, or as many as 16 bytes
// hold; those stay words until they are used, since the compiler takes structures of 16-bit values apart.
template <typename T, int N>
struct Row {
    static_assert(N == 1 || N * sizeof(T) == sizeof(uint4));
    using Part = std::conditional_t<N == 1, T, uint4>;
    Part part[kValues / N];
};

template <int N>
__device__ __forceinline__ int column_of(int part, int lane) {
    return (part * kWarpSize + lane) * N;
}

// The first `columns` values at `source`, zeros after them. kL2: without taking room in the first-level cache.
template <bool kL2 = false, typename T, int N>
__device__ __forceinline__ void load_row(const T* source, int columns, int lane, Row<T, N>& row) {
    using Part = typename Row<T, N>::Part;
#pragma unroll
    for (int j = 0; j < kValues / N; ++j) {
        const int column = column_of<N>(j, lane);
        const Part* const part = reinterpret_cast<const Part*>(source + column);
        row.part[j] = Part{};
        if (column < columns) row.part[j] = kL2 ? __ldcg(part) : *part;
    }
}

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

template <typename T, int N>
__device__ __forceinline__ float value_of(const Row<T, N>& row, int i) {
    if constexpr (N == 1) {
        return to_float(row.part[i]);
    } else if constexpr (sizeof(T) == sizeof(float)) {
        return __uint_as_float(word_of(row.part[i / N], i % N));
    } else {  // a bfloat16 is the upper half of the float32
        const uint32_t pair = word_of(row.part[i / N], i % N / 2);
        return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    }
}

// Has the compiler convert the row's values again where they are used next: float32 copies would take twice the
// registers.
template <typename T, int N>
__device__ __forceinline__ void keep_packed(Row<T, N>& row) {
    if constexpr (N > 1 && sizeof(T) < sizeof(float)) {
#pragma unroll
        for (uint4& x : row.part) asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
    }
}

__device__ __forceinline__ bool is_known(int64_t id, int vocab) { return id >= 0 && id < vocab; }

// The row of `weight` to read for an id: one that exists, whatever the id.
__device__ __forceinline__ int row_of(int64_t id, int vocab) { return is_known(id, vocab) ? static_cast<int>(id) : 0; }

// The positions of each id, ids and then positions ascending. Those of ids outside [0, vocab) come last.
struct EmbedSort {
    const int64_t* ids;  // [rows]
    int* order;          // [rows]: the positions
    int* starts;         // [vocab + 1]: where each id's positions begin, and where those of all known ids end
    int* scratch;        // [embed_sort_scratch(rows, vocab)]
    int64_t rows;        // fewer than 2^31
    int vocab;
};

void embed_sort(const EmbedSort& params, cudaStream_t stream);

// Ints of scratch that embed_sort needs.
int64_t embed_sort_scratch(int64_t rows, int vocab);

}  // namespace pgolf::generic
