// The second step of sums over rows: adding up what the blocks of a walk (rows.cuh) have written.
#include "generic/rows.cuh"

namespace pgolf::generic {
namespace {

constexpr int kWidth = 32;   // columns of a block
constexpr int kStrips = 16;  // its threads a column

__global__ void __launch_bounds__(kWidth* kStrips)
    sum_blocks_kernel(const float* partial, int blocks, int stride, int width, float* out) {
    __shared__ CompensatedSum strips[kStrips][kWidth];
    const int lane = threadIdx.x % kWidth;
    const int strip = threadIdx.x / kWidth;
    const int column = blockIdx.x * kWidth + lane;
    CompensatedSum sum{};
    if (column < width) {
#pragma unroll 8
        for (int block = strip; block < blocks; block += kStrips) {
            sum.add(partial[static_cast<int64_t>(block) * stride + column]);
        }
    }
    strips[strip][lane] = sum;
    __syncthreads();
    if (strip > 0 || column >= width) return;
#pragma unroll
    for (int i = 1; i < kStrips; ++i) sum.add(strips[i][lane]);
    out[column] = sum.value();
}

}  // namespace

void sum_blocks(const float* partial, int blocks, int width, float* out, cudaStream_t stream, const char* what) {
    const int grid = (width + kWidth - 1) / kWidth;
    sum_blocks_kernel<<<grid, kWidth * kStrips, 0, stream>>>(partial, blocks, sums_stride(width), width, out);
    check_launch(what);
}

}  // namespace pgolf::generic
