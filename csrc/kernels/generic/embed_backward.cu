// The gradients of embedding, SmearGate and RMS-norm, for any GPU from sm_80; deterministic, without atomic additions
// of floating-point values.
//
// With ds[r], the gradient of s[r] (ops/embed.h), and dot[r] = ds[r] . e[r - 1] for rows that take a share (gate > 0):
//   ds[r] = rstd[r] * grad[r] - scale[r] * s[r], scale[r] = rstd[r]^3 * (grad[r] . s[r]) / dim
//   de[r] = ds[r] + gate[r + 1] * ds[r + 1] + dlogit[r] * gate_weight, on the first `window` columns
//   dlogit[r] = gate[r] * (1 - sigmoid[r]) * dot[r]; grad_lambda = sum of sigmoid[r] * dot[r]
//   grad_weight[v] = sum of de[r] over the rows of id v; grad_gate_weight = sum of dlogit[r] * e[r, :window]
//
// Positions are sorted by id (embed_sort.cu); embed_rows_kernel walks the sorted positions and adds de up
// (embed_rows.cuh); embed_join_kernel adds the parts of ids whose positions were split; embed_sums_kernel has the gate
// and lambda.
#include <cuda_bf16.h>

#include <stdexcept>

#include "common/check.h"
#include "embed_rows.cuh"

namespace pgolf::generic {
namespace {

constexpr int kJoinWarps = 8;
constexpr int kJoinThreads = kJoinWarps * kWarpSize;

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

// What embed_rows_kernel leaves: zeros for the ids that do not occur, and the sums of the ids whose positions lie in
// several pieces. Block i has the one that continues beyond piece i, if it begins there.
__global__ void __launch_bounds__(kJoinThreads, 3) embed_join_kernel(const EmbedBackward p, const Scratch s) {
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
        // A frequent id has hundreds of parts: the loads of several must be under way together.
#pragma unroll 4
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
    CompensatedSum sum{};
    if (column < p.window) {
        const T* const weight = static_cast<const T*>(p.weight) + column;
#pragma unroll 4
        for (int id = threadIdx.x; id < p.vocab; id += kJoinThreads) {
            const float factor = s.logit_sum[id];
            const float x = to_float(weight[static_cast<int64_t>(id) * p.dim]);
            // Not where it is zero: an infinite row that no gate was computed of must not count.
            sum.add(factor != 0.0f ? factor * x : 0.0f);
        }
    } else {
#pragma unroll 4
        for (int piece = threadIdx.x; piece < pieces; piece += kJoinThreads) sum.add(s.lambda_sum[piece]);
    }
    sum = block_sum<kJoinThreads>(sum);
    if (threadIdx.x == 0) *(column < p.window ? p.grad_gate_weight + column : p.grad_lambda) = sum.value();
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
