// The gradients of embedding, SmearGate and RMS-norm, for any GPU from sm_80; deterministic, without atomic additions
// of floating-point values.
//
// With ds[r], the gradient of s[r] (ops/embed.h), and dot[r] = ds[r] . e[r - 1] for rows that take a share (gate > 0):
//   ds[r] = rstd[r] * grad[r] - scale[r] * s[r], scale[r] = rstd[r]^3 * (grad[r] . s[r]) / dim
//   de[r] = ds[r] + gate[r + 1] * ds[r + 1] + dlogit[r] * gate_weight, on the first `window` columns
//   dlogit[r] = gate[r] * (1 - sigmoid[r]) * dot[r]; grad_lambda = sum of sigmoid[r] * dot[r]
//   grad_weight[v] = sum of de[r] over the rows of id v; grad_gate_weight = sum of dlogit[r] * e[r, :window]
//
// de is never stored: positions are sorted by id (embed_sort.cu), and a warp walks a piece of them, forms de[r] from
// rows r and r + 1 of `grad` and rows of the embedding, and adds it up in registers. That reads `grad` twice, partly
// from the second-level cache; storing de and reading it back would move it three times. A piece holds whole ids' rows,
// which go to grad_weight, and at its ends parts of ids' rows, which go to scratch for embed_join_kernel to add in
// order.
#include <cuda_bf16.h>

#include <stdexcept>

#include "common/check.h"
#include "embed.cuh"
#include "ops/embed.h"

namespace pgolf::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPiece = 24;  // positions of a warp: at the recipe's size an H100 runs the pieces in two full rounds
constexpr int kAhead = 3;   // positions whose rows of `grad` are on their way to the second-level cache
constexpr int kJoinWarps = 8;
constexpr int kJoinThreads = kJoinWarps * kWarpSize;
static_assert(kPiece <= kWarpSize, "one lane a position");

struct Scratch {
    float* partial;      // [pieces, 2, dim]: sums of de over the ids that begin before a piece, and that end after it
    float* partial_sum;  // [pieces, 2]: the same of dlogit
    float* scale;        // [rows]: of wide rows, by embed_dots_kernel
    float* dot;          // [rows]: likewise
    float* logit_sum;    // [vocab]: sum of dlogit over the id's rows
    float* lambda_sum;   // [pieces]
    int* order;          // [rows], of EmbedSort
    int* starts;         // [vocab + 1], of EmbedSort
    int* sort;
};

int64_t blocks_of(int64_t rows) { return (rows + kPiece * kWarps - 1) / (kPiece * kWarps); }

// The parts of the scratch memory, and their sum in words.
Scratch split(void* memory, int64_t rows, int dim, int vocab, int64_t& words) {
    float* const first = static_cast<float*>(memory);
    const auto take = [&](int64_t count) {
        float* const part = first + words;
        words += (count + 7) / 8 * 8;  // vectors of eight
        return part;
    };
    const auto take_ints = [&](int64_t count) { return reinterpret_cast<int*>(take(count)); };
    const int64_t pieces = blocks_of(rows) * kWarps;
    Scratch s{};
    words = 0;
    s.partial = take(pieces * 2 * dim);
    s.partial_sum = take(pieces * 2);
    s.scale = take(rows);
    s.dot = take(rows);
    s.logit_sum = take(vocab);
    s.lambda_sum = take(pieces);
    s.order = take_ints(rows);
    s.starts = take_ints(int64_t{vocab} + 1);
    s.sort = take_ints(embed_sort_scratch(rows, vocab));
    return s;
}

__device__ __forceinline__ bool takes_share(float sigmoid) { return !(sigmoid < 0.0f); }  // a NaN does

__device__ __forceinline__ float scale_of(float rstd, float dot, float inverse_dim) {
    return rstd * dot * inverse_dim * rstd * rstd;
}

template <int N>
__device__ __forceinline__ void store_gradient(const EmbedBackward& p, int64_t offset, const float (&x)[N]) {
    if (p.grad_dtype == DType::kFloat32) {
        store<N>(static_cast<float*>(p.grad_weight) + offset, x);
    } else {
        store<N>(static_cast<__nv_bfloat16*>(p.grad_weight) + offset, x);
    }
}

// The sums of four values over the warp in half the shuffles of four separate sums: lanes share the values out first.
__device__ __forceinline__ void warp_sum4(float& a, float& b, float& c, float& d, int lane) {
    const bool upper = lane & 16;
    float first = upper ? c : a;
    float second = upper ? d : b;
    first += __shfl_xor_sync(kAllLanes, upper ? a : c, 16);
    second += __shfl_xor_sync(kAllLanes, upper ? b : d, 16);
    const bool odd = lane & 8;
    float sum = odd ? second : first;
    sum += __shfl_xor_sync(kAllLanes, odd ? first : second, 8);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    a = __shfl_sync(kAllLanes, sum, 0);
    b = __shfl_sync(kAllLanes, sum, 8);
    c = __shfl_sync(kAllLanes, sum, 16);
    d = __shfl_sync(kAllLanes, sum, 24);
}

// Have `bytes` bytes at `address` brought into the second-level cache, by the warp.
__device__ __forceinline__ void prefetch(const void* address, int64_t bytes, int lane) {
    constexpr int kFetched = 64;  // bytes, what memory delivers at once
#pragma unroll 1
    for (int64_t offset = lane * kFetched; offset < bytes; offset += kWarpSize * kFetched) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(address) + offset));
    }
}

// scale[r] and dot[r] of rows that a warp does not hold whole; a warp a row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    embed_dots_kernel(const EmbedBackward p, const Scratch s, float inverse_dim) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (row >= p.rows) return;
    const float rstd = p.statistics[row];
    const float sigmoid = p.statistics[p.rows + row];
    const bool added = takes_share(sigmoid);
    const float gate = added ? *p.lambda * sigmoid : 0.0f;
    const T* const weight = static_cast<const T*>(p.weight);
    const T* const grad = static_cast<const T*>(p.grad) + row * p.dim;
    const T* const e = weight + static_cast<int64_t>(row_of(p.ids[row], p.vocab)) * p.dim;
    const T* const before = added ? weight + static_cast<int64_t>(row_of(p.ids[row - 1], p.vocab)) * p.dim : e;

    float grad_s = 0.0f, grad_before = 0.0f, s_before = 0.0f, unused = 0.0f;
    for (int column = lane * N; column < p.dim; column += kWarpSize * N) {
        float g[N], x[N], previous[N];
        load<N>(grad + column, g);
        load<N>(e + column, x);
        if (added) {
            load<N>(before + column, previous);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x[i] = fmaf(gate, previous[i], x[i]);
                grad_before = fmaf(g[i], previous[i], grad_before);
                s_before = fmaf(x[i], previous[i], s_before);
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) grad_s = fmaf(g[i], x[i], grad_s);
    }
    warp_sum4(grad_s, grad_before, s_before, unused, lane);
    const float scale = scale_of(rstd, grad_s, inverse_dim);
    if (lane == 0) {
        s.scale[row] = scale;
        s.dot[row] = fmaf(rstd, grad_before, -scale * s_before);
    }
}

// A warp's positions, one a lane.
struct Piece {
    int id, position, before, after;  // the token, where it is, and the embedding rows of its neighbours
    float rstd, sigmoid, gate;        // gate: 0 where nothing is added
    float next_rstd, next_gate;       // 0 where the position is not added to the next
    float scale, dot, next_scale;     // of wide rows
};

// kWhole: a row fits into the warp's registers, so that the warp computes `scale` and `dot`, and a block's y is 0.
// Otherwise block y has columns from y * kTileColumns.
template <typename T, int N, bool kWhole>
__global__ void __launch_bounds__(kThreads, N == 8 ? 4 : 3)
    embed_rows_kernel(const EmbedBackward p, const Scratch s, float inverse_dim) {
    const int lane = threadIdx.x % kWarpSize;
    const int piece = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
    const int64_t first = static_cast<int64_t>(piece) * kPiece;
    const int count = static_cast<int>(min(int64_t{kPiece}, s.starts[p.vocab] - first));
    const int base = kWhole ? 0 : blockIdx.y * kTileColumns;
    const int columns = p.dim - base;
    const bool sums = kWhole || blockIdx.y == 0;  // whether this block also adds up what is one value a row
    if (count <= 0) {
        if (sums && lane == 0) s.lambda_sum[piece] = 0.0f;
        return;
    }
    const T* const weight = static_cast<const T*>(p.weight) + base;
    const T* const grad = static_cast<const T*>(p.grad) + base;
    const float lambda = *p.lambda;

    Piece mine{};
    int start = 0, end = 0;  // of the id's positions
    bool added = false, adds = false;
    if (lane < count) {
        mine.position = s.order[first + lane];
        const int64_t position = mine.position;
        mine.id = static_cast<int>(p.ids[position]);
        start = s.starts[mine.id];
        end = s.starts[mine.id + 1];
        mine.rstd = p.statistics[position];
        mine.sigmoid = p.statistics[p.rows + position];
        added = takes_share(mine.sigmoid);
        if (added) {
            mine.before = row_of(p.ids[position - 1], p.vocab);
            mine.gate = lambda * mine.sigmoid;
        }
        if (position + 1 < p.rows) {
            const float next = p.statistics[p.rows + position + 1];
            adds = takes_share(next);
            if (adds) {
                mine.after = row_of(p.ids[position + 1], p.vocab);
                mine.next_gate = lambda * next;
                mine.next_rstd = p.statistics[position + 1];
                if constexpr (!kWhole) mine.next_scale = s.scale[position + 1];
            }
        }
        if constexpr (!kWhole) {
            mine.scale = s.scale[position];
            mine.dot = s.dot[position];
        }
    }
    const unsigned added_rows = __ballot_sync(kAllLanes, added);
    const unsigned adding_rows = __ballot_sync(kAllLanes, adds);
    const int following = __shfl_down_sync(kAllLanes, mine.id, 1);
    const unsigned last_rows = __ballot_sync(kAllLanes, lane == count - 1 || mine.id != following);
    const bool open_before = __shfl_sync(kAllLanes, start, 0) < first;
    const bool open_after = __shfl_sync(kAllLanes, end, count - 1) > first + count;

    // The rows of `grad` that position k needs: its own and, where it is added to the next, the next.
    const auto prefetch_grad = [&](int k) {
        if (k >= count) return;
        const T* const row = grad + static_cast<int64_t>(__shfl_sync(kAllLanes, mine.position, k)) * p.dim;
        prefetch(row, (p.dim * int64_t{adding_rows >> k & 1} + min(columns, kTileColumns)) * sizeof(T), lane);
    };
#pragma unroll 1
    for (int k = 1; k < kAhead; ++k) prefetch_grad(k);

    float sum[kValues];
    float own = 0.0f;        // what e[r] itself is multiplied by, over the id's rows
    float logit_sum = 0.0f;  // dlogit over the id's rows
    float lambda_sum = 0.0f;
    Row<T, N> e;
    bool begins = true, head = true;  // an id begins in this piece; its rows are the piece's first
    for (int k = 0; k < count; ++k) {
        prefetch_grad(k + kAhead);
        const bool takes = added_rows >> k & 1;
        const bool gives = adding_rows >> k & 1;
        const int64_t id = __shfl_sync(kAllLanes, mine.id, k);
        const T* const grad_row = grad + static_cast<int64_t>(__shfl_sync(kAllLanes, mine.position, k)) * p.dim;
        const T* const before_row = weight + static_cast<int64_t>(__shfl_sync(kAllLanes, mine.before, k)) * p.dim;
        const T* const after_row = weight + static_cast<int64_t>(__shfl_sync(kAllLanes, mine.after, k)) * p.dim;
        // `grad` passes the first-level cache by, which then keeps frequent rows of the embedding.
        Row<T, N> g = load_row<T, N, true>(grad_row, columns, lane);
        Row<T, N> next_g = load_row<T, N, true>(grad_row + p.dim, gives ? columns : 0, lane);
        Row<T, N> before = load_row<T, N>(before_row, takes ? columns : 0, lane);
        Row<T, N> after = load_row<T, N>(after_row, gives ? columns : 0, lane);
        if (begins) {
            begins = false;
            e = load_row<T, N>(weight + id * p.dim, columns, lane);
            own = logit_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kValues; ++i) sum[i] = 0.0f;
        }
        const float rstd = __shfl_sync(kAllLanes, mine.rstd, k);
        const float sigmoid = __shfl_sync(kAllLanes, mine.sigmoid, k);
        const float gate = __shfl_sync(kAllLanes, mine.gate, k);
        const float next_rstd = __shfl_sync(kAllLanes, mine.next_rstd, k);
        const float next_gate = __shfl_sync(kAllLanes, mine.next_gate, k);

        // This row's share apart from e[r]'s, added to the sum at once: a rounding error of the sum's size once a row.
        float share[kValues];
        const float of_next_g = next_gate * next_rstd;
#pragma unroll
        for (int i = 0; i < kValues; ++i) share[i] = fmaf(of_next_g, value_of(next_g, i), rstd * value_of(g, i));
        float scale, next_scale, dot;
        if constexpr (kWhole) {
            float grad_s = 0.0f, grad_before = 0.0f, s_before = 0.0f, next_grad_s = 0.0f;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const float x = value_of(e, i);
                const float previous = value_of(before, i);
                const float s_here = fmaf(gate, previous, x);
                const float s_next = fmaf(next_gate, x, value_of(after, i));
                grad_s = fmaf(value_of(g, i), s_here, grad_s);
                grad_before = fmaf(value_of(g, i), previous, grad_before);
                s_before = fmaf(s_here, previous, s_before);
                next_grad_s = fmaf(value_of(next_g, i), s_next, next_grad_s);
            }
            keep_packed(e);
            keep_packed(before);
            keep_packed(after);
            warp_sum4(grad_s, grad_before, s_before, next_grad_s, lane);
            scale = scale_of(rstd, grad_s, inverse_dim);
            next_scale = scale_of(next_rstd, next_grad_s, inverse_dim);
            dot = fmaf(rstd, grad_before, -scale * s_before);
        } else {
            scale = __shfl_sync(kAllLanes, mine.scale, k);
            next_scale = __shfl_sync(kAllLanes, mine.next_scale, k);
            dot = __shfl_sync(kAllLanes, mine.dot, k);
        }
        if (takes) {
            lambda_sum = fmaf(sigmoid, dot, lambda_sum);
            logit_sum = fmaf(gate * (1.0f - sigmoid), dot, logit_sum);
        }
        own -= fmaf(next_gate * next_gate, next_scale, scale);
        const float of_before = -scale * gate;
        const float of_after = -next_gate * next_scale;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            sum[i] += fmaf(of_after, value_of(after, i), fmaf(of_before, value_of(before, i), share[i]));
        }
        if (!(last_rows >> k & 1)) continue;

        const bool from_before = head && open_before;
        const bool whole = !from_before && !(k == count - 1 && open_after);
        const int64_t part = static_cast<int64_t>(piece) * 2 + (from_before ? 0 : 1);
#pragma unroll
        for (int j = 0; j < kValues / N; ++j) {
            const int column = column_of<N>(j, lane);
            float x[N];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x[i] = fmaf(own, value_of(e, j * N + i), sum[j * N + i]);
                // Not where it is zero: an infinite weight must not reach rows that no gate was computed of.
                const int at = base + column + i;
                if (logit_sum != 0.0f && at < p.window) x[i] = fmaf(logit_sum, p.gate_weight[at], x[i]);
            }
            if (column >= columns) continue;
            if (whole) {
                store_gradient<N>(p, id * p.dim + base + column, x);
            } else {
                store<N>(s.partial + part * p.dim + base + column, x);
            }
        }
        if (sums && lane == 0) *(whole ? s.logit_sum + id : s.partial_sum + part) = logit_sum;
        begins = true;
        head = false;
    }
    if (sums && lane == 0) s.lambda_sum[piece] = lambda_sum;
}

// What embed_rows_kernel leaves: zeros for the ids that do not occur, and the sums of the ids whose positions lie in
// several pieces. Block i has the one that continues beyond piece i, if it begins there.
__global__ void __launch_bounds__(kJoinThreads) embed_join_kernel(const EmbedBackward p, const Scratch s) {
    __shared__ float sums[kJoinWarps][kTileColumns];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int piece = blockIdx.x;

    for (int64_t id = static_cast<int64_t>(piece) * kJoinWarps + warp; id < p.vocab;
         id += static_cast<int64_t>(gridDim.x) * kJoinWarps) {
        if (s.starts[id] != s.starts[id + 1]) continue;
        const float zero[1] = {};
        for (int column = lane; column < p.dim; column += kWarpSize) store_gradient<1>(p, id * p.dim + column, zero);
        if (lane == 0) s.logit_sum[id] = 0.0f;
    }

    const int64_t first = static_cast<int64_t>(piece) * kPiece;
    const int64_t beyond = first + kPiece;
    if (beyond >= s.starts[p.vocab]) return;
    const int64_t id = p.ids[s.order[beyond - 1]];
    const int start = s.starts[id];
    const int end = s.starts[id + 1];
    if (start < first || end <= beyond) return;
    const int parts = (end - 1) / kPiece - piece + 1;
    const auto index_of = [&](int part) { return (static_cast<int64_t>(piece) + part) * 2 + (part == 0 ? 1 : 0); };
    const int used = min(parts, kJoinWarps);

    for (int base = 0; base < p.dim; base += kTileColumns) {
        const int columns = min(kTileColumns, p.dim - base);
        float sum[kValues] = {};
        for (int part = warp; part < parts; part += kJoinWarps) {
            const float* const row = s.partial + index_of(part) * p.dim + base;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const int column = i * kWarpSize + lane;
                if (column < columns) sum[i] += row[column];
            }
        }
        __syncthreads();  // the sums of the tile before are used up
#pragma unroll
        for (int i = 0; i < kValues; ++i) sums[warp][i * kWarpSize + lane] = sum[i];
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += kJoinThreads) {
            float total[1] = {};
            for (int w = 0; w < used; ++w) total[0] += sums[w][column];
            store_gradient<1>(p, id * p.dim + base + column, total);
        }
    }
    if (warp == 0) {
        float sum = 0.0f;
        for (int part = lane; part < parts; part += kWarpSize) sum += s.partial_sum[index_of(part)];
        sum = warp_sum(sum);
        if (lane == 0) s.logit_sum[id] = sum;
    }
}

// Block i adds up column i of the gate's gradient, the last block lambda's.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) embed_sums_kernel(const EmbedBackward p, const Scratch s, int pieces) {
    const int column = blockIdx.x;
    float sum = 0.0f;
    if (column < p.window) {
        const T* const weight = static_cast<const T*>(p.weight) + column;
#pragma unroll 4
        for (int id = threadIdx.x; id < p.vocab; id += kJoinThreads) {
            const float factor = s.logit_sum[id];
            // Not where it is zero: an infinite row that no gate was computed of must not count.
            if (factor != 0.0f) sum = fmaf(factor, to_float(weight[static_cast<int64_t>(id) * p.dim]), sum);
        }
    } else {
#pragma unroll 4
        for (int piece = threadIdx.x; piece < pieces; piece += kJoinThreads) sum += s.lambda_sum[piece];
    }
    sum = block_sum<kJoinThreads>(sum);
    if (threadIdx.x == 0) *(column < p.window ? p.grad_gate_weight + column : p.grad_lambda) = sum;
}

// Wide rows, or those of no whole vectors (N = 1), tile by tile.
template <typename T, int N>
void launch_tiles(const EmbedBackward& p, const Scratch& s, unsigned blocks, float inverse_dim, cudaStream_t stream) {
    const unsigned dots_blocks = static_cast<unsigned>((p.rows + kWarps - 1) / kWarps);
    embed_dots_kernel<T, N><<<dots_blocks, kThreads, 0, stream>>>(p, s, inverse_dim);
    check_launch("embed_backward (dots)");
    const unsigned tiles = static_cast<unsigned>((p.dim + kTileColumns - 1) / kTileColumns);
    embed_rows_kernel<T, N, false><<<dim3(blocks, tiles), kThreads, 0, stream>>>(p, s, inverse_dim);
}

template <typename T>
void launch(const EmbedBackward& p, cudaStream_t stream) {
    int64_t words = 0;
    const Scratch s = split(p.scratch, p.rows, p.dim, p.vocab, words);
    embed_sort(
        {.ids = p.ids, .order = s.order, .starts = s.starts, .scratch = s.sort, .rows = p.rows, .vocab = p.vocab},
        stream);
    const unsigned blocks = static_cast<unsigned>(blocks_of(p.rows));
    const float inverse_dim = 1.0f / static_cast<float>(p.dim);
    constexpr int N = kVectorBytes / sizeof(T);
    if (!vectorizable<T>(p.weight, p.dim) || !vectorizable<T>(p.grad, p.dim)) {
        launch_tiles<T, 1>(p, s, blocks, inverse_dim, stream);
    } else if (p.dim > kTileColumns) {
        launch_tiles<T, N>(p, s, blocks, inverse_dim, stream);
    } else {
        embed_rows_kernel<T, N, true><<<blocks, kThreads, 0, stream>>>(p, s, inverse_dim);
    }
    check_launch("embed_backward (rows)");
    embed_join_kernel<<<blocks * kWarps, kJoinThreads, 0, stream>>>(p, s);
    check_launch("embed_backward (join)");
    embed_sums_kernel<T><<<p.window + 1, kJoinThreads, 0, stream>>>(p, s, static_cast<int>(blocks) * kWarps);
    check_launch("embed_backward (sums)");
}

}  // namespace

int64_t embed_scratch(int64_t rows, int dim, int vocab) {
    int64_t words = 0;
    split(nullptr, rows, dim, vocab, words);
    return words;
}

void embed_backward(const EmbedBackward& params, const Target& target) {
    switch (params.dtype) {
        case DType::kFloat32:
            launch<float>(params, target.stream);
            break;
        case DType::kBFloat16:
            launch<__nv_bfloat16>(params, target.stream);
            break;
        default:
            throw std::runtime_error("embed_backward: dtype: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(params.dtype)));
    }
}

}  // namespace pgolf::generic
