// QK-norm, rotary embedding and query gain for any GPU from sm_80: bound by memory. A warp takes whole tokens, several
// heads at a time, and has all loads of a token under way before it uses the first.
//
// The heads are cut into chunks of as many as a warp holds, each of queries, keys or values alone, so that what is done
// with a chunk is the same in all lanes. Block y has kSlots chunks; at the recipe's shape that is all of them.
#include <cuda_bf16.h>

#include <algorithm>
#include <stdexcept>

#include "common/check.h"
#include "common/grid.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "heads.cuh"
#include "ops/qk_rope.h"

namespace pgolf::generic {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxBlocks = 1024;  // sums a head that the last launch of the backward adds up

// Chunks of a block and blocks of a multiprocessor: as many loads under way as the registers hold.
template <typename T, bool kWhole>
constexpr int kForwardSlots = sizeof(T) == sizeof(float) && !kWhole ? 2 : 3;
template <bool kWhole>
constexpr int kForwardBlocks = kWhole ? 3 : 2;
template <typename T, bool kWhole>
constexpr int kBackwardSlots = sizeof(T) == sizeof(float) || !kWhole ? 2 : 4;
constexpr int kBackwardBlocks = 2;

enum class Kind { kQuery, kKey, kValue, kNone };

struct Chunk {
    Kind kind;
    int first;  // head, of those of its kind
};

__host__ __device__ constexpr int chunks_of(int heads, int in_warp) { return (heads + in_warp - 1) / in_warp; }

// kFull: the recipe's shape, of which the compiler knows what each chunk is: two of queries, one of keys, one of
// values, a head in every lane. The backward then also has all gradients.
template <int kLanes, bool kFull, typename Params>
__device__ __forceinline__ Chunk chunk_of(const Params& p, int index) {
    constexpr int kHeads = kWarpSize / kLanes;
    const int queries = kFull ? 2 : chunks_of(p.heads, kHeads);
    const int keys = kFull ? 1 : chunks_of(p.kv_heads, kHeads);
    if (index < queries) return {Kind::kQuery, index * kHeads};
    index -= queries;
    if (index < keys) return {Kind::kKey, index * kHeads};
    index -= keys;
    return {index < keys ? Kind::kValue : Kind::kNone, index * kHeads};
}

// The rows of a warp and their positions, without a division for each.
struct Rows {
    int row, position, step, step_position, length;

    template <typename Params>
    __device__ __forceinline__ explicit Rows(const Params& p) {
        length = static_cast<int>(p.length);
        row = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
        step = gridDim.x * kWarps;
        position = row % length;
        step_position = step % length;
    }

    __device__ __forceinline__ void advance() {
        row += step;
        position += step_position;
        if (position >= length) position -= length;
    }
};

// A lane's part of a head turns as x * cosine + partner * sine, where partner has the columns `half` further on or
// before. kWhole: half is a multiple of 8, so that a lane's columns turn together and another lane has the partner.
template <bool kWhole>
struct Turn {
    float cosine[kColumns], sine[kColumns];

    // kBack: the transposed turn, of gradients.
    template <bool kBack, typename Params>
    __device__ __forceinline__ void load_angles(const Params& p, int position, int column) {
        const int64_t offset = static_cast<int64_t>(position) * p.half;
        if constexpr (kWhole) {
            if (column >= 2 * p.half) return;
            const bool first = column < p.half;
            const int64_t at = offset + (first ? column : column - p.half);
#pragma unroll
            for (int i = 0; i < kColumns; i += 4) {
                const float4 c = *reinterpret_cast<const float4*>(p.cos + at + i);
                const float4 s = *reinterpret_cast<const float4*>(p.sin + at + i);
                cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
                sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
            }
#pragma unroll
            for (int i = 0; i < kColumns; ++i) sine[i] = first == kBack ? -sine[i] : sine[i];
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                if (column + i >= 2 * p.half) continue;
                const bool first = column + i < p.half;
                const int64_t at = offset + (first ? column + i : column + i - p.half);
                cosine[i] = p.cos[at];
                sine[i] = first == kBack ? -p.sin[at] : p.sin[at];
            }
        }
    }

    // Turn x, which is `packed` unpacked: the columns from `column` on of the head at `head`. All lanes of the warp
    // call it together; `exists` is false where there is no head to read.
    template <typename T>
    __device__ __forceinline__ void apply(float (&x)[kColumns], const Eight<T>& packed, const T* head, bool exists,
                                          int column, int half) const {
        if constexpr (kWhole) {
            const int lane = threadIdx.x % kWarpSize;
            const int distance = half / kColumns;
            const bool turns = column < 2 * half;
            float partner[kColumns];
            unpack(shuffle(packed, !turns ? lane : column < half ? lane + distance : lane - distance), partner);
            if (turns) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) x[i] = fmaf(partner[i], sine[i], x[i] * cosine[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const int own = column + i;
                if (!exists || own >= 2 * half) continue;
                const float partner = to_float(head[own < half ? own + half : own - half]);
                x[i] = fmaf(partner, sine[i], x[i] * cosine[i]);
            }
        }
    }
};

template <typename T, int kLanes, bool kWhole, bool kFull>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kWhole>) qk_rope_forward_kernel(const QkRopeForward p) {
    constexpr int kSlots = kForwardSlots<T, kWhole>;
    const int group = threadIdx.x % kWarpSize / kLanes;
    const int column = threadIdx.x % kLanes * kColumns;
    const int read = (p.heads + 2 * p.kv_heads) * p.head_dim, written = (p.heads + p.kv_heads) * p.head_dim;
    const float inverse_dim = 1.0f / p.head_dim;
    const T* const qkv = static_cast<const T*>(p.qkv);
    T* const out = static_cast<T*>(p.out);

    bool exists[kSlots];
    int place[kSlots];  // of the lane's head in a row
    float gain[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const Chunk chunk = chunk_of<kLanes, kFull>(p, (kFull ? 0 : blockIdx.y * kSlots) + i);
        const bool query = chunk.kind == Kind::kQuery;
        const int head = chunk.first + group;
        const bool is_head = kFull || (query ? head < p.heads : chunk.kind == Kind::kKey && head < p.kv_heads);
        exists[i] = kFull || (is_head && column < p.head_dim);
        place[i] = (query ? head : p.heads + head) * p.head_dim;
        gain[i] = query && is_head ? p.gain[head] : 1.0f;
    }

    for (Rows at(p); at.row < p.rows; at.advance()) {
        const T* const source = qkv + static_cast<int64_t>(at.row) * read;
        T* const target = out + static_cast<int64_t>(at.row) * written;
        Eight<T> packed[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) packed[i] = load_eight(source + place[i] + column, exists[i]);
        Turn<kWhole> turn;
        turn.template load_angles<false>(p, at.position, column);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            float x[kColumns];
            unpack(packed[i], x);
            float squares = dot_eight(x, x);
            head_sums<kLanes>(squares);
            const float scale = gain[i] * rsqrtf(fmaf(squares, inverse_dim, p.eps));
            turn.apply(x, packed[i], source + place[i], exists[i], column, p.half);
#pragma unroll
            for (float& value : x) value *= scale;
            if (exists[i]) store_eight(target + place[i] + column, x);
        }
    }
}

// Where a chunk's two operands and its result are: of q and k the gradient and the value before the norm, of v the two
// gradients.
template <typename T>
struct Operands {
    const T *a, *b;  // where the lane's first column of row 0 is
    int a_stride, b_stride;
    int place;                      // of the lane's first column in the result's row
    bool exists, reads_a, reads_b;  // zeros where not read
};

template <bool kFull, typename T>
__device__ __forceinline__ Operands<T> operands_of(const QkRopeBackward& p, Chunk chunk, int group, int column) {
    const int head = chunk.first + group;
    const bool query = chunk.kind == Kind::kQuery, value = chunk.kind == Kind::kValue;
    const int before = query ? 0 : value ? p.heads + p.kv_heads : p.heads;
    const bool exists =
        kFull || (chunk.kind != Kind::kNone && head < (query ? p.heads : p.kv_heads) && column < p.head_dim);
    const HeadsGrad& a = query ? p.grad_q : value ? p.grad_v : p.grad_k;
    const HeadsGrad values{static_cast<const T*>(p.qkv) + before * p.head_dim, (p.heads + 2 * p.kv_heads) * p.head_dim};
    const HeadsGrad& b = value ? p.grad_v_self : values;
    const int in_row = head * p.head_dim + column;
    return {.a = static_cast<const T*>(a.data) + in_row,
            .b = static_cast<const T*>(b.data) + in_row,
            .a_stride = a.stride,
            .b_stride = b.stride,
            .place = before * p.head_dim + in_row,
            .exists = exists,
            .reads_a = kFull || (exists && a.data != nullptr),
            .reads_b = kFull || (exists && b.data != nullptr)};
}

// With g = R^T grad, r = 1 / sqrt(mean(x^2) + eps) and x the value before the norm:
//   grad_x = gain * r * (g - x * (g . x) * r^2 / head_dim);  grad_gain = sum over rows of (g . x) * r
// The sums over this block's rows go to scratch[head, block].
template <typename T, int kLanes, bool kWhole, bool kFull>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) qk_rope_backward_kernel(const QkRopeBackward p) {
    constexpr int kHeads = kWarpSize / kLanes;
    constexpr int kSlots = kBackwardSlots<T, kWhole>;
    const int warp = threadIdx.x / kWarpSize;
    const int group = threadIdx.x % kWarpSize / kLanes;
    const int column = threadIdx.x % kLanes * kColumns;
    const int width = (p.heads + 2 * p.kv_heads) * p.head_dim;
    const int first_chunk = kFull ? 0 : blockIdx.y * kSlots;
    const float inverse_dim = 1.0f / p.head_dim;
    T* const grad_qkv = static_cast<T*>(p.grad_qkv);

    Kind kinds[kSlots];
    Operands<T> operands[kSlots];
    float gain[kSlots], gain_sum[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const Chunk chunk = chunk_of<kLanes, kFull>(p, first_chunk + i);
        kinds[i] = chunk.kind;
        operands[i] = operands_of<kFull, T>(p, chunk, group, column);
        gain[i] = chunk.kind == Kind::kQuery && operands[i].exists ? p.gain[chunk.first + group] : 1.0f;
        gain_sum[i] = 0.0f;
    }

    for (Rows at(p); at.row < p.rows; at.advance()) {
        const int64_t row = at.row;
        Eight<T> a[kSlots], b[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const Operands<T>& o = operands[i];
            a[i] = load_eight(o.a + row * o.a_stride, o.reads_a);
            b[i] = load_eight(o.b + row * o.b_stride, o.reads_b);
        }
        Turn<kWhole> turn;
        turn.template load_angles<true>(p, at.position, column);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const Operands<T>& o = operands[i];
            float g[kColumns], x[kColumns];
            unpack(a[i], g);
            unpack(b[i], x);
            if (kinds[i] == Kind::kValue) {
#pragma unroll
                for (int c = 0; c < kColumns; ++c) g[c] += x[c];
            } else {
                turn.apply(g, a[i], o.a + row * o.a_stride - column, o.reads_a, column, p.half);
                float squares = dot_eight(x, x), dot = dot_eight(g, x);
                head_sums<kLanes>(squares, dot);
                const float rstd = rsqrtf(fmaf(squares, inverse_dim, p.eps));
                const float along = dot * rstd;
                const float share = along * rstd * inverse_dim;
                const float scale = gain[i] * rstd;
                gain_sum[i] += along;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) g[c] = scale * fmaf(-share, x[c], g[c]);
            }
            if (o.exists) store_eight(grad_qkv + row * width + o.place, g);
        }
    }

    if (p.scratch == nullptr) return;
    __shared__ float partial[kWarps][kSlots * kHeads];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        if (column == 0) partial[warp][i * kHeads + group] = gain_sum[i];
    }
    __syncthreads();
    if (threadIdx.x >= kSlots * kHeads) return;
    const Chunk chunk = chunk_of<kLanes, kFull>(p, first_chunk + static_cast<int>(threadIdx.x) / kHeads);
    const int head = chunk.first + static_cast<int>(threadIdx.x) % kHeads;
    if (chunk.kind != Kind::kQuery || head >= p.heads) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += partial[w][threadIdx.x];
    p.scratch[static_cast<int64_t>(head) * gridDim.x + blockIdx.x] = sum;
}

// Block h adds up row h of scratch [heads, count].
__global__ void __launch_bounds__(kThreads) qk_rope_finish_kernel(const QkRopeBackward p, int count) {
    const float* const row = p.scratch + static_cast<int64_t>(blockIdx.x) * count;
    CompensatedSum sum{};
    for (int i = threadIdx.x; i < count; i += kThreads) sum.add(row[i]);
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) p.grad_gain[blockIdx.x] = sum.value();
}

int64_t needed_blocks(int64_t rows) { return std::min((rows + kWarps - 1) / kWarps, int64_t{kMaxBlocks}); }

bool has_all_gradients(const QkRopeForward&) { return true; }
bool has_all_gradients(const QkRopeBackward& p) {
    return p.grad_q.data && p.grad_k.data && p.grad_v.data && p.grad_v_self.data;
}

template <typename T, int kLanes, bool kWhole, bool kFull>
void launch(const QkRopeForward& p, dim3 blocks, cudaStream_t stream) {
    constexpr int kHeads = kWarpSize / kLanes;
    blocks.y = chunks_of(chunks_of(p.heads, kHeads) + chunks_of(p.kv_heads, kHeads), kForwardSlots<T, kWhole>);
    qk_rope_forward_kernel<T, kLanes, kWhole, kFull><<<blocks, kThreads, 0, stream>>>(p);
}

template <typename T, int kLanes, bool kWhole, bool kFull>
void launch(const QkRopeBackward& p, dim3 blocks, cudaStream_t stream) {
    constexpr int kHeads = kWarpSize / kLanes;
    blocks.y = chunks_of(chunks_of(p.heads, kHeads) + 2 * chunks_of(p.kv_heads, kHeads), kBackwardSlots<T, kWhole>);
    qk_rope_backward_kernel<T, kLanes, kWhole, kFull><<<blocks, kThreads, 0, stream>>>(p);
}

template <typename T, int kLanes, typename Params>
void launch_for_shape(const Params& p, dim3 blocks, cudaStream_t stream) {
    constexpr bool kHasFull = sizeof(T) < sizeof(float);
    const bool full = p.heads == 2 * p.kv_heads && p.kv_heads == kWarpSize / kLanes &&
                      p.head_dim == kLanes * kColumns && has_all_gradients(p);
    if (p.half % kColumns != 0) {
        launch<T, kLanes, false, false>(p, blocks, stream);
    } else if (kHasFull && full) {
        launch<T, kLanes, true, kHasFull>(p, blocks, stream);
    } else {
        launch<T, kLanes, true, false>(p, blocks, stream);
    }
}

template <typename T, typename Params>
void launch_for_dim(const Params& p, dim3 blocks, cudaStream_t stream) {
    if (p.head_dim <= 8 * kColumns) {
        launch_for_shape<T, 8>(p, blocks, stream);
    } else {
        launch_for_shape<T, 16>(p, blocks, stream);
    }
}

template <typename Params>
void launch_for_dtype(const Params& p, unsigned blocks, cudaStream_t stream, const char* name) {
    switch (p.dtype) {
        case DType::kFloat32:
            launch_for_dim<float>(p, blocks, stream);
            break;
        case DType::kBFloat16:
            launch_for_dim<__nv_bfloat16>(p, blocks, stream);
            break;
        default:
            throw std::runtime_error(std::string(name) + ": dtype: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(p.dtype)));
    }
    check_launch(name);
}

}  // namespace

int64_t qk_rope_scratch(int64_t rows, int64_t heads) { return needed_blocks(rows) * heads; }

void qk_rope_forward(const QkRopeForward& params, cudaStream_t stream) {
    if (params.rows == 0) return;  // an empty grid is an error to CUDA
    const unsigned blocks = filling_blocks(needed_blocks(params.rows), kForwardBlocks<true>, "qk_rope_forward");
    launch_for_dtype(params, blocks, stream, "qk_rope_forward");
}

void qk_rope_backward(const QkRopeBackward& params, cudaStream_t stream) {
    unsigned blocks = 0;
    if (params.rows > 0) {
        blocks = filling_blocks(needed_blocks(params.rows), kBackwardBlocks, "qk_rope_backward");
        launch_for_dtype(params, blocks, stream, "qk_rope_backward");
    }
    if (params.grad_gain == nullptr) return;
    qk_rope_finish_kernel<<<params.heads, kThreads, 0, stream>>>(params, static_cast<int>(blocks));
    check_launch("qk_rope_backward (sums)");
}

}  // namespace pgolf::generic
