// The walk over sorted positions at the heart of embed's backward: see embed_backward.cu, the only file that includes
// it.
//
// The gradient de of the embeddings is never stored: positions are sorted by id (embed_sort.cu), and a warp walks a
// piece of them, forms de[r] from rows r and r + 1 of `grad` and rows of the embedding, and adds it up in registers.
// That reads `grad` twice, partly from the second-level cache; storing de and reading it back would move it three
// times. A piece holds whole ids' rows, which go to grad_weight, and at its ends parts of ids' rows, which go to
// scratch for embed_join_kernel to add in order.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "embed.cuh"
#include "ops/embed.h"

namespace pgolf::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPiece = 24;  // positions of a warp: at the recipe's size an H100 runs the pieces in two full rounds
constexpr int kAhead = 3;   // positions whose rows of `grad` are on their way to the second-level cache
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

// One of a warp's positions, in shared memory, where all lanes read it at once.
struct alignas(16) Position {
    int id, index;              // the token and where it is
    int before, after;          // rows of the embedding: of the token added to it, and of the one it is added to, or -1
    float rstd, sigmoid, gate;  // gate: 0 where nothing is added
    float next_rstd, next_gate;    // 0 where the token is not added to the next
    float scale, dot, next_scale;  // of wide rows
};

// Everything about the token at the `place`-th of the sorted positions.
template <bool kWide>
__device__ __forceinline__ Position position_at(const EmbedBackward& p, const Scratch& s, int64_t place) {
    const int64_t index = s.order[place];
    Position x{.id = static_cast<int>(p.ids[index]), .index = static_cast<int>(index), .before = -1, .after = -1};
    const float lambda = *p.lambda;
    x.rstd = p.statistics[index];
    x.sigmoid = p.statistics[p.rows + index];
    if (takes_share(x.sigmoid)) {
        x.before = row_of(p.ids[index - 1], p.vocab);
        x.gate = lambda * x.sigmoid;
    }
    if (index + 1 < p.rows) {
        const float sigmoid = p.statistics[p.rows + index + 1];
        if (takes_share(sigmoid)) {
            x.after = row_of(p.ids[index + 1], p.vocab);
            x.next_gate = lambda * sigmoid;
            x.next_rstd = p.statistics[index + 1];
            if constexpr (kWide) x.next_scale = s.scale[index + 1];
        }
    }
    if constexpr (kWide) {
        x.scale = s.scale[index];
        x.dot = s.dot[index];
    }
    return x;
}

// kWhole: a row fits into the warp's registers, so that the warp computes `scale` and `dot`, and a block's y is 0.
// Otherwise block y has columns from y * kTileColumns.
template <typename T, int N, bool kWhole>
__global__ void __launch_bounds__(kThreads, N == 8 ? 4 : 3)
    embed_rows_kernel(const EmbedBackward p, const Scratch s, float inverse_dim) {
    __shared__ Position positions[kWarps][kPiece];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int piece = blockIdx.x * kWarps + warp;
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

    int id = -1, start = 0, end = 0;  // of the lane's position: its token, and where that one's positions begin and end
    if (lane < count) {
        const Position mine = position_at<!kWhole>(p, s, first + lane);
        positions[warp][lane] = mine;
        id = mine.id;
        start = s.starts[id];
        end = s.starts[id + 1];
    }
    __syncwarp();
    const int following = __shfl_down_sync(kAllLanes, id, 1);
    const unsigned last_rows = __ballot_sync(kAllLanes, lane == count - 1 || id != following);
    const bool open_before = __shfl_sync(kAllLanes, start, 0) < first;
    const bool open_after = __shfl_sync(kAllLanes, end, count - 1) > first + count;

    // The rows of `grad` that position k needs: its own and, where it is added to the next, the next.
    const auto prefetch_grad = [&](int k) {
        if (k >= count) return;
        const Position& at = positions[warp][k];
        const int64_t values = min(columns, kTileColumns) + (at.after < 0 ? 0 : p.dim);
        prefetch(grad + static_cast<int64_t>(at.index) * p.dim, values * sizeof(T), lane);
    };
#pragma unroll 1
    for (int k = 1; k < kAhead; ++k) prefetch_grad(k);

    float sum[kValues];
    float own = 0.0f;        // what e[r] itself is multiplied by, over the id's rows
    float logit_sum = 0.0f;  // dlogit over the id's rows
    float of_lambda = 0.0f;  // what the lane's position adds to lambda's gradient
    Row<T, N> e;
    for (int k = 0; k < count; ++k) {
        prefetch_grad(k + kAhead);
        const Position at = positions[warp][k];
        const bool takes = at.before >= 0;
        const bool gives = at.after >= 0;
        const T* const grad_row = grad + static_cast<int64_t>(at.index) * p.dim;
        // `grad` passes the first-level cache by, which then keeps frequent rows of the embedding.
        Row<T, N> g, next_g, before, after;
        load_row<true>(grad_row, columns, lane, g);
        load_row<true>(grad_row + p.dim, gives ? columns : 0, lane, next_g);
        load_row(weight + static_cast<int64_t>(at.before) * p.dim, takes ? columns : 0, lane, before);
        load_row(weight + static_cast<int64_t>(at.after) * p.dim, gives ? columns : 0, lane, after);
        if (k == 0 || last_rows >> (k - 1) & 1) {
            load_row(weight + static_cast<int64_t>(at.id) * p.dim, columns, lane, e);
            own = logit_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kValues; ++i) sum[i] = 0.0f;
        }

        // This row's share apart from e[r]'s, added to the sum at once: a rounding error of the sum's size once a row.
        float share[kValues];
        const float of_next_g = at.next_gate * at.next_rstd;
        const auto begin_share = [&](int i) {
            share[i] = fmaf(of_next_g, value_of(next_g, i), at.rstd * value_of(g, i));
        };
        float scale, next_scale, dot;
        if constexpr (kWhole) {
            float grad_s = 0.0f, grad_before = 0.0f, s_before = 0.0f, next_grad_s = 0.0f;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const float x = value_of(e, i);
                const float previous = value_of(before, i);
                const float s_here = fmaf(at.gate, previous, x);
                const float s_next = fmaf(at.next_gate, x, value_of(after, i));
                grad_s = fmaf(value_of(g, i), s_here, grad_s);
                grad_before = fmaf(value_of(g, i), previous, grad_before);
                s_before = fmaf(s_here, previous, s_before);
                next_grad_s = fmaf(value_of(next_g, i), s_next, next_grad_s);
                begin_share(i);
            }
            keep_packed(e);
            keep_packed(before);
            keep_packed(after);
            warp_sum4(grad_s, grad_before, s_before, next_grad_s, lane);
            scale = scale_of(at.rstd, grad_s, inverse_dim);
            next_scale = scale_of(at.next_rstd, next_grad_s, inverse_dim);
            dot = fmaf(at.rstd, grad_before, -scale * s_before);
        } else {
#pragma unroll
            for (int i = 0; i < kValues; ++i) begin_share(i);
            scale = at.scale;
            next_scale = at.next_scale;
            dot = at.dot;
        }
        if (takes) {
            if (lane == k) of_lambda = at.sigmoid * dot;
            logit_sum = fmaf(at.gate * (1.0f - at.sigmoid), dot, logit_sum);
        }
        own -= fmaf(at.next_gate * at.next_gate, next_scale, scale);
        const float of_before = -scale * at.gate;
        const float of_after = -at.next_gate * next_scale;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            sum[i] += fmaf(of_after, value_of(after, i), fmaf(of_before, value_of(before, i), share[i]));
        }
        if (!(last_rows >> k & 1)) continue;

        const bool from_before = open_before && !(last_rows & ((1u << k) - 1));
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
                const int full = base + column + i;
                if (logit_sum != 0.0f && full < p.window) x[i] = fmaf(logit_sum, p.gate_weight[full], x[i]);
            }
            if (column >= columns) continue;
            if (whole) {
                store_gradient<N>(p, static_cast<int64_t>(at.id) * p.dim + base + column, x);
            } else {
                store<N>(s.partial + part * p.dim + base + column, x);
            }
        }
        if (sums && lane == 0) *(whole ? s.logit_sum + at.id : s.partial_sum + part) = logit_sum;
    }
    if (!sums) return;
    const CompensatedSum lambda_sum = warp_sum(CompensatedSum{of_lambda, 0.0f});
    if (lane == 0) s.lambda_sum[piece] = lambda_sum.value();
}

}  // namespace
}  // namespace pgolf::generic
