// The products of Muon's iteration with TMA and wgmma. They are small, so what costs is not the arithmetic but what
// surrounds it: two blocks share a multiprocessor, one multiplying while the other loads or stores, and each product's
// blocks start while those of the product before finish (programmatic dependent launch).
//
// A block computes a tile of 128 x 128: one warp loads, two warpgroups multiply 64 rows each. The tile of `source` is
// one more stage of the pipeline; the result replaces it there and leaves by TMA, as does its transpose.
//
// Such tiles want more bytes from L2 than it gives. So blocks that are neighbours form a cluster of 1 x 2 or 2 x 2
// tiles: those in a row of tiles load half of their common rows of `left` each, for both, those in a column the same of
// `right`; and a block on the diagonal of a symmetric product loads its rows once.
#include "common/check.h"
#include "common/reduce.cuh"
#include "ops/polar_express.h"
#include "sm90/ptx.cuh"
#include "sm90/tensor_map.h"

namespace pgolf::sm90 {
namespace {

constexpr int kTile = 128;
constexpr int kBox = 64;  // rows and columns of all that TMA moves
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kOperandBytes = 2 * kBoxBytes;  // 128 rows of 64
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 3;      // where two blocks share a multiprocessor
constexpr int kLoneStages = 6;  // where each has its own
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * kWarpSize;
constexpr int kThreads = kConsumers + kWarpSize;
constexpr int kBlocks = 2;  // a multiprocessor
constexpr int kAlignment = 1024;
constexpr int shared_bytes(int stages) { return stages * kStageBytes + kAlignment + 2 * stages * 8; }
static_assert(kBlocks * (shared_bytes(kStages) + 1024) <= 228 * 1024);
static_assert(shared_bytes(kLoneStages) <= 227 * 1024);

struct Product {
    CUtensorMap left, right, source, out, transposed;  // of boxes of 64 x 64
    int depth, columns;                                // columns: tiles in a row of tiles
    bool has_source, has_out, has_transposed, symmetric;
    int stages;
    int cluster;  // of 1 tile, 2 (in a row) or 4 (two by two)
    float source_scale, product_scale;
};

// Blocks of the next product may start now; they wait for this one's end before they touch memory.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Until the product before has ended and its results are visible.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Load the box at (x, y, z) into the same place of the cluster's `blocks` (a bit each), each counting its bytes.
__device__ __forceinline__ void load_for(uint16_t blocks, void* target, const CUtensorMap* map, uint64_t* barrier,
                                         int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
        : "memory");
}

struct Tile {
    int row, column;  // of tiles
};

// The block's tile; of a symmetric product those on and above the diagonal, row by row. In a cluster of four, bit 0 of
// the rank is the column and bit 1 the row.
__device__ __forceinline__ Tile tile_of(const Product& p) {
    int i = static_cast<int>(blockIdx.x);
    if (p.cluster == 4) {
        const int rank = i % 4, columns = p.columns / 2;
        return {i / 4 / columns * 2 + rank / 2, i / 4 % columns * 2 + rank % 2};
    }
    if (!p.symmetric) return {i / p.columns, i % p.columns};
    int row = 0;
    for (; i >= p.columns - row; ++row) i -= p.columns - row;
    return {row, row + i};
}

struct Stage {
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++index == stages) {
            index = 0;
            parity ^= 1;
        }
    }
};

// On the diagonal of a symmetric product left and right are the same rows.
__device__ __forceinline__ bool on_diagonal(const Product& p, int row, int column) {
    return p.symmetric && row == column;
}

// The loading thread. A stage holds left's 128 rows, then right's; or source's left 64 columns, then its right ones.
__device__ __forceinline__ void load_tiles(const Product& p, char* stages, uint64_t* full, uint64_t* empty, int row,
                                           int column, int batch) {
    const bool diagonal = on_diagonal(p, row, column);
    const int rank = p.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int across = rank % 2, down = rank / 2;
    Stage stage;
    const auto acquire = [&](uint32_t bytes) {
        barrier_wait(&empty[stage.index], stage.parity ^ 1);
        barrier_arrive_expect(&full[stage.index], bytes);
        return stages + stage.index * kStageBytes;
    };
    for (int k = 0; k < p.depth; k += kBox) {
        char* const target = acquire(diagonal ? kOperandBytes : kStageBytes);
        uint64_t* const barrier = &full[stage.index];
        if (p.cluster > 1) {
            load_for(static_cast<uint16_t>(0b11 << (2 * down)), target + across * kBoxBytes, &p.left, barrier, k,
                     row + across * kBox, batch);
        } else {
            tma_load(target, &p.left, barrier, k, row, batch);
            tma_load(target + kBoxBytes, &p.left, barrier, k, row + kBox, batch);
        }
        if (p.cluster == 4) {
            load_for(static_cast<uint16_t>(0b101 << across), target + kOperandBytes + down * kBoxBytes, &p.right,
                     barrier, k, column + down * kBox, batch);
        } else if (!diagonal) {
            tma_load(target + kOperandBytes, &p.right, barrier, k, column, batch);
            tma_load(target + kOperandBytes + kBoxBytes, &p.right, barrier, k, column + kBox, batch);
        }
        stage.advance(p.stages);
    }
    if (p.has_source) {
        char* const target = acquire(kStageBytes);
        uint64_t* const barrier = &full[stage.index];
        tma_load(target, &p.source, barrier, column, row, batch);
        tma_load(target + kBoxBytes, &p.source, barrier, column, row + kBox, batch);
        tma_load(target + kOperandBytes, &p.source, barrier, column + kBox, row, batch);
        tma_load(target + kOperandBytes + kBoxBytes, &p.source, barrier, column + kBox, row + kBox, batch);
    }
}

// source_scale * source + product_scale * product of two values each, every operation rounded.
__device__ __forceinline__ uint32_t combine(const Product& p, uint32_t source, uint32_t product) {
    const uint32_t s = pack(p.source_scale * low_half(source), p.source_scale * high_half(source));
    const uint32_t t = pack(p.product_scale * low_half(product), p.product_scale * high_half(product));
    return pack(low_half(s) + low_half(t), high_half(s) + high_half(t));
}

__device__ __forceinline__ void multiply_tiles(const Product& p, char* stages, uint64_t* full, uint64_t* empty, int row,
                                               int column, int batch) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize % 4;
    const int group = threadIdx.x / kWarpSize / 4;

    const bool diagonal = on_diagonal(p, row, column);
    const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0;
    const int slices = (p.depth + kBox - 1) / kBox;
    const int loads = slices + (p.has_source ? 1 : 0);

    float sum[64] = {};
    Stage stage;
    int previous = 0;
    for (int k = 0; k < slices; ++k) {
        barrier_wait(&full[stage.index], stage.parity);
        const char* const slice = stages + stage.index * kStageBytes;
        const uint64_t left = operand(slice + group * kBoxBytes);
        const uint64_t right = operand(slice + (diagonal ? 0 : kOperandBytes));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBox / 16; ++i) wgmma_m64n128k16(sum, left + 2 * i, right + 2 * i, true);
        wgmma_commit();
        if (k > 0) {
            wgmma_wait<1>();
            // Slice k - 1 is read: tell the blocks that load into this one. Only where its stage is filled again: the
            // others, which wait for this before they end, are then still there.
            if (lane == 0 && k - 1 + p.stages < loads) {
                if (p.cluster > 1) {
                    barrier_arrive_at(&empty[previous], rank);
                    barrier_arrive_at(&empty[previous], rank ^ 1);
                    if (p.cluster == 4) barrier_arrive_at(&empty[previous], rank ^ 2);
                } else {
                    barrier_arrive(&empty[previous]);
                }
            }
        }
        previous = stage.index;
        stage.advance(p.stages);
    }
    wgmma_wait<0>();
    named_barrier(1, kConsumers);  // both warpgroups have read all stages: the results may go there
    if (p.has_source) barrier_wait(&full[stage.index], stage.parity);

    // This group's 64 rows of the stage after the last; and of the next one a half, for its 64 columns of the
    // transpose.
    char* const straight = stages + stage.index * kStageBytes + group * kBoxBytes;
    stage.advance(p.stages);
    char* const mirror = stages + stage.index * kStageBytes + group * kOperandBytes;
    const bool mirrored = p.has_transposed && !diagonal;  // there a tile is its own mirror
    // Matrix lane / 8 of four: the second and the fourth are 8 rows below, the third and the fourth 8 columns right.
    const int below = lane / 8 % 2, right = lane / 16;
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = pack(sum[8 * i + 2 * j], sum[8 * i + 2 * j + 1]);
        const uint32_t place = shared_address(straight) + i / 4 * kOperandBytes +
                               swizzled(16 * warp + 8 * below + lane % 8, (2 * i + right) % 8);
        if (p.has_source) {
            uint32_t source[4];
            ldmatrix(place, source);
#pragma unroll
            for (int j = 0; j < 4; ++j) x[j] = combine(p, source[j], x[j]);
        }
        stmatrix(place, x[0], x[1], x[2], x[3]);
        if (mirrored) {
            stmatrix_transposed(shared_address(mirror) + swizzled(16 * i + 8 * right + lane % 8, 2 * warp + below),
                                x[0], x[1], x[2], x[3]);
        }
    }
    fence_async_proxy();
    // Two calls, not one with a variable: a block whose barriers are unknown reserves all sixteen.
    if (group == 0) {
        named_barrier(2, kConsumers / 2);
    } else {
        named_barrier(3, kConsumers / 2);
    }
    if (warp == 0 && lane == 0) {
        const int first = row + group * kBox;
        if (p.has_out) {
            tma_store(&p.out, straight, column, first, batch);
            tma_store(&p.out, straight + kOperandBytes, column + kBox, first, batch);
        }
        if (mirrored) {
            tma_store(&p.transposed, mirror, first, column, batch);
            tma_store(&p.transposed, mirror + kBoxBytes, first, column + kBox, batch);
        }
        tma_store_commit();
        tma_store_wait<0>();
    }
}

__global__ void __launch_bounds__(kThreads, kBlocks) product_kernel(const __grid_constant__ Product p) {
    extern __shared__ char shared[];
    char* const stages = shared + (kAlignment - shared_address(shared) % kAlignment) % kAlignment;
    uint64_t* const full = reinterpret_cast<uint64_t*>(stages + p.stages * kStageBytes);
    uint64_t* const empty = full + p.stages;
    if (threadIdx.x == 0) {
        const int readers = p.cluster == 4 ? 3 : p.cluster;  // blocks that read what this one loads, itself among them
        for (int i = 0; i < p.stages; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], readers * kConsumerWarps);
        }
        fence_barrier_init();
    }
    if (threadIdx.x == kConsumers) {
        prefetch(&p.left);
        prefetch(&p.right);
        prefetch(&p.source);
        prefetch(&p.out);
        prefetch(&p.transposed);
    }
    if (p.cluster > 1) {
        cluster_sync();  // the other block's barriers are there too
    } else {
        __syncthreads();
    }
    launch_dependents();
    wait_for_predecessor();

    const Tile tile = tile_of(p);
    const int row = tile.row * kTile, column = tile.column * kTile, batch = static_cast<int>(blockIdx.y);
    if (threadIdx.x < kConsumers) {
        multiply_tiles(p, stages, full, empty, row, column, batch);
    } else if (threadIdx.x == kConsumers) {
        load_tiles(p, stages, full, empty, row, column, batch);
    }
}

void launch(const Product& product, int tiles, int batch, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(product.cluster);
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(batch));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes(product.stages));
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = product.cluster > 1 ? 2 : 1;
    check(cudaLaunchKernelEx(&config, product_kernel, product), "polar_express (product)");
}

}  // namespace

void polar_express(const PolarExpress& params, const Target& target) {
    if (params.batch == 0 || params.rows == 0 || params.cols == 0) return;
    const PolarExpressBuffers buffers = polar_express_buffers(params);
    generic::polar_express_prepare(params, buffers, target.stream);

    const auto map_of = [&](const void* data, int rows, int cols) {
        return tensor_map(data, rows, cols, kBox, params.batch);
    };
    const CUtensorMap x = map_of(buffers.x, buffers.side, buffers.length);
    const CUtensorMap transposed[2] = {map_of(buffers.transposed[0], buffers.length, buffers.side),
                                       map_of(buffers.transposed[1], buffers.length, buffers.side)};
    const CUtensorMap gram = map_of(buffers.gram, buffers.side, buffers.side);
    const CUtensorMap polynomial = map_of(buffers.polynomial, buffers.side, buffers.side);
    const auto find = [&](const void* data) {
        if (data == buffers.transposed[0]) return transposed[0];
        if (data == buffers.transposed[1]) return transposed[1];
        if (data == buffers.gram) return gram;
        if (data == buffers.polynomial) return polynomial;
        return x;  // also for what is absent and not read
    };

    check(cudaFuncSetAttribute(product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(kLoneStages)),
          "polar_express");
    int device, processors;
    check(cudaGetDevice(&device), "polar_express: device");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "polar_express: multiprocessors");
    polar_express_steps(params, buffers, [&](const PolarExpressProduct& p) {
        const int rows = (p.rows + kTile - 1) / kTile, columns = (p.cols + kTile - 1) / kTile;
        const int tiles = p.symmetric ? rows * (rows + 1) / 2 : rows * columns;
        const bool lone = int64_t{tiles} * params.batch <= processors;
        // Two by two where the matrix is wide; of a square of 4 x 4 tiles the looser pairs were 3 % faster.
        const int cluster = p.symmetric || columns % 2 != 0 ? 1 : rows % 2 == 0 && columns > rows ? 4 : 2;
        const Product product{.left = find(p.left),
                              .right = find(p.right),
                              .source = find(p.source),
                              .out = find(p.out),
                              .transposed = find(p.transposed),
                              .depth = p.depth,
                              .columns = columns,
                              .has_source = p.source != nullptr,
                              .has_out = p.out != nullptr,
                              .has_transposed = p.transposed != nullptr,
                              .symmetric = p.symmetric,
                              .stages = lone ? kLoneStages : kStages,
                              .cluster = cluster,
                              .source_scale = p.source_scale,
                              .product_scale = p.product_scale};
        launch(product, tiles, params.batch, target.stream);
    });
}

}  // namespace pgolf::sm90
