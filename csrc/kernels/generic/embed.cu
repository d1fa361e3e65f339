// Embedding, SmearGate and RMS-norm for any GPU from sm_80. Bound by writing the output: the embedding stays in the
// second-level cache, since the output is written past it. A warp takes consecutive tokens, so that each row is read
// about once, and has the rows of the next two in flight while it reduces two.
#include <cuda_bf16.h>

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "common/check.h"
#include "embed.cuh"
#include "ops/embed.h"

namespace pgolf::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokensPerWarp = 8;
constexpr int kTokensPerBlock = kWarps * kTokensPerWarp;
static_assert(kTokensPerWarp % 2 == 0 && kTokensPerWarp < kWarpSize, "two at a time; one lane a token and one before");

// sigmoid(gate_weight . row[:window]) of the lane's own row, in four sums: a short chain of dependent instructions.
template <typename T>
__device__ __forceinline__ float sigmoid_of(const T* row, const float* gate_weight, int window) {
    float sum[4] = {};
    for (int i = 0; i < window; i += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (i + j < window) sum[j] = fmaf(to_float(row[i + j]), gate_weight[i + j], sum[j]);
        }
    }
    const float logit = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return 1.0f / (1.0f + expf(-logit));
}

// A warp's tokens, one a lane: lane k + 1 has token first + k, lane 0 the token before them.
struct Tokens {
    int64_t first;
    int count;
    int row;              // the lane's
    float sigmoid, gate;  // the lane's; -1 and 0 where nothing is added
    unsigned smeared;     // bit k + 1: token first + k takes a share of the one before
    unsigned undefined;   // bit k + 1: token first + k needs an id that is none
};

template <typename T>
__device__ __forceinline__ Tokens read_tokens(const EmbedForward& p, int lane) {
    Tokens t;
    const int warp = threadIdx.x / kWarpSize;
    t.first = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + warp * kTokensPerWarp;
    t.count = static_cast<int>(max(int64_t{0}, min(int64_t{kTokensPerWarp}, p.rows - t.first)));
    const int64_t mine = t.first + lane - 1;
    const bool exists = lane <= t.count && mine >= 0 && mine < p.rows;
    const int64_t id = exists ? p.ids[mine] : 0;
    const bool known = is_known(id, p.vocab);
    const bool smeared =
        exists && lane > 0 && static_cast<unsigned>(mine) % static_cast<unsigned>(p.length) != 0 && id != p.bos;
    t.row = row_of(id, p.vocab);
    t.sigmoid = -1.0f;
    if (smeared) {
        const T* const row = static_cast<const T*>(p.weight) + static_cast<int64_t>(t.row) * p.dim;
        t.sigmoid = sigmoid_of(row, p.gate_weight, p.window);
    }
    t.gate = smeared ? *p.lambda * t.sigmoid : 0.0f;
    t.smeared = __ballot_sync(kAllLanes, smeared);
    const unsigned unknown = __ballot_sync(kAllLanes, !known);
    t.undefined = unknown | (t.smeared & unknown << 1);
    return t;
}

__device__ __forceinline__ float rstd_of(const EmbedForward& p, const Tokens& t, int k, float squares,
                                         float inverse_dim) {
    return t.undefined >> (k + 1) & 1 ? NAN : rsqrtf(squares * inverse_dim + p.eps);
}

__device__ __forceinline__ void write_statistics(const EmbedForward& p, const Tokens& t, int lane, float rstd) {
    if (lane == 0 || lane > t.count) return;
    const int64_t mine = t.first + lane - 1;
    p.statistics[mine] = rstd;
    p.statistics[p.rows + mine] = t.sigmoid;
}

// Round N values and write them for good: they are not read again here.
template <typename T, int N>
__device__ __forceinline__ void store_streaming(T* target, const float (&x)[N]) {
    if constexpr (N * sizeof(T) == sizeof(uint4)) {
        Packed<T, N> packed;
#pragma unroll
        for (int i = 0; i < N; ++i) packed.value[i] = from_float<T>(x[i]);
        uint4 raw;
        memcpy(&raw, &packed, sizeof(raw));
        __stcs(reinterpret_cast<uint4*>(target), raw);
    } else {
        store<N>(target, x);
    }
}

// x = row + gate * before, where `add`, else row; returns the lane's sum of squares over the `columns` of the row.
template <typename T, int N>
__device__ __forceinline__ float smear(const Row<T, N>& row, const Row<T, N>& before, bool add, float gate, int columns,
                                       int lane, float (&x)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = value_of(row, i);
    // A branch, not a zero gate: zero times an infinite or NaN neighbour would leak into the next document.
    if (add) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) x[i] = fmaf(gate, value_of(before, i), x[i]);
    }
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kValues / N; ++j) {
        float sum[2] = {};
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i % 2] = fmaf(x[j * N + i], x[j * N + i], sum[i % 2]);
        if (column_of<N>(j, lane) < columns) total += sum[0] + sum[1];
    }
    return total;
}

// Rows of at most kTileColumns values: a warp holds them whole.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 3)
    embed_forward_kernel(const EmbedForward p, float inverse_dim) {
    const int lane = threadIdx.x % kWarpSize;
    const Tokens t = read_tokens<T>(p, lane);
    if (t.count == 0) return;
    const T* const weight = static_cast<const T*>(p.weight);
    T* const out = static_cast<T*>(p.out) + t.first * p.dim;
    // The row of token first + k. Lanes past its end hold its last values: for zeros they would have to wait for the
    // load.
    const auto fetch = [&](int k, Row<T, N>& into) {
        const T* const row = weight + static_cast<int64_t>(__shfl_sync(kAllLanes, t.row, k + 1)) * p.dim;
#pragma unroll
        for (int j = 0; j < kValues / N; ++j) {
            into.part[j] = *reinterpret_cast<const uint4*>(row + min(column_of<N>(j, lane), p.dim - N));
        }
    };

    float my_rstd = 0.0f;
    Row<T, N> before, next[2];
    fetch(-1, before);
    fetch(0, next[0]);
    fetch(1, next[1]);
#pragma unroll
    for (int k = 0; k < kTokensPerWarp; k += 2) {
        if (k >= t.count) break;
        const Row<T, N> row[2] = {next[0], next[1]};
        if (k + 2 < kTokensPerWarp) {  // beyond the last token row 0: a branch on it would have to wait for the load
            fetch(k + 2, next[0]);
            fetch(k + 3, next[1]);
        }
        float x[2][kValues], squares[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float gate = __shfl_sync(kAllLanes, t.gate, k + i + 1);
            const bool add = t.smeared >> (k + i + 1) & 1;
            squares[i] = smear(row[i], i == 0 ? before : row[0], add, gate, p.dim, lane, x[i]);
        }
        before = row[1];
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int i = 0; i < 2; ++i) squares[i] += __shfl_xor_sync(kAllLanes, squares[i], offset);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (k + i >= t.count) break;
            const float rstd = rstd_of(p, t, k + i, squares[i], inverse_dim);
            if (lane == k + i + 1) my_rstd = rstd;
#pragma unroll
            for (int j = 0; j < kValues / N; ++j) {
                const int column = column_of<N>(j, lane);
                float part[N];
#pragma unroll
                for (int v = 0; v < N; ++v) part[v] = x[i][j * N + v] * rstd;
                if (column < p.dim) store_streaming<T, N>(out + static_cast<int64_t>(k + i) * p.dim + column, part);
            }
        }
    }
    write_statistics(p, t, lane, my_rstd);
}

// Rows of any width: read twice, for the sum of squares and for the result.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 8) embed_forward_wide_kernel(const EmbedForward p, float inverse_dim) {
    const int lane = threadIdx.x % kWarpSize;
    const Tokens t = read_tokens<T>(p, lane);
    const T* const weight = static_cast<const T*>(p.weight);
    T* const out = static_cast<T*>(p.out) + t.first * p.dim;

    float my_rstd = 0.0f;
    for (int k = 0; k < t.count; ++k) {
        const T* const row = weight + static_cast<int64_t>(__shfl_sync(kAllLanes, t.row, k + 1)) * p.dim;
        const T* const before = weight + static_cast<int64_t>(__shfl_sync(kAllLanes, t.row, k)) * p.dim;
        const float gate = __shfl_sync(kAllLanes, t.gate, k + 1);
        const bool add = t.smeared >> (k + 1) & 1;
        const auto smeared = [&](int column, float (&x)[N]) {
            load<N>(row + column, x);
            if (add) {
                float previous[N];
                load<N>(before + column, previous);
#pragma unroll
                for (int i = 0; i < N; ++i) x[i] = fmaf(gate, previous[i], x[i]);
            }
        };
        float x[N], sum[4] = {};
        for (int column = lane * N; column < p.dim; column += kWarpSize * N) {
            smeared(column, x);
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i % 4] = fmaf(x[i], x[i], sum[i % 4]);
        }
        const float rstd = rstd_of(p, t, k, warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3])), inverse_dim);
        if (lane == k + 1) my_rstd = rstd;
        for (int column = lane * N; column < p.dim; column += kWarpSize * N) {
            smeared(column, x);
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] *= rstd;
            store_streaming<T, N>(out + static_cast<int64_t>(k) * p.dim + column, x);
        }
    }
    write_statistics(p, t, lane, my_rstd);
}

template <typename T>
void launch(const EmbedForward& p, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>((p.rows + kTokensPerBlock - 1) / kTokensPerBlock);
    constexpr int N = kVectorBytes / sizeof(T);
    const float inverse_dim = 1.0f / static_cast<float>(p.dim);
    if (!vectorizable<T>(p.weight, p.dim) || !vectorizable<T>(p.out, p.dim)) {
        embed_forward_wide_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p, inverse_dim);
    } else if (p.dim > kTileColumns) {
        embed_forward_wide_kernel<T, N><<<blocks, kThreads, 0, stream>>>(p, inverse_dim);
    } else {
        embed_forward_kernel<T, N><<<blocks, kThreads, 0, stream>>>(p, inverse_dim);
    }
}

}  // namespace

void embed_forward(const EmbedForward& params, const Target& target) {
    if (params.rows == 0) return;  // an empty grid is an error to CUDA
    switch (params.dtype) {
        case DType::kFloat32:
            launch<float>(params, target.stream);
            break;
        case DType::kBFloat16:
            launch<__nv_bfloat16>(params, target.stream);
            break;
        default:
            throw std::runtime_error("embed_forward: dtype: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(params.dtype)));
    }
    check_launch("embed_forward");
}

}  // namespace pgolf::generic
