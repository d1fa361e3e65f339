// Tensor maps: what the copy engine knows of a matrix in global memory and of the boxes it moves.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"

namespace pgolf::sm90 {

// cuTensorMapEncodeTiled, looked up at run time: the module links no driver library, so it loads without a GPU.
inline auto tensor_map_encoder() {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
              "tensor map");
        if (found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("tensor map: the driver is older than CUDA 12");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encode;
}

// Map of `batch` row-major bfloat16 matrices [rows, cols], one after the other, moved in boxes of box_rows x 64 values
// (128-byte rows with the 128-byte swizzle). Boxes that reach outside a matrix read zeros and drop what is written.
// `data` is 16-byte aligned and cols a multiple of 8. Coordinates: (col, row) or, with batch > 0, (col, row, matrix).
inline CUtensorMap tensor_map(const void* data, int64_t rows, int64_t cols, int box_rows, int64_t batch = 0) {
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(batch)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(cols) * 2, static_cast<cuuint64_t>(rows * cols) * 2};
    const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t steps[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult status =
        tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, batch > 0 ? 3 : 2, const_cast<void*>(data), sizes,
                             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("tensor map of [" + std::to_string(rows) + ", " + std::to_string(cols) +
                                 "]: CUDA driver error " + std::to_string(static_cast<int>(status)));
    }
    return map;
}

}  // namespace pgolf::sm90
