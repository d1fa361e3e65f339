// What every operator shares: element types, builds, and where a launch goes. One header an operator is in ops/.
//
// Launch functions never allocate and never synchronize: the caller owns all memory, scratch included. They work on
// the given stream of the current device and throw std::runtime_error when the launch fails. Tensors are contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

// Which folder's kernels run: generic/ (any GPU from sm_80) or sm90/ (TMA and wgmma), where an operator has such a
// file.
enum class Build : int { kNone = 0, kGeneric = 1, kSm90 = 2 };

// Where a launch goes.
struct Target {
    Build build;
    int shared_memory;  // bytes a block may use (opt-in): generic kernels choose their tiles by it
    cudaStream_t stream;
};

}  // namespace pgolf
