// C[i] = A[i] B[i]^T on tensor cores (mma.sync), for any GPU from sm_80: bfloat16 in, float32 sums, an epilogue functor
// that decides what becomes of each result.
//
// A block of four warps computes a tile of 128 x 128, a warp 64 x 64 of it. cp.async keeps slices of A and B in flight;
// ldmatrix reads them from shared memory, where the 16-byte chunks of a row are permuted so that neither the copies nor
// the reads meet in a bank.
//
// The epilogue: `epilogue(batch, row, col, x)`, called on the device as a const member
//     __device__ void operator()(int batch, int64_t row, int col, float (&x)[8]) const;
// with C[batch][row, col .. col + 7] in x, col a multiple of 8. All 32 lanes of a warp call it together: lanes 0 to 15
// hold the 128 columns of one row of the tile (lane l those from 8 (l % 16)), lanes 16 to 31 those of the next row, so
// sums over a row's tile are shuffles within 16 lanes. It is also called where row >= m or col + i >= n: there x holds
// no result, and the functor must compare, mask, and write nothing. A functor without shuffles may return early.
// A functor that reads memory does so in a second member,
//     __device__ Operand read(int batch, int64_t row, int col) const;
// called for many rows before the first of them is due, and gets the operand as a last argument, `const Operand&`. Its
// loads are then under way together. It too is called beyond the edges and must not read there.
#pragma once

#include <cuda_bf16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/async_copy.cuh"
#include "common/check.h"
#include "common/vec.cuh"
#include "generic/tiles.h"
#include "ops.h"

namespace pgolf::generic {

// The operands: rows contiguous, 16-byte aligned, all strides in elements and multiples of 8. A stride between matrices
// of 0 uses the same one for the whole batch.
struct GemmShape {
    const void* a;  // [batch, m, k]
    const void* b;  // [batch, n, k]
    int64_t m;
    int n, k;                            // k a multiple of 8
    int64_t row_a, row_b;                // between rows
    int batch = 1;                       // at most 65535
    int64_t matrix_a = 0, matrix_b = 0;  // between matrices of the batch
};

// A schedule says how many tiles a matrix takes and which one the i-th block computes, as (row, column) of tiles.

// Every tile, column by column within groups of 8 rows: blocks that run together share operands in the L2 cache.
struct AllTiles {
    static constexpr int kGroup = 8;

    int64_t count(int64_t rows, int64_t columns) const { return rows * columns; }

    __device__ int2 operator()(int i, int rows, int columns) const {
        const int first = i / (kGroup * columns) * kGroup;
        const int height = min(kGroup, rows - first);
        const int within = i - first * columns;
        return {first + within % height, within / height};
    }
};

// Of a symmetric product (m == n) the tiles on and above the diagonal: the epilogue writes each result's mirror too.
struct UpperTiles {
    int64_t count(int64_t rows, int64_t) const { return rows * (rows + 1) / 2; }

    __device__ int2 operator()(int i, int rows, int) const {
        int row = 0;
        for (; i >= rows - row; ++row) i -= rows - row;
        return {row, row + i};
    }
};

namespace gemm {

constexpr int kThreads = 128;  // warps 2 x 2
constexpr int kBlocks = 2;     // a multiprocessor, what the tiles' shared memory and 255 registers a thread allow
constexpr int kWarpTile = 64;

// Four 8 x 8 matrices: lanes 8 i to 8 i + 7 give the addresses of the rows of the i-th.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

// sum [16 x 8] += a [16 x 16] b [8 x 16]^T
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte offset of a 16-byte chunk of a row within a slice of kChunks chunks a row. Eight rows' chunks of the same column
// fall into eight different groups of four banks.
template <int kChunks>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
    static_assert(kChunks == 4 || kChunks == 8);
    const int key = row / (8 / kChunks) % kChunks;
    return 16 * (row * kChunks + (chunk ^ key));
}

// One thread's part in copying slices of an operand (128 rows) to shared memory.
template <int kChunks>
struct Loader {
    static constexpr int kRows = kThreads / kChunks;  // copied at once; a multiple of 8, so their permutation repeats
    static constexpr int kCopies = 128 / kRows;

    const __nv_bfloat16* source[kCopies];
    bool inside[kCopies];

    // Rows from `first` on of a matrix of `rows` rows; rows beyond it read zero.
    __device__ __forceinline__ Loader(const __nv_bfloat16* matrix, int64_t stride, int64_t first, int64_t rows) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            const int64_t row = first + i * kRows + threadIdx.x / kChunks;
            inside[i] = row < rows;
            source[i] = matrix + (inside[i] ? row : first) * stride;
        }
    }

    // Columns from `first` on, of `columns`, to the slice at `target`.
    __device__ __forceinline__ void operator()(uint32_t target, int first, int columns) const {
        const int chunk = threadIdx.x % kChunks;
        const int column = first + 8 * chunk;
        const bool exists = column < columns;
        target += chunk_offset<kChunks>(threadIdx.x / kChunks, chunk);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            copy16(target + i * kRows * kChunks * 16, source[i] + (exists ? column : 0), exists && inside[i]);
        }
    }
};

struct Nothing {};

// What the epilogue reads for one call.
template <typename Epilogue>
__device__ __forceinline__ auto read_operand(const Epilogue& epilogue, int batch, int64_t row, int col) {
    if constexpr (requires { epilogue.read(batch, row, col); }) {
        return epilogue.read(batch, row, col);
    } else {
        return Nothing{};
    }
}

template <typename Tile, typename Epilogue, typename Schedule>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gemm_kernel(const GemmShape shape, const Epilogue epilogue, const Schedule schedule) {
    constexpr GemmTile kTile = Tile::value;
    static_assert(kTile.m == 2 * kWarpTile && kTile.n == 2 * kWarpTile && kTile.stages >= 2);
    constexpr int kChunks = kTile.k / 8;
    constexpr int kSteps = kTile.k / 16;
    static_assert(kSteps % 2 == 0, "fragments alternate between two sets of registers");
    constexpr int kOperandBytes = 128 * kTile.k * 2;
    constexpr int kFragmentBytes = 16 * kTile.k * 2;  // 16 rows of a slice
    constexpr int kFragments = kWarpTile / 16;

    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t slices = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warp_row = warp / 2, warp_column = warp % 2;
    const int batch = blockIdx.z;
    const int2 tile =
        schedule(blockIdx.x, static_cast<int>((shape.m + kTile.m - 1) / kTile.m), (shape.n + kTile.n - 1) / kTile.n);
    const int64_t first_row = static_cast<int64_t>(tile.x) * kTile.m;
    const int first_column = tile.y * kTile.n;

    const Loader<kChunks> load_a(static_cast<const __nv_bfloat16*>(shape.a) + batch * shape.matrix_a, shape.row_a,
                                 first_row, shape.m);
    const Loader<kChunks> load_b(static_cast<const __nv_bfloat16*>(shape.b) + batch * shape.matrix_b, shape.row_b,
                                 first_column, shape.n);
    const int count = (shape.k + kTile.k - 1) / kTile.k;
    const auto load_slice = [&](int slice, int stage) {
        if (slice < count) {
            const uint32_t target = slices + stage * 2 * kOperandBytes;
            load_a(target, slice * kTile.k, shape.k);
            load_b(target + kOperandBytes, slice * kTile.k, shape.k);
        }
        commit_copies();  // also when empty: the waits count groups
    };

    // Where this lane's rows are in a slice, for the first 16 columns; an XOR with 32 s reaches the s-th 16 columns.
    // A's four matrices are (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); B's have the middle two
    // swapped, so that a pair of registers is one operand of 8 rows.
    const uint32_t lane_a = chunk_offset<kChunks>(warp_row * kWarpTile + lane % 16, lane / 16);
    const uint32_t lane_b =
        kOperandBytes + chunk_offset<kChunks>(warp_column * kWarpTile + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    uint32_t a[2][kFragments][4], b[2][kFragments][4];
    const auto load_fragments = [&](int set, int stage, int step) {
        const uint32_t slice = slices + stage * 2 * kOperandBytes;
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            load_matrices(slice + (lane_a ^ 32 * step) + i * kFragmentBytes, a[set][i]);
            load_matrices(slice + (lane_b ^ 32 * step) + i * kFragmentBytes, b[set][i]);
        }
    };

    float sum[kFragments][2 * kFragments][4] = {};
#pragma unroll
    for (int i = 0; i < kTile.stages - 1; ++i) load_slice(i, i);
    wait_copies<kTile.stages - 2>();
    __syncthreads();
    load_fragments(0, 0, 0);

    int reading = 0, writing = kTile.stages - 1;
    for (int slice = 0; slice < count; ++slice) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if (step == kSteps - 1) {
                // The next slice has arrived, for all threads; and all have read this one, so its stage is free.
                wait_copies<kTile.stages - 2>();
                __syncthreads();
                reading = reading + 1 == kTile.stages ? 0 : reading + 1;
            }
            // After the last slice this reads what is never multiplied.
            load_fragments((step + 1) % 2, reading, (step + 1) % kSteps);
            if (step == 0) {
                load_slice(slice + kTile.stages - 1, writing);
                writing = writing + 1 == kTile.stages ? 0 : writing + 1;
            }
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
#pragma unroll
                for (int j = 0; j < 2 * kFragments; ++j) {
                    const uint32_t (&pair)[4] = b[step % 2][j / 2];
                    multiply(sum[i][j], a[step % 2][i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
                }
            }
        }
    }

    // Half of each warp's rows at a time through shared memory. Within a row the two 16-byte units of 8 columns trade
    // places in every other 32 columns, so that neither the writes of 8 bytes nor the reads of 16 meet in a bank.
    float* const staging = reinterpret_cast<float*>(shared);
    constexpr int kPitch = kTile.n + GemmTile::kPadding;
    constexpr int kHalf = kWarpTile / 2;
    constexpr int kRowsAtOnce = kThreads / 16;
    constexpr int kCalls = 2 * kHalf / kRowsAtOnce;  // of a thread, in a half
    using Operand = decltype(read_operand(epilogue, 0, int64_t{}, 0));
    const int column = threadIdx.x % 16 * 8;
    const auto staged_row = [&](int call) { return call * kRowsAtOnce + static_cast<int>(threadIdx.x) / 16; };
    const auto row_of = [&](int half, int call) {
        return first_row + staged_row(call) / kHalf * kWarpTile + half * kHalf + staged_row(call) % kHalf;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Operand operands[kCalls];
#pragma unroll
        for (int i = 0; i < kCalls; ++i) {
            operands[i] = read_operand(epilogue, batch, row_of(half, i), first_column + column);
        }
        __syncthreads();  // the pipeline's slices, or the first half, have been read
#pragma unroll
        for (int i = 0; i < kFragments / 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2 * kFragments; ++j) {
                const float (&x)[4] = sum[half * kFragments / 2 + i][j];
                float* const target = staging + (warp_row * kHalf + i * 16 + lane / 4) * kPitch +
                                      warp_column * kWarpTile + j * 8 + (lane % 4 * 2 ^ j / 4 * 4);
                *reinterpret_cast<float2*>(target) = {x[0], x[1]};
                *reinterpret_cast<float2*>(target + 8 * kPitch) = {x[2], x[3]};
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kCalls; ++i) {
            const float* const source = staging + staged_row(i) * kPitch + column;
            const int swap = column / 32 % 2 * 4;
            const float4 low = *reinterpret_cast<const float4*>(source + swap);
            const float4 high = *reinterpret_cast<const float4*>(source + (swap ^ 4));
            float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            if constexpr (std::is_same_v<Operand, Nothing>) {
                epilogue(batch, row_of(half, i), first_column + column, x);
            } else {
                epilogue(batch, row_of(half, i), first_column + column, x, operands[i]);
            }
        }
    }
}

template <typename Tile, typename Epilogue, typename Schedule>
void launch(const GemmShape& shape, const Epilogue& epilogue, const Schedule& schedule, cudaStream_t stream,
            const char* what) {
    constexpr GemmTile kTile = Tile::value;
    const auto kernel = gemm_kernel<Tile, Epilogue, Schedule>;
    const int64_t tiles = schedule.count((shape.m + kTile.m - 1) / kTile.m, (shape.n + kTile.n - 1) / kTile.n);
    const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(shape.batch));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile.bytes()), what);
    kernel<<<grid, kThreads, kTile.bytes(), stream>>>(shape, epilogue, schedule);
    check_launch(what);
}

}  // namespace gemm

// Compute the tiles that `schedule` names and hand them to `epilogue`; `what` names the operator in an error. An empty
// C launches nothing.
template <typename Epilogue, typename Schedule = AllTiles>
void launch_gemm(const GemmShape& shape, const Epilogue& epilogue, const Target& target, const char* what,
                 const Schedule& schedule = {}) {
    if (shape.m == 0 || shape.n == 0 || shape.batch == 0) return;
    if (shape.k % 8 != 0 || shape.row_a % 8 != 0 || shape.row_b % 8 != 0 || shape.batch > 65535) {
        throw std::runtime_error(std::string(what) +
                                 ": the product's columns and strides must be multiples of 8, and " +
                                 "its batch at most 65535");
    }
    if (gemm_tile(target.shared_memory) == kLargeGemmTile) {
        gemm::launch<LargeGemmTile>(shape, epilogue, schedule, target.stream, what);
    } else {
        gemm::launch<SmallGemmTile>(shape, epilogue, schedule, target.stream, what);
    }
}

}  // namespace pgolf::generic
