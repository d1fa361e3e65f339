// Greedy nearest-neighbour order of rows by L1 distance, in two kernels: the distances of all pairs, tile by tile as a
// matrix product, then the chain of dependent steps in one block, which needs no launch and no grid barrier a step. A
// step costs one trip to memory for a row of distances and one reduction. Integers throughout: exact, so deterministic.
#include "common/check.h"
#include "common/reduce.cuh"
#include "ops/row_order.h"

namespace pgolf::generic {
namespace {

// --- Distances -------------------------------------------------------------------------------------------------------

constexpr int kTile = 128;      // rows and columns of distances of one block
constexpr int kTileWords = 16;  // words of four values of each row in shared memory at a time
constexpr int kTileThreads = 256;
constexpr int kPitch = kTile + 4;  // keeps 16-byte alignment, and makes the transposing stores conflict in pairs only

// Between rows of the distance matrix: whole 16-byte vectors.
__host__ __device__ int pitch_of(int rows) { return (rows + 3) / 4 * 4; }

// sum + |a.0 - b.0| + ... + |a.3 - b.3| of unsigned bytes: one instruction up to sm_90, five on sm_120.
__device__ __forceinline__ uint32_t add_differences(uint32_t a, uint32_t b, uint32_t sum) {
    asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(sum));
    return sum;
}

// Values 4 * word to 4 * word + 3 of a row, shifted to 0..255; zeros beyond the matrix, the same in all rows.
// kWords: rows start at multiples of four bytes and hold whole words.
template <bool kWords>
__device__ __forceinline__ uint32_t load_word(const RowOrder& p, int row, int word) {
    const int column = 4 * word;
    if (row >= p.rows || column >= p.cols) return 0;
    const int8_t* const source = p.q + static_cast<int64_t>(row) * p.cols + column;
    uint32_t value = 0;
    if constexpr (kWords) {
        value = *reinterpret_cast<const uint32_t*>(source);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (column + i < p.cols) value |= static_cast<uint32_t>(static_cast<uint8_t>(source[i])) << 8 * i;
        }
    }
    return value ^ 0x80808080u;
}

// Where the i-th of a thread's eight rows or columns lies in a tile: two runs of four, so that the 16 threads of a run
// read and write consecutive vectors.
__device__ __forceinline__ int place(int thread, int i) { return i / 4 * (kTile / 2) + thread * 4 + i % 4; }

template <bool kWords>
__global__ void __launch_bounds__(kTileThreads, 2) row_distances_kernel(const RowOrder p) {
    alignas(16) __shared__ uint32_t left[kTileWords][kPitch];
    alignas(16) __shared__ uint32_t right[kTileWords][kPitch];
    const int thread = threadIdx.x;
    const int x = thread % 16;
    const int y = thread / 16;
    const int first_row = blockIdx.y * kTile;
    const int first_column = blockIdx.x * kTile;
    const int words = (p.cols + 3) / 4;

    uint32_t sum[8][8] = {};
    for (int first = 0; first < words; first += kTileWords) {
        __syncthreads();  // the tiles of the round before are used up
#pragma unroll
        for (int i = 0; i < kTile * kTileWords / kTileThreads; ++i) {
            const int word = thread % kTileWords;
            const int row = thread / kTileWords + i * (kTileThreads / kTileWords);
            left[word][row] = load_word<kWords>(p, first_row + row, first + word);
            right[word][row] = load_word<kWords>(p, first_column + row, first + word);
        }
        __syncthreads();
#pragma unroll 4
        for (int word = 0; word < kTileWords; ++word) {
            alignas(16) uint32_t a[8], b[8];
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                *reinterpret_cast<uint4*>(a + i) = *reinterpret_cast<const uint4*>(&left[word][place(y, i)]);
                *reinterpret_cast<uint4*>(b + i) = *reinterpret_cast<const uint4*>(&right[word][place(x, i)]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] = add_differences(a[i], b[j], sum[i][j]);
            }
        }
    }

    const int pitch = pitch_of(p.rows);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = first_row + place(y, i);
        if (row >= p.rows) continue;
        uint32_t* const target = p.distances + static_cast<int64_t>(row) * pitch;
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            const int column = first_column + place(x, j);
            if (column >= pitch) continue;
            *reinterpret_cast<uint4*>(target + column) =
                make_uint4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
        }
    }
}

// --- Chain -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 1024;
constexpr int kVectors = kRowOrderMaxRows / (4 * kThreads);  // of a row of distances, of one thread
constexpr int kBatch = 2;                                    // vectors in flight: all of them up to 8,192 rows
constexpr int kPlaceBits = 3;                                // to number the rows of a batch
constexpr uint32_t kNone = 0xffffffffu;                      // no row: above every key and every row number
static_assert(4 * kVectors == 64, "a thread keeps one bit a row in a 64-bit word");
static_assert(kVectors % kBatch == 0 && 4 * kBatch == 1 << kPlaceBits);
static_assert(255ll * kRowOrderMaxCols < kNone >> kPlaceBits, "a key holds every distance");
static_assert(kThreads == kWarpSize * kWarpSize, "each warp reduces the results of all, one a lane");

struct Candidate {
    uint32_t distance, row;
};

// The candidate of the smallest distance in the warp, of several the one with the lowest row, in every lane.
__device__ __forceinline__ Candidate warp_nearest(Candidate mine) {
    const uint32_t distance = __reduce_min_sync(kAllLanes, mine.distance);
    return {distance, __reduce_min_sync(kAllLanes, mine.distance == distance ? mine.row : kNone)};
}

// Thread t looks after vectors t, t + 1024, ... of four rows; bit 4 i + e of its mask says that row e of its vector i
// exists and is not in the order yet. Beyond the last vector it reads the last: loads without a condition all start at
// once, and the step waits for memory once.
__global__ void __launch_bounds__(kThreads) row_chain_kernel(const RowOrder p) {
    __shared__ Candidate nearest_of[2][kWarpSize];  // of each warp; two, so that one barrier a step is enough
    const int thread = threadIdx.x;
    const int lane = thread % kWarpSize;
    const int vectors = (p.rows + 4 * kThreads - 1) / (4 * kThreads);
    const int64_t pitch = pitch_of(p.rows);
    const int last = pitch_of(p.rows) / 4 - 1;

    uint64_t left = 0;
    for (int i = 0; i < 4 * vectors; ++i) {
        const int row = (i / 4 * kThreads + thread) * 4 + i % 4;
        if (row < p.rows) left |= uint64_t{1} << i;
    }

    uint32_t current = 0;
    for (int step = 0;; ++step) {
        if (thread == 0) p.order[step] = current;
        if (step + 1 == p.rows) return;
        const int vector = static_cast<int>(current / 4);
        if (vector % kThreads == thread) left &= ~(uint64_t{1} << (vector / kThreads * 4 + current % 4));

        const uint4* const distances = reinterpret_cast<const uint4*>(p.distances + current * pitch);
        Candidate nearest{kNone >> kPlaceBits, kNone};
        for (int first = 0; first < vectors; first += kBatch) {
            const uint32_t rows = static_cast<uint32_t>(left >> (4 * first));
            uint32_t key[4 * kBatch];  // a distance, and below it the place in the batch: a tie goes to the lower row
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const uint4 loaded = __ldcg(distances + min((first + b) * kThreads + thread, last));
                key[4 * b] = loaded.x, key[4 * b + 1] = loaded.y, key[4 * b + 2] = loaded.z, key[4 * b + 3] = loaded.w;
            }
#pragma unroll
            for (int i = 0; i < 4 * kBatch; ++i) key[i] = rows & (1u << i) ? (key[i] << kPlaceBits) + i : kNone;
#pragma unroll
            for (int half = 2 * kBatch; half > 0; half /= 2) {
#pragma unroll
                for (int i = 0; i < half; ++i) key[i] = min(key[i], key[i + half]);
            }
            const int place = static_cast<int>(key[0] % (4 * kBatch));
            if (key[0] >> kPlaceBits < nearest.distance) {
                nearest.distance = key[0] >> kPlaceBits;
                nearest.row = static_cast<uint32_t>(((first + place / 4) * kThreads + thread) * 4 + place % 4);
            }
        }
        nearest = warp_nearest(nearest);
        if (lane == 0) nearest_of[step % 2][thread / kWarpSize] = nearest;
        __syncthreads();
        current = warp_nearest(nearest_of[step % 2][lane]).row;
    }
}

}  // namespace

int64_t row_order_scratch(int rows) { return static_cast<int64_t>(rows) * pitch_of(rows); }

void row_order(const RowOrder& params, const Target& target) {
    if (params.rows == 0) return;
    const unsigned tiles = static_cast<unsigned>((params.rows + kTile - 1) / kTile);
    const bool words = reinterpret_cast<uintptr_t>(params.q) % 4 == 0 && params.cols % 4 == 0;
    const auto distances = words ? row_distances_kernel<true> : row_distances_kernel<false>;
    distances<<<dim3(tiles, tiles), kTileThreads, 0, target.stream>>>(params);
    check_launch("row_order (distances)");
    row_chain_kernel<<<1, kThreads, 0, target.stream>>>(params);
    check_launch("row_order (chain)");
}

}  // namespace pgolf::generic
