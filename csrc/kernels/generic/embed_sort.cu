// A stable counting sort of positions by token id, in three small launches: ranks and counts within chunks of
// positions, running sums of the counts over chunks and ids, and the scatter. Integers throughout, and an integer sum
// does not depend on its order: the result is the same bits on every run.
#include "common/check.h"
#include "embed.cuh"
#include "ops/embed.h"

namespace pgolf::generic {
namespace {

constexpr int kChunk = 512;        // positions of a block, one a thread
constexpr int kGroup = kWarpSize;  // ids that a block of the second launch adds up
constexpr int kScanThreads = kWarpSize * kWarpSize;

int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Groups of the keys 0 to vocab, of which `vocab` stands for every unknown id.
constexpr int groups_of(int vocab) { return vocab / kGroup + 1; }
static_assert(groups_of(kEmbedMaxVocab) * sizeof(int) <= 47 * 1024,
              "a block of the scatter has their sums on the chip");

struct Scratch {
    int* counts;  // [chunks, groups * kGroup]: how often a chunk has a key, then how often the chunks before have it
    int* ranks;   // [rows]: how often the chunk has a position's key before it
    int* local;   // [groups * kGroup]: how often the keys before it in its group occur
    int* totals;  // [groups]: how often a group's keys occur
};

Scratch split(const EmbedSort& p) {
    const int64_t keys = int64_t{groups_of(p.vocab)} * kGroup;
    Scratch s{};
    s.counts = p.scratch;
    s.ranks = s.counts + chunks_of(p.rows) * keys;
    s.local = s.ranks + p.rows;
    s.totals = s.local + keys;
    return s;
}

__device__ __forceinline__ int key_of(int64_t id, int vocab) {
    return is_known(id, vocab) ? static_cast<int>(id) : vocab;
}

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int x, int lane) {
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int below = __shfl_up_sync(kAllLanes, x, offset);
        if (lane >= offset) x += below;
    }
    return x;
}

__global__ void __launch_bounds__(kChunk) embed_count_kernel(const EmbedSort p, const Scratch s, int keys) {
    alignas(16) __shared__ int seen[kChunk];
    const int lane = threadIdx.x % kWarpSize;
    const int64_t position = static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x;
    const bool exists = position < p.rows;
    const int key = exists ? key_of(p.ids[position], p.vocab) : -1;
    seen[threadIdx.x] = key;
    int* const counts = s.counts + static_cast<int64_t>(blockIdx.x) * keys;
    for (int i = threadIdx.x; i < keys; i += kChunk) counts[i] = 0;
    __syncthreads();

    int rank = 0;
    const int4* const before = reinterpret_cast<const int4*>(seen);
    const int vectors = (threadIdx.x - lane) / 4;  // those of the warps before this one
#pragma unroll 4
    for (int i = 0; i < vectors; ++i) {
        const int4 other = before[i];
        rank += other.x == key;
        rank += other.y == key;
        rank += other.z == key;
        rank += other.w == key;
    }
    const unsigned same = __match_any_sync(kAllLanes, key);
    if (!exists) return;
    s.ranks[position] = rank + __popc(same & ((1u << lane) - 1));
    if (lane == __ffs(same) - 1) atomicAdd(counts + key, __popc(same));
}

// Lane x of every warp has key x of the block's group, warp y the y-th share of the chunks.
__global__ void __launch_bounds__(kScanThreads) embed_scan_kernel(const Scratch s, int chunks, int keys) {
    __shared__ int sums[kWarpSize][kWarpSize + 1];
    __shared__ int total[kGroup];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int key = blockIdx.x * kGroup + lane;
    const int share = (chunks + kWarpSize - 1) / kWarpSize;
    const int first = min(warp * share, chunks);
    const int last = min(first + share, chunks);

    int sum = 0;
#pragma unroll 4
    for (int chunk = first; chunk < last; ++chunk) sum += s.counts[static_cast<int64_t>(chunk) * keys + key];
    sums[warp][lane] = sum;
    __syncthreads();
    sum = sums[lane][warp];  // the warp adds up its own key's shares
    const int inclusive = warp_scan(sum, lane);
    sums[lane][warp] = inclusive - sum;
    if (lane == kWarpSize - 1) total[warp] = inclusive;
    __syncthreads();

    int running = sums[warp][lane];
#pragma unroll 4
    for (int chunk = first; chunk < last; ++chunk) {
        int* const count = s.counts + static_cast<int64_t>(chunk) * keys + key;
        const int here = *count;
        *count = running;
        running += here;
    }
    if (warp == 0) {
        const int up_to_here = warp_scan(total[lane], lane);
        s.local[key] = up_to_here - total[lane];
        if (lane == kGroup - 1) s.totals[blockIdx.x] = up_to_here;
    }
}

__global__ void __launch_bounds__(kChunk) embed_scatter_kernel(const EmbedSort p, const Scratch s, int groups) {
    extern __shared__ int offsets[];  // [groups]: how often the keys of the groups before occur
    __shared__ int sums[kChunk / kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;

    // Every block adds up the groups anew: a few values a thread, instead of one more launch.
    const int share = (groups + kChunk - 1) / kChunk;
    const int first = min(static_cast<int>(threadIdx.x) * share, groups);
    const int last = min(first + share, groups);
    int sum = 0;
    for (int group = first; group < last; ++group) sum += s.totals[group];
    const int inclusive = warp_scan(sum, lane);
    if (lane == kWarpSize - 1) sums[warp] = inclusive;
    __syncthreads();
    int running = inclusive - sum;
    for (int w = 0; w < warp; ++w) running += sums[w];
    for (int group = first; group < last; ++group) {
        offsets[group] = running;
        running += s.totals[group];
    }
    __syncthreads();

    const int64_t position = static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x;
    for (int64_t key = position; key <= p.vocab; key += static_cast<int64_t>(gridDim.x) * kChunk) {
        p.starts[key] = offsets[key / kGroup] + s.local[key];
    }
    if (position >= p.rows) return;
    const int key = key_of(p.ids[position], p.vocab);
    const int64_t earlier_chunks = static_cast<int64_t>(blockIdx.x) * groups * kGroup;
    const int place = offsets[key / kGroup] + s.local[key] + s.counts[earlier_chunks + key] + s.ranks[position];
    p.order[place] = static_cast<int>(position);
}

}  // namespace

int64_t embed_sort_scratch(int64_t rows, int vocab) {
    const int64_t groups = groups_of(vocab);
    return chunks_of(rows) * groups * kGroup + rows + groups * kGroup + groups;
}

void embed_sort(const EmbedSort& params, cudaStream_t stream) {
    const Scratch scratch = split(params);
    const int chunks = static_cast<int>(chunks_of(params.rows));
    const int groups = groups_of(params.vocab);
    const int keys = groups * kGroup;
    embed_count_kernel<<<chunks, kChunk, 0, stream>>>(params, scratch, keys);
    check_launch("embed_backward (counts)");
    embed_scan_kernel<<<groups, kScanThreads, 0, stream>>>(scratch, chunks, keys);
    check_launch("embed_backward (running sums)");
    embed_scatter_kernel<<<chunks, kChunk, groups * sizeof(int), stream>>>(params, scratch, groups);
    check_launch("embed_backward (order)");
}

}  // namespace pgolf::generic
