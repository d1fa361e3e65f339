// Muon's direction for any GPU from sm_80: two kernels bound by memory (momentum and rows; the scale of the whole
// matrix and its transpose), then the products of the iteration with PyTorch's roundings in their epilogue.
#include "common/check.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "generic/gemm.cuh"
#include "ops/polar_express.h"

namespace pgolf::generic {
namespace {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// --- Momentum and rows
// ------------------------------------------------------------------------------------------------

constexpr int kVector = 8;  // values of a row that a lane takes at once
constexpr int kWarps = 8;   // a row each
constexpr int kRowThreads = kWarps * kWarpSize;

// Eight values as two loads where one would have to be aligned to 32 bytes.
__device__ __forceinline__ void load_vector(const float* source, float (&x)[kVector]) {
    const float4 low = *reinterpret_cast<const float4*>(source);
    const float4 high = *reinterpret_cast<const float4*>(source + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void load_vector(const bf16* source, float (&x)[kVector]) { load<kVector>(source, x); }

// A warp a row, of at most kVectors * 256 values, which stay in registers between their norm and their division.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    momentum_kernel(const T* grad, bf16* momentum, bf16* normalized, float* squares, int64_t rows, int cols, float mu,
                    float lookahead, float floor) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (row >= rows) return;
    const int64_t start = row * cols;

    Packed<bf16, kVector> u[kVectors];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = (v * kWarpSize + lane) * kVector;
        if (column >= cols) continue;
        float g[kVector], m[kVector];
        load_vector(grad + start + column, g);
        load_vector(momentum + start + column, m);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            g[i] = rounded(g[i]);
            m[i] = rounded(rounded(mu * m[i]) + g[i]);
            u[v].value[i] = __float2bfloat16_rn(fmaf(lookahead, m[i], g[i]));
            const float x = to_float(u[v].value[i]);
            sum = fmaf(x, x, sum);
        }
        store<kVector>(momentum + start + column, m);
    }
    float norm = rounded(sqrtf(warp_sum(sum)));
    if (norm < floor) norm = rounded(floor);  // a NaN stays

    sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = (v * kWarpSize + lane) * kVector;
        if (column >= cols) continue;
        float x[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            x[i] = rounded(to_float(u[v].value[i]) / norm);
            sum = fmaf(x[i], x[i], sum);
        }
        store<kVector>(normalized + start + column, x);
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[row] = sum;
}

template <typename T>
void launch_momentum(const PolarExpress& p, void* normalized, float* squares, cudaStream_t stream) {
    const int64_t rows = static_cast<int64_t>(p.batch) * p.rows;
    const auto kernel = p.cols <= 2 * kVector * kWarpSize   ? momentum_kernel<T, 2>
                        : p.cols <= 8 * kVector * kWarpSize ? momentum_kernel<T, 8>
                                                            : momentum_kernel<T, 16>;
    static_assert(16 * kVector * kWarpSize == kPolarExpressCols);
    kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kRowThreads, 0, stream>>>(
        static_cast<const T*>(p.grad), static_cast<bf16*>(p.momentum), static_cast<bf16*>(normalized), squares, rows,
        p.cols, p.mu, p.lookahead, p.floor);
    check_launch("polar_express (momentum)");
}

// --- Scale and transpose
// ----------------------------------------------------------------------------------------------

constexpr int kScaleTile = 64;
constexpr int kScaleThreads = 256;
constexpr int kTileVectors = kScaleTile / kVector;
// Odd in words of two values: rows start in different banks.
constexpr int kPitch = kScaleTile + 2;

// x over (its Frobenius norm + floor) in place, and its transpose. Every block adds up the sums of squares by itself,
// in the same order.
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(bf16* x, bf16* transposed, const float* squares, int rows, int cols, float floor) {
    __shared__ float shared_divisor;
    __shared__ alignas(4) bf16 tile[kScaleTile * kPitch];
    const int thread = threadIdx.x;
    const int first_row = blockIdx.y * kScaleTile;
    const int first_col = blockIdx.x * kScaleTile;
    const int64_t matrix = static_cast<int64_t>(blockIdx.z) * rows * cols;
    x += matrix;
    transposed += matrix;
    squares += static_cast<int64_t>(blockIdx.z) * rows;

    float sum = 0.0f;
    for (int i = thread; i < rows; i += kScaleThreads) sum += squares[i];
    sum = block_sum<kScaleThreads>(sum);
    if (thread == 0) shared_divisor = rounded(rounded(sqrtf(sum)) + floor);
    __syncthreads();
    const float divisor = shared_divisor;

#pragma unroll
    for (int i = thread; i < kScaleTile * kTileVectors; i += kScaleThreads) {
        const int row = i / kTileVectors, col = i % kTileVectors * kVector;
        if (first_row + row >= rows || first_col + col >= cols) continue;
        bf16* const place = x + static_cast<int64_t>(first_row + row) * cols + first_col + col;
        float value[kVector];
        load<kVector>(place, value);
#pragma unroll
        for (int j = 0; j < kVector; ++j) value[j] = rounded(value[j] / divisor);
        store<kVector>(place, value);
#pragma unroll
        for (int j = 0; j < kVector; j += 2) {
            const float pair[2] = {value[j], value[j + 1]};
            store<2>(tile + row * kPitch + col + j, pair);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = thread; i < kScaleTile * kTileVectors; i += kScaleThreads) {
        const int col = i / kTileVectors, row = i % kTileVectors * kVector;
        if (first_row + row >= rows || first_col + col >= cols) continue;
        Packed<bf16, kVector> packed;
#pragma unroll
        for (int j = 0; j < kVector; ++j) packed.value[j] = tile[(row + j) * kPitch + col];
        *reinterpret_cast<Packed<bf16, kVector>*>(transposed + static_cast<int64_t>(first_col + col) * rows +
                                                  first_row + row) = packed;
    }
}

// --- Products
// ---------------------------------------------------------------------------------------------------------

constexpr int kTile = kLargeGemmTile.m;
static_assert(kLargeGemmTile.n == kTile && kSmallGemmTile.m == kTile && kSmallGemmTile.n == kTile);

struct ProductEpilogue {
    PolarExpressProduct p;

    __device__ __forceinline__ void operator()(int batch, int64_t row, int col, float (&x)[8]) const {
        if (row >= p.rows || col >= p.cols) return;  // p.cols is a multiple of 8
        const int64_t matrix = static_cast<int64_t>(batch) * p.rows * p.cols;
        const int64_t offset = matrix + row * p.cols + col;
        if (p.source != nullptr) {
            float source[8];
            load<8>(static_cast<const bf16*>(p.source) + offset, source);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[i] = rounded(p.source_scale * source[i]) + rounded(p.product_scale * rounded(x[i]));
            }
        }
        if (p.out != nullptr) store<8>(static_cast<bf16*>(p.out) + offset, x);
        // A tile on the diagonal is its own mirror.
        if (p.transposed == nullptr || (p.symmetric && row / kTile == col / kTile)) return;
        bf16* const mirror = static_cast<bf16*>(p.transposed) + matrix + row;
#pragma unroll
        for (int i = 0; i < 8; ++i) mirror[static_cast<int64_t>(col + i) * p.rows] = __float2bfloat16_rn(x[i]);
    }
};

}  // namespace

void polar_express_prepare(const PolarExpress& p, const PolarExpressBuffers& b, cudaStream_t stream) {
    if (p.cols > kPolarExpressCols) throw std::runtime_error("polar_express: more columns than kPolarExpressCols");
    const bool tall = p.rows > p.cols;
    // In the orientation of grad: x, or its transpose when tall.
    bf16* const straight = static_cast<bf16*>(tall ? b.transposed[0] : b.x);
    bf16* const other = static_cast<bf16*>(tall ? b.x : b.transposed[0]);
    switch (p.grad_type) {
        case DType::kFloat32:
            launch_momentum<float>(p, straight, b.squares, stream);
            break;
        case DType::kBFloat16:
            launch_momentum<bf16>(p, straight, b.squares, stream);
            break;
        default:
            throw std::runtime_error("polar_express: grad_type: expected 0 (float32) or 1 (bfloat16), got " +
                                     std::to_string(static_cast<int>(p.grad_type)));
    }
    const auto tiles = [](int size) { return static_cast<unsigned>((size + kScaleTile - 1) / kScaleTile); };
    const dim3 grid(tiles(p.cols), tiles(p.rows), static_cast<unsigned>(p.batch));
    scale_kernel<<<grid, kScaleThreads, 0, stream>>>(straight, other, b.squares, p.rows, p.cols, p.floor);
    check_launch("polar_express (scale)");
}

void polar_express(const PolarExpress& params, const Target& target) {
    if (params.batch == 0 || params.rows == 0 || params.cols == 0) return;
    const PolarExpressBuffers buffers = polar_express_buffers(params);
    polar_express_prepare(params, buffers, target.stream);
    polar_express_steps(params, buffers, [&](const PolarExpressProduct& p) {
        const GemmShape shape{.a = p.left,
                              .b = p.right,
                              .m = p.rows,
                              .n = p.cols,
                              .k = p.depth,
                              .row_a = p.depth,
                              .row_b = p.depth,
                              .batch = params.batch,
                              .matrix_a = static_cast<int64_t>(p.rows) * p.depth,
                              .matrix_b = static_cast<int64_t>(p.cols) * p.depth};
        if (p.symmetric) {
            launch_gemm(shape, ProductEpilogue{p}, target, "polar_express", UpperTiles{});
        } else {
            launch_gemm(shape, ProductEpilogue{p}, target, "polar_express");
        }
    });
}

}  // namespace pgolf::generic
