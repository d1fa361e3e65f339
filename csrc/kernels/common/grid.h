// How many blocks a kernel gets that walks its work.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"

namespace pgolf {

// Blocks that fill the current device `per_processor` to a multiprocessor, but no more than `needed`.
inline unsigned filling_blocks(int64_t needed, int per_processor, const char* what) {
    int device = 0, processors = 0;
    check(cudaGetDevice(&device), what);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
    return static_cast<unsigned>(std::min(needed, int64_t{processors} * per_processor));
}

}  // namespace pgolf
