// Trellis-coded GPTQ for any GPU from sm_80: the levels of csrc/trellis, bit for bit, of many matrices in one launch.
//
// A block solves a matrix. Its columns follow each other, and so do a column's rows in the search, which one warp runs
// with the states' costs in registers (trellis.cuh). Meanwhile other warps price the rows to come and repay the next
// column's share of all errors but the last. Those of the search's own scheduler stay out of its way. A word from the
// search covers kChunk rows, and three passes over these words, the middle one by a single thread, find the path.
//
// An entry loses the errors of the columns before it one by one in their order, as on the CPU: those of earlier blocks
// of columns when its own block begins (settle), then each of its block's (repay), the last with the column's
// statistics (measure).
#include <algorithm>
#include <numbers>
#include <stdexcept>

#include "common/check.h"
#include "generic/trellis.cuh"
#include "ops/trellis.h"

namespace pgolf::generic {
namespace {

using namespace trellises;

constexpr int kMatrices = 256;  // of a launch: sizes travel as the kernel's arguments
constexpr int kThreads = 512;   // and the sums that a column's statistics are gathered in
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSchedulers = 4;  // warps w, w + 4, ... share one
constexpr int kWorkers = kThreads / kSchedulers * (kSchedulers - 1);
constexpr int kBlock = 128;  // columns
constexpr int kBatch = 16;   // errors of a row that are loaded at once
constexpr int kGroups = 16;  // of a column's chunks, to trace paths through side by side

template <class T>
constexpr int kTile = kWorkers / T::kChunk * T::kChunk;  // rows priced at a time

struct Batch {
    float* work;
    const float* upper;
    const float* row_step;
    const float* row_variance;
    const float* column_factor;
    uint32_t* words;
    int8_t* levels;
    float worth;  // rate / (2 ln 2)
    int rows[kMatrices], cols[kMatrices];
};

// One matrix of a batch.
struct Matrix {
    float* work;
    const float* upper;
    const float* row_step;
    const float* row_variance;
    const float* column_factor;
    uint32_t* words;
    int8_t* levels;
    int rows, cols;

    __device__ float* column(int c) const { return work + static_cast<int64_t>(c) * rows; }
    __device__ const float* upper_row(int c) const { return upper + static_cast<int64_t>(c) * cols; }
    __device__ float step(int r, int c) const { return __fmul_rn(row_step[r], column_factor[c]); }
};

__device__ __forceinline__ Goal goal_of(const Matrix m, int r, int c, float share, float worth) {
    return trellises::goal_of(in_steps(m.column(c)[r], m.step(r, c)), m.row_variance[r], share, worth);
}

template <class T>
__host__ __device__ int chunks_of(int rows) {
    return (rows + T::kChunk - 1) / T::kChunk;
}

constexpr int kStageDepth = 16, kStageRows = 128;

struct Stage {
    float errors[kStageDepth][kStageRows];
    float factors[kStageDepth][kBlock];
};

// A block's shared memory; as many words as fit follow it.
template <class T>
struct alignas(16) Shared {
    Matrix matrix;  // not in registers, which the phases between barriers need for themselves
    union {
        float4 prices[2][kTile<T>][kViews];
        Stage stage;
    };
    double sums[kThreads];
    float factors[kBlock + kBatch];       // of the errors that the next column is being repaid
    int ends[kGroups];                    // the state after a group of chunks
    int end;                              // and after the column
    uint8_t starts[kGroups][T::kStates];  // the state before a group, by the one after it
};

__device__ __forceinline__ int block_count(const Matrix m) {
    int count = 0;
    for (int first = 0; first < m.rows; first += kThreads) {
        const int r = first + static_cast<int>(threadIdx.x);
        count += __syncthreads_count(r < m.rows && m.row_variance[r] > 0);
    }
    return count;
}

// Columns first to last - 1 lose the errors of all columns before `first`, a multiple of kBlock and so of kStageDepth.
// A thread has eight rows, two runs of four, of four columns.
__device__ __forceinline__ void settle(const Matrix m, int first, int last, Stage& stage) {
    static_assert(kStageRows == kBlock && kThreads == kStageRows / 8 * (kBlock / 4) && kBlock % kStageDepth == 0);
    const int thread = threadIdx.x, x = thread % (kStageRows / 8) * 4, y = thread / (kStageRows / 8) * 4;
    constexpr int kStride = kThreads / kBlock;
    const int place = thread % kBlock, line = thread / kBlock;  // of what the thread loads

    for (int top = 0; top < m.rows; top += kStageRows) {
        float sum[4][8] = {};
        const auto exchange = [&](auto visit) {
            const int height = m.rows - top - x, width = last - first - y;
            float* at = m.column(first + y) + top + x;
#pragma unroll
            for (int j = 0; j < 4; ++j, at += m.rows) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int below = i % 4 + i / 4 * (kStageRows / 2);
                    if (j < width && below < height) visit(at[below], sum[j][i]);
                }
            }
        };
        exchange([](const float& w, float& s) { s = w; });
        for (int from = 0; from < first; from += kStageDepth) {
            __syncthreads();  // the stage before is used up
#pragma unroll
            for (int i = 0; i < kStageDepth; i += kStride) {
                const int c = from + i + line;
                stage.errors[i + line][place] = top + place < m.rows ? m.column(c)[top + place] : 0.0f;
                stage.factors[i + line][place] = first + place < last ? m.upper_row(c)[first + place] : 0.0f;
            }
            __syncthreads();
#pragma unroll 4
            for (int k = 0; k < kStageDepth; ++k) {
                const float4 low = *reinterpret_cast<const float4*>(&stage.errors[k][x]);
                const float4 high = *reinterpret_cast<const float4*>(&stage.errors[k][x + kStageRows / 2]);
                const float4 by = *reinterpret_cast<const float4*>(&stage.factors[k][y]);
                const float e[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                const float f[4] = {by.x, by.y, by.z, by.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[j][i] = __fsub_rn(sum[j][i], __fmul_rn(f[j], e[i]));
                }
            }
        }
        exchange([](float& w, float s) { w = s; });
    }
}

// Row r of column `to` loses the errors of columns first to first + count - 1; `factors` are zero beyond count.
__device__ __forceinline__ void repay(const Matrix m, int first, int count, int to, int r, const float* factors) {
    float w = m.column(to)[r];
    const float* errors = m.column(first) + r;
    for (int k = 0; k < count; k += kBatch, errors += static_cast<int64_t>(kBatch) * m.rows) {
        float error[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) error[i] = k + i < count ? errors[static_cast<int64_t>(i) * m.rows] : 0.0f;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) w = __fsub_rn(w, __fmul_rn(factors[k + i], error[i]));
    }
    m.column(to)[r] = w;
}

// The mean of x^2 / row variance of column c, the same bits in every thread. If it `follows` a column of its block, it
// first loses that one's errors, which it has not been repaid yet.
__device__ __forceinline__ float measure(const Matrix m, int c, bool follows, int count, double (&sums)[kThreads]) {
    const float factor = follows ? m.upper_row(c - 1)[c] : 0.0f;
    double sum = 0;
    for (int r = threadIdx.x; r < m.rows; r += kThreads) {
        float w = m.column(c)[r];
        if (follows) m.column(c)[r] = w = __fsub_rn(w, __fmul_rn(factor, m.column(c - 1)[r]));
        const float variance = m.row_variance[r];
        const double x = in_steps(w, m.step(r, c));
        if (variance > 0) sum = __dadd_rn(sum, __ddiv_rn(__dmul_rn(x, x), variance));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    double halved[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) halved[i] = sums[i * kWarpSize + threadIdx.x % kWarpSize];
    static_assert(kWarps == 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) halved[i] = __dadd_rn(halved[i], halved[i + 8]);
#pragma unroll
    for (int i = 0; i < 4; ++i) halved[i] = __dadd_rn(halved[i], halved[i + 4]);
    halved[0] = __dadd_rn(__dadd_rn(halved[0], halved[2]), __dadd_rn(halved[1], halved[3]));
    double total = halved[0];
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        total = __dadd_rn(total, __shfl_xor_sync(kAllLanes, total, offset));
    }
    return count > 0 ? static_cast<float>(__ddiv_rn(total, count)) : 0.0f;
}

// From the words of all chunks and the state `s.end` after the last one to the path: words 0 and 1 of each chunk become
// the low bits of k and the parities of its rows, the last row's in bit 0.
template <class T>
__device__ __forceinline__ void trace(const Matrix m, Shared<T>& s) {
    const int thread = threadIdx.x;
    const int chunks = chunks_of<T>(m.rows);
    const int last_length = m.rows - (chunks - 1) * T::kChunk;
    const int size = (chunks + kGroups - 1) / kGroups;  // of a group
    const int groups = (chunks + size - 1) / size;
    const auto length = [&](int chunk) { return chunk + 1 < chunks ? T::kChunk : last_length; };
    const auto word = [&](int chunk, int i) -> uint32_t& {
        return m.words[static_cast<int64_t>(chunk) * T::kStates + i];
    };

    for (int i = thread; i < groups * T::kStates; i += kThreads) {
        const int group = i / T::kStates;
        int state = i % T::kStates;
        for (int chunk = min((group + 1) * size, chunks) - 1; chunk >= group * size; --chunk) {
            state = static_cast<int>(word(chunk, state) >> length(chunk));
        }
        s.starts[group][i % T::kStates] = static_cast<uint8_t>(state);
    }
    __syncthreads();
    if (thread == 0) {
        int state = s.end;
        for (int group = groups - 1; group >= 0; --group) {
            s.ends[group] = state;
            state = s.starts[group][state];
        }
    }
    __syncthreads();
    if (thread < groups) {
        int state = s.ends[thread];
        for (int chunk = min((thread + 1) * size, chunks) - 1; chunk >= thread * size; --chunk) {
            const uint32_t path = word(chunk, state);
            word(chunk, 0) = path;
            word(chunk, 1) = static_cast<uint32_t>(state);
            state = static_cast<int>(path >> length(chunk));
        }
    }
    __syncthreads();
    for (int chunk = thread; chunk < chunks; chunk += kThreads) {
        const uint32_t path = word(chunk, 0);
        int state = static_cast<int>(word(chunk, 1));
        uint32_t parities = 0;
        for (int i = 0; i < length(chunk); ++i) {
            const auto step = T::before(state, path >> i & 1);
            parities |= static_cast<uint32_t>(step.parity) << i;
            state = step.state;
        }
        word(chunk, 1) = parities;
    }
    __syncthreads();
}

// Column c's levels, and in place of its weights their errors.
template <class T>
__device__ __forceinline__ void finish(const Matrix m, int c, float share, float worth) {
    const float pivot = m.upper_row(c)[c];
    int8_t* const levels = m.levels + static_cast<int64_t>(c) * m.rows;
    for (int r = threadIdx.x; r < m.rows; r += kThreads) {
        const int chunk = r / T::kChunk;
        const int bit = min(T::kChunk, m.rows - chunk * T::kChunk) - 1 - r % T::kChunk;
        const uint32_t* const path = m.words + static_cast<int64_t>(chunk) * T::kStates;
        const int of_class = static_cast<int>(2 * (path[0] >> bit & 1) + (path[1] >> bit & 1));
        const float level = nearest(goal_of(m, r, c, share, worth), of_class).level;
        levels[r] = static_cast<int8_t>(static_cast<int>(level));
        float& w = m.column(c)[r];
        w = __fdiv_rn(__fsub_rn(w, __fmul_rn(level, m.step(r, c))), pivot);
    }
}

template <class T>
__device__ __forceinline__ Matrix matrix_of(const Batch& p, int index) {
    int64_t entries = 0, squares = 0, rows = 0, cols = 0, chunks = 0;
    for (int i = 0; i < index; ++i) {
        entries += static_cast<int64_t>(p.rows[i]) * p.cols[i];
        squares += static_cast<int64_t>(p.cols[i]) * p.cols[i];
        rows += p.rows[i];
        cols += p.cols[i];
        chunks += chunks_of<T>(p.rows[i]);
    }
    return {p.work + entries,      p.upper + squares,      p.row_step + rows,
            p.row_variance + rows, p.column_factor + cols, p.words + chunks * T::kStates,
            p.levels + entries,    p.rows[index],          p.cols[index]};
}

// shared_words: how many words there is room for behind `Shared`.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) trellis_kernel(const __grid_constant__ Batch p, int64_t shared_words) {
    extern __shared__ float4 shared_memory[];
    Shared<T>& s = *reinterpret_cast<Shared<T>*>(shared_memory);
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const bool works = warp % kSchedulers != 0;
    const int worker = (warp / kSchedulers * (kSchedulers - 1) + warp % kSchedulers - 1) * kWarpSize + lane;
    if (thread == 0) {
        s.matrix = matrix_of<T>(p, static_cast<int>(blockIdx.x));
        const int64_t needed = static_cast<int64_t>(chunks_of<T>(s.matrix.rows)) * T::kStates;
        if (needed <= shared_words) s.matrix.words = reinterpret_cast<uint32_t*>(&s + 1);
    }
    __syncthreads();
    const Matrix& m = s.matrix;
    if (m.rows == 0) return;
    const int count = block_count(m);

    for (int first = 0; first < m.cols; first += kBlock) {
        const int last = min(first + kBlock, m.cols);
        if (first > 0) {
            __syncthreads();  // errors are complete
            settle(m, first, last, s.stage);
            __syncthreads();
        }
        for (int c = first; c < last; ++c) {
            const int due = c + 1 < last ? c - first : 0;  // errors that column c + 1 can be repaid during the search
            if (thread < kBlock + kBatch) s.factors[thread] = thread < due ? m.upper_row(first + thread)[c + 1] : 0.0f;
            const float share = measure(m, c, c > first, count, s.sums);
            if (thread < min(kTile<T>, m.rows)) price(goal_of(m, thread, c, share, p.worth), s.prices[0][thread]);
            Search<T> search;
            __syncthreads();
            for (int top = 0, tile = 0; top < m.rows; top += kTile<T>, ++tile) {
                if (warp == 0) {
                    const int height = min(kTile<T>, m.rows - top);
                    search.advance(s.prices[tile % 2][0], height,
                                   m.words + static_cast<int64_t>(top / T::kChunk) * T::kStates);
                } else if (works && worker < kTile<T>) {
                    const int r = top + worker;
                    if (r + kTile<T> < m.rows) {
                        price(goal_of(m, r + kTile<T>, c, share, p.worth), s.prices[(tile + 1) % 2][worker]);
                    }
                    if (r < m.rows && due > 0) repay(m, first, due, c + 1, r, s.factors);
                }
                __syncthreads();
            }
            if (warp == 0) {
                const int end = search.end(m.rows);
                if (lane == 0) s.end = end;
            }
            trace(m, s);
            finish<T>(m, c, share, p.worth);
        }
    }
}

template <class T>
void launch(const Batch& batch, int matrices, const Target& target) {
    const int64_t room =
        (target.shared_memory - static_cast<int>(sizeof(Shared<T>))) / static_cast<int>(sizeof(uint32_t));
    int64_t words = 0;  // the most that a matrix needs and a block has room for
    for (int i = 0; i < matrices; ++i) {
        const int64_t needed = static_cast<int64_t>(chunks_of<T>(batch.rows[i])) * T::kStates;
        if (needed <= room) words = std::max(words, needed);
    }
    const int bytes = static_cast<int>(sizeof(Shared<T>) + words * sizeof(uint32_t));
    check(cudaFuncSetAttribute(trellis_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "trellis (shared memory)");
    trellis_kernel<T><<<static_cast<unsigned>(matrices), kThreads, bytes, target.stream>>>(batch, words);
    check_launch("trellis");
}

// Calls function(T{}) with the trellis of so many states.
template <class Function>
auto with_trellis(int states, Function function) {
    switch (states) {
        case 4:
            return function(trellises::Trellis<4, 05, 02>{});
        case 8:
            return function(trellises::Trellis<8, 013, 04>{});
        case 32:
            return function(trellises::Trellis<32, 045, 010>{});
        case 64:
            return function(trellises::Trellis<64, 0103, 024>{});
        case 256:
            return function(trellises::Trellis<256, 0515, 0362>{});
        default:
            throw std::runtime_error("trellis: states: not one of 4, 8, 32, 64 and 256");
    }
}

}  // namespace

int64_t trellis_scratch(int rows, int states) {
    return with_trellis(states, []<class T>(T) { return chunks_of<T>; })(rows) * int64_t{states};
}

void trellis(const pgolf::Trellis& params, const Target& target) {
    Batch batch{.work = params.work,
                .upper = params.upper,
                .row_step = params.row_step,
                .row_variance = params.row_variance,
                .column_factor = params.column_factor,
                .words = params.words,
                .levels = params.levels,
                .worth = static_cast<float>(params.rate / (2 * std::numbers::ln2))};
    for (int first = 0; first < params.matrices; first += kMatrices) {
        const int matrices = std::min(kMatrices, params.matrices - first);
        std::copy_n(params.rows + first, matrices, batch.rows);
        std::copy_n(params.cols + first, matrices, batch.cols);
        with_trellis(params.states, [&]<class T>(T) { launch<T>(batch, matrices, target); });
        for (int i = 0; i < matrices; ++i) {
            const int64_t rows = batch.rows[i], cols = batch.cols[i];
            batch.work += rows * cols;
            batch.upper += cols * cols;
            batch.row_step += rows;
            batch.row_variance += rows;
            batch.column_factor += cols;
            batch.words += trellis_scratch(batch.rows[i], params.states);
            batch.levels += rows * cols;
        }
    }
}

}  // namespace pgolf::generic
