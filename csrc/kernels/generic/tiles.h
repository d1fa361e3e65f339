// Tile sizes of the generic kernels by the shared memory that a block may use: pure functions, readable without a GPU.
#pragma once

namespace pgolf::generic {

// A block's tile of a matrix product: m x n results, `stages` slices of k columns of both operands in flight.
struct GemmTile {
    int m, n, k, stages;

    // The epilogue stages half of the rows as float32, padded so that consecutive rows start in different banks.
    static constexpr int kPadding = 8;
    constexpr int staging_bytes() const { return m / 2 * (n + kPadding) * 4; }
    constexpr int pipeline_bytes() const { return stages * (m + n) * k * 2; }
    // Bytes of shared memory of a block: the epilogue reuses the pipeline's.
    constexpr int bytes() const { return staging_bytes() > pipeline_bytes() ? staging_bytes() : pipeline_bytes(); }
    constexpr bool operator==(const GemmTile&) const = default;
};

// Two blocks share a multiprocessor, so that one multiplies while the other runs its epilogue. A multiprocessor has
// 1 KiB more than a block may use, and spends 1 KiB on each block.
constexpr GemmTile kLargeGemmTile{128, 128, 32, 4};  // A100, H100, B200: 164 KiB and more
constexpr GemmTile kSmallGemmTile{128, 128, 32, 3};  // sm_86, sm_89, sm_120: 100 KiB
constexpr int kLargeSharedMemory = 160 * 1024;
static_assert(2 * (kLargeGemmTile.bytes() + 1024) <= kLargeSharedMemory);
static_assert(2 * (kSmallGemmTile.bytes() + 1024) <= 100 * 1024);

// As types: a kernel's template argument cannot be a GemmTile (nvcc 13.0 generates host code that does not compile).
struct LargeGemmTile {
    static constexpr GemmTile value = kLargeGemmTile;
};
struct SmallGemmTile {
    static constexpr GemmTile value = kSmallGemmTile;
};

// The tile for `shared_memory` bytes a block.
constexpr GemmTile gemm_tile(int shared_memory) {
    return shared_memory >= kLargeSharedMemory ? kLargeGemmTile : kSmallGemmTile;
}

}  // namespace pgolf::generic
