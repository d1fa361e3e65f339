// GPTQ for any GPU from sm_80. Rows never meet, so a block owns kRows rows of one matrix from the first column to the
// last and one launch solves the whole batch without any synchronization between blocks.
//
// Columns are taken kTile at a time. A tile's weights live in registers from their first correction to their rounding:
// kLanes threads share a row, lane l holding columns l, l + kLanes, ... of the tile. First come the corrections by all
// tiles before it, whose errors are read back from scratch by the very thread that wrote them; then the tile itself,
// column by column. Either way an error reaches the other lanes of its row by a shuffle and meets a row of U in shared
// memory.
#include <stdexcept>

#include "common/check.h"
#include "common/reduce.cuh"
#include "ops/gptq.h"

namespace pgolf::generic {
namespace {

constexpr int kRows = 16;    // rows a block
constexpr int kLanes = 8;    // threads a row
constexpr int kColumns = 8;  // columns a thread
constexpr int kTile = kLanes * kColumns;
constexpr int kThreads = kRows * kLanes;
static_assert(kWarpSize % kLanes == 0, "a row within a warp");

using Tile = double[kTile][kTile];

// The integer that stands for `w`: halves go to the even one, as torch.round does.
__device__ __forceinline__ double choose_level(double w, double scale, double limit) {
    return fmin(fmax(rint(w / scale), -limit), limit);
}

// Copy U[from : from + kTile, first : first + kTile] to shared memory, zeros beyond the matrix.
__device__ __forceinline__ void stage(Tile& u, const double* factor, int from, int first, int cols) {
    __syncthreads();  // every warp is done with the tile before
#pragma unroll 16
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
        const int row = from + i / kTile;
        const int column = first + i % kTile;
        const bool inside = row < cols && column < cols;
        u[i / kTile][i % kTile] = inside ? factor[static_cast<int64_t>(row) * cols + column] : 0.0;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads) gptq_kernel(const Gptq p, int64_t blocks_per_matrix) {
    __shared__ Tile u;
    const int lane = threadIdx.x % kLanes;
    const int64_t matrix = blockIdx.x / blocks_per_matrix;
    const int64_t row = blockIdx.x % blocks_per_matrix * kRows + threadIdx.x / kLanes;
    const bool has_row = row < p.rows;  // other threads compute on zeros: barriers and shuffles need them
    const int64_t offset = (matrix * p.rows + row) * p.cols;
    const double* const factor = p.factor + matrix * p.cols * p.cols;

    for (int first = 0; first < p.cols; first += kTile) {
        double w[kColumns];
        float scale[kColumns], limit[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = first + i * kLanes + lane;
            const bool inside = has_row && column < p.cols;
            w[i] = inside ? p.weight[offset + column] : 0.0;
            // Limited to the groups there are: a wrong index must not read beyond them.
            const int64_t group = inside ? min(int{p.group[matrix * p.cols + column]}, p.groups - 1) : 0;
            scale[i] = inside ? p.scale[(group * p.matrices + matrix) * p.rows + row] : 1.0f;
            limit[i] = static_cast<float>(p.limit[group * p.matrices + matrix]);
        }

        for (int from = 0; from < first; from += kTile) {
            double error[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) error[i] = has_row ? p.errors[offset + from + i * kLanes + lane] : 0.0;
            stage(u, factor, from, first, p.cols);
#pragma unroll
            for (int s = 0; s < kColumns; ++s) {
#pragma unroll
                for (int t = 0; t < kLanes; ++t) {
                    const double e = __shfl_sync(kAllLanes, error[s], t, kLanes);
#pragma unroll
                    for (int i = 0; i < kColumns; ++i) {
                        w[i] = fma(-e, u[s * kLanes + t][i * kLanes + lane], w[i]);
                    }
                }
            }
        }

        stage(u, factor, first, first, p.cols);
        int q[kColumns];
#pragma unroll
        for (int s = 0; s < kColumns; ++s) {
            const double pivot = u[s * kLanes + lane][s * kLanes + lane];
#pragma unroll 1
            for (int t = 0; t < kLanes; ++t) {
                // Every lane rounds its own column, and the one whose turn it is tells the others.
                const double level = choose_level(w[s], scale[s], limit[s]);
                const double error = (w[s] - level * scale[s]) / pivot;
                const double e = __shfl_sync(kAllLanes, error, t, kLanes);
                const double (&u_row)[kTile] = u[s * kLanes + t];
                if (lane == t) {
                    q[s] = static_cast<int>(level);
                    w[s] = e;  // from here on the column's error
                } else if (lane > t) {
                    w[s] = fma(-e, u_row[s * kLanes + lane], w[s]);
                }
#pragma unroll
                for (int i = s + 1; i < kColumns; ++i) w[i] = fma(-e, u_row[i * kLanes + lane], w[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = first + i * kLanes + lane;
            if (has_row && column < p.cols) {
                p.q[offset + column] = static_cast<int8_t>(q[i]);
                p.errors[offset + column] = w[i];
            }
        }
    }
}

}  // namespace

void gptq(const Gptq& params, cudaStream_t stream) {
    if (params.matrices == 0 || params.rows == 0 || params.cols == 0) return;  // an empty grid is an error to CUDA
    const int64_t blocks_per_matrix = (params.rows + kRows - 1) / kRows;
    const int64_t blocks = params.matrices * blocks_per_matrix;
    if (blocks > INT32_MAX) throw std::runtime_error("gptq: weight: more rows than a launch has blocks for");
    gptq_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, blocks_per_matrix);
    check_launch("gptq");
}

}  // namespace pgolf::generic
