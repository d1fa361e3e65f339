// C = A B^T with a fused epilogue, for Hopper: A [m, k] is tall (tokens), B [n, k] a weight; both bfloat16 with k
// contiguous.
//
// A persistent kernel of clusters of two blocks. A block keeps 128 rows of B in shared memory for as long as it can
// (all of k up to 512: "stationary") and streams tiles of 128 rows of A past them; the two blocks of a cluster hold
// neighbouring rows of B and share the stream, each loading half of every box for both (multicast). One warp issues the
// copies; two warpgroups compute 128 x 128 tiles in turn ("ping-pong"), so that one's epilogue hides behind the other's
// products.
//
// All clusters walk A at the same pace, so that device memory is read about once and the rest comes from L2.
//
// A tile is finished in two boxes of 64 columns. An epilogue is a struct, one object a tile and thread, with
//   Params                        passed by value to the kernel
//   static constexpr bool kLoads  a bfloat16 tile is loaded, box by box, before the epilogue (from Params::in_map)
//   static constexpr bool kStores a bfloat16 tile is stored, box by box, after it (to Params::out_map)
//   void begin(params, row, col, thread)   before the products: prefetches into registers
//   void box<b>(params, sums, box, row, col, thread)   for b = 0, 1: columns 64 b to 64 b + 63 of the tile at (row,
//   col).
//                                 sums[h][32 b + ...] holds rows 64 h to 64 h + 63 as wgmma lays them out (ptx.cuh);
//                                 `box` is [128 rows][64 columns] with the 128-byte swizzle; thread is 0 to 127
//   void end(params, row, col, thread)     after both
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>

#include "common/check.h"
#include "sm90/ptx.cuh"
#include "sm90/tensor_map.h"

namespace pgolf::sm90 {

constexpr int kTile = 128;                       // rows and columns of a tile
constexpr int kDepth = 64;                       // of k in a pipeline stage: 128 bytes, the width of the swizzle
constexpr int kBoxBytes = kTile * kDepth * 2;    // one stage of one operand
constexpr int kStationaryDepth = 512;            // the most of k that B can stay for
constexpr int kGroupThreads = 128;               // a warpgroup
constexpr int kGemmThreads = 3 * kGroupThreads;  // one that copies, two that compute
constexpr int kCluster = 2;

template <bool kStationary>
struct GemmStorage {
    static constexpr int kStages = kStationary ? 4 : 6;
    static constexpr int kBBoxes = kStationary ? kStationaryDepth / kDepth : kStages;

    alignas(1024) char b[kBBoxes][kBoxBytes];
    alignas(1024) char a[kStages][kBoxBytes];
    alignas(1024) char staging[2][kBoxBytes];
    uint64_t full[kStages];     // the copy engine filled a stage
    uint64_t empty[kStages];    // a warpgroup of either block read it
    uint64_t b_full[kBBoxes];   // stationary B arrived
    uint64_t b_empty;           // both warpgroups are done with it
    uint64_t issued;            // a tile's products are all issued: the other warpgroup's turn
    uint64_t turn;              // a tile's epilogue has all it waits for: the other warpgroup's turn
    uint64_t staging_full[2];   // a box was loaded
    uint64_t staged[2];         // a box was written by the epilogue
    uint64_t staging_empty[2];  // and is stored

    static constexpr int bytes() { return sizeof(GemmStorage) + 1024; }  // dynamic shared memory starts anywhere
};

// Which tiles a cluster computes: the columns in rounds of `columns` strips as wide as a cluster, each held by `lanes`
// clusters that take the rows in turn.
struct GemmSchedule {
    int row_tiles, strips;  // of 128 rows, of kCluster * 128 columns
    int rounds, columns, lanes;
    int depths;  // stages of k

    GemmSchedule(int64_t m, int64_t n, int64_t k, int clusters)
        : row_tiles(static_cast<int>((m + kTile - 1) / kTile)),
          strips(static_cast<int>((n + kCluster * kTile - 1) / (kCluster * kTile))),
          rounds((strips + clusters - 1) / clusters),
          columns((strips + rounds - 1) / rounds),
          lanes(std::min(clusters / columns, row_tiles)),
          depths(static_cast<int>((k + kDepth - 1) / kDepth)) {}

    int clusters() const { return columns * lanes; }
};

// One box of a tile's epilogue, between the waits for its staging and the handing over to the thread that stores it.
template <int kBox, class Epilogue, class Storage>
__device__ __forceinline__ void finish_box(Epilogue& epilogue, const typename Epilogue::Params& params,
                                           const float (&sums)[2][kTile / 2], Storage& shared, int item, int row,
                                           int col, int thread) {
    constexpr bool kStages = Epilogue::kLoads || Epilogue::kStores;
    if constexpr (Epilogue::kLoads) {
        barrier_wait(&shared.staging_full[kBox], item & 1);
    } else if constexpr (kStages) {
        if (item > 0) barrier_wait(&shared.staging_empty[kBox], (item - 1) & 1);
    }
    if (kBox == 1 && thread == 0) barrier_arrive(&shared.turn);
    epilogue.template box<kBox>(params, sums, shared.staging[kBox], row, col, thread);
    if constexpr (kStages) {
        fence_async_proxy();
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(&shared.staged[kBox]);
    }
}

template <class Epilogue, bool kStationary>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kGemmThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                const __grid_constant__ typename Epilogue::Params params, const GemmSchedule schedule) {
    using Storage = GemmStorage<kStationary>;
    constexpr int kStages = Storage::kStages;
    extern __shared__ char dynamic[];
    Storage& shared = *reinterpret_cast<Storage*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});

    const int group = threadIdx.x / kGroupThreads;
    const int thread = threadIdx.x % kGroupThreads;
    const int rank = static_cast<int>(cluster_rank());
    const int cluster = blockIdx.x / kCluster;
    const int first_strip = cluster % schedule.columns;
    const int first_row = cluster / schedule.columns;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], kCluster);
        }
        for (int i = 0; i < Storage::kBBoxes; ++i) barrier_init(&shared.b_full[i], 1);
        barrier_init(&shared.b_empty, 2);
        barrier_init(&shared.issued, 1);
        barrier_init(&shared.turn, 1);
        for (int box = 0; box < 2; ++box) {
            barrier_init(&shared.staging_full[box], 1);
            barrier_init(&shared.staged[box], kGroupThreads / 32);
            barrier_init(&shared.staging_empty[box], 1);
        }
        fence_barrier_init();
    }
    cluster_sync();

    if (group == 0) {
        registers_shrink<40>();
        if (thread == 0) {
            int stage = 0;
            uint32_t phase = 0;
            for (int round = 0; round < schedule.rounds; ++round) {
                const int strip = round * schedule.columns + first_strip;
                if (strip >= schedule.strips) break;
                const int b_row = (strip * kCluster + rank) * kTile;
                if constexpr (kStationary) {
                    if (round > 0) barrier_wait(&shared.b_empty, (round - 1) & 1);
                    for (int d = 0; d < schedule.depths; ++d) {
                        barrier_arrive_expect(&shared.b_full[d], kBoxBytes);
                        tma_load(shared.b[d], &b_map, &shared.b_full[d], d * kDepth, b_row);
                    }
                }
                for (int tile = first_row; tile < schedule.row_tiles; tile += schedule.lanes) {
                    // The next tile into L2, shared out among the clusters that will read it: device memory under load
                    // answers later than the pipeline is deep.
                    const int next = tile + schedule.lanes;
                    if (next < schedule.row_tiles) {
                        for (int d = first_strip; d < schedule.depths; d += schedule.columns) {
                            tma_prefetch(&a_map, d * kDepth, next * kTile + rank * (kTile / kCluster));
                        }
                    }
                    for (int d = 0; d < schedule.depths; ++d) {
                        barrier_wait(&shared.empty[stage], phase ^ 1);
                        barrier_arrive_expect(&shared.full[stage], kStationary ? kBoxBytes : 2 * kBoxBytes);
                        // This block's half of the rows, for both blocks.
                        tma_load_multicast(shared.a[stage] + rank * (kBoxBytes / kCluster), &a_map, &shared.full[stage],
                                           d * kDepth, tile * kTile + rank * (kTile / kCluster), (1 << kCluster) - 1);
                        if constexpr (!kStationary) {
                            tma_load(shared.b[stage], &b_map, &shared.full[stage], d * kDepth, b_row);
                        }
                        if (++stage == kStages) {
                            stage = 0;
                            phase ^= 1;
                        }
                    }
                }
            }
            // Leave only after the other block's last arrivals: an arrival at a block that has ended is an error, and
            // the cluster's barrier does not wait for arrivals on their way.
            for (int s = 0; s < kStages; ++s) {
                barrier_wait(&shared.empty[stage], phase ^ 1);
                if (++stage == kStages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        } else if ((Epilogue::kLoads || Epilogue::kStores) && (thread == 32 || thread == 64)) {
            const int box = thread / 32 - 1;
            int item = 0;
            for (int round = 0; round < schedule.rounds; ++round) {
                const int strip = round * schedule.columns + first_strip;
                if (strip >= schedule.strips) break;
                const int column = (strip * kCluster + rank) * kTile + box * kDepth;
                for (int tile = first_row; tile < schedule.row_tiles; tile += schedule.lanes, ++item) {
                    if constexpr (Epilogue::kLoads) {
                        barrier_arrive_expect(&shared.staging_full[box], kBoxBytes);
                        tma_load(shared.staging[box], &params.in_map, &shared.staging_full[box], column, tile * kTile);
                    }
                    barrier_wait(&shared.staged[box], item & 1);
                    if constexpr (Epilogue::kStores) {
                        tma_store_streaming(&params.out_map, shared.staging[box], column, tile * kTile);
                        tma_store_commit();
                        tma_store_wait_read<0>();
                    }
                    barrier_arrive(&shared.staging_empty[box]);
                }
            }
            tma_store_wait<0>();
        }
    } else {
        registers_grow<232>();
        const int turn = group - 1;
        int item = 0;   // tiles of this block so far, of either warpgroup
        int steps = 0;  // pipeline stages so far
        for (int round = 0; round < schedule.rounds; ++round) {
            const int strip = round * schedule.columns + first_strip;
            if (strip >= schedule.strips) break;
            const int column = (strip * kCluster + rank) * kTile;
            for (int tile = first_row; tile < schedule.row_tiles; tile += schedule.lanes, ++item) {
                if (item % 2 != turn) {
                    steps += schedule.depths;
                    continue;
                }
                Epilogue epilogue;
                epilogue.begin(params, tile * kTile, column, thread);
                // In turn: a warpgroup ahead of the other would take an old phase of `full` for its own.
                if (item > 0) barrier_wait(&shared.issued, (item - 1) & 1);

                float sums[2][kTile / 2];
                for (int d = 0; d < schedule.depths; ++d, ++steps) {
                    const int stage = steps % kStages;
                    if constexpr (kStationary) barrier_wait(&shared.b_full[d], round & 1);
                    barrier_wait(&shared.full[stage], steps / kStages & 1);
                    const uint64_t a = operand(shared.a[stage]);
                    const uint64_t b = operand(shared.b[kStationary ? d : stage]);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            // 64 rows of A are 8192 bytes: 512 in the descriptor's units; 16 of k are 2.
                            wgmma_m64n128k16(sums[half], a + half * 512 + k * 2, b + k * 2, d > 0 || k > 0);
                        }
                    }
                    wgmma_commit();
                    if (d == schedule.depths - 1 && thread == 0) barrier_arrive(&shared.issued);
                    // The products of the stage before are done when only this stage's are pending.
                    wgmma_wait<1>();
                    if (d > 0 && thread < kCluster) {
                        barrier_arrive_at(&shared.empty[(steps - 1) % kStages], thread);
                    }
                }
                wgmma_wait<0>();
                if (thread < kCluster) barrier_arrive_at(&shared.empty[(steps - 1) % kStages], thread);

                if (item > 0) barrier_wait(&shared.turn, (item - 1) & 1);  // in turn, as above
                finish_box<0>(epilogue, params, sums, shared, item, tile * kTile, column, thread);
                finish_box<1>(epilogue, params, sums, shared, item, tile * kTile, column, thread);
                epilogue.end(params, tile * kTile, column, thread);
            }
            if constexpr (kStationary) {
                named_barrier(1 + turn, kGroupThreads);  // every warp's products have read B
                if (thread == 0) barrier_arrive(&shared.b_empty);
            }
        }
    }
}

// How many clusters of the kernel run at once on the current device; asked once a device.
template <class Epilogue, bool kStationary>
int resident_clusters() {
    constexpr int kMaxDevices = 64;
    static std::atomic<int> known[kMaxDevices];
    int device;
    check(cudaGetDevice(&device), "gemm: device");
    if (device >= kMaxDevices) throw std::runtime_error("gemm: more than 64 devices");
    if (const int clusters = known[device].load()) return clusters;

    auto* const kernel = gemm_kernel<Epilogue, kStationary>;
    constexpr int kBytes = GemmStorage<kStationary>::bytes();
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "gemm: shared memory");
    int processors, clusters;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "gemm: multiprocessors");
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(processors / kCluster * kCluster);
    config.blockDim = dim3(kGemmThreads);
    config.dynamicSmemBytes = kBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "gemm: clusters");
    if (clusters < 1) throw std::runtime_error("gemm: no cluster of two blocks fits on this device");
    known[device].store(clusters);
    return clusters;
}

template <class Epilogue, bool kStationary>
void launch_gemm(const void* a, const void* b, int64_t m, int64_t n, int64_t k, const typename Epilogue::Params& params,
                 cudaStream_t stream, const char* name) {
    const GemmSchedule schedule(m, n, k, resident_clusters<Epilogue, kStationary>());
    const CUtensorMap a_map = tensor_map(a, m, k, kTile / kCluster);
    const CUtensorMap b_map = tensor_map(b, n, k, kTile);
    gemm_kernel<Epilogue, kStationary>
        <<<schedule.clusters() * kCluster, kGemmThreads, GemmStorage<kStationary>::bytes(), stream>>>(a_map, b_map,
                                                                                                      params, schedule);
    check_launch(name);
}

// a [m, k] and b [n, k], m, n, k > 0, k a multiple of 8, both 16-byte aligned.
template <class Epilogue>
void gemm(const void* a, const void* b, int64_t m, int64_t n, int64_t k, const typename Epilogue::Params& params,
          cudaStream_t stream, const char* name) {
    if (k <= kStationaryDepth) {
        launch_gemm<Epilogue, true>(a, b, m, n, k, params, stream, name);
    } else {
        launch_gemm<Epilogue, false>(a, b, m, n, k, params, stream, name);
    }
}

}  // namespace pgolf::sm90
