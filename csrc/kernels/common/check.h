// CUDA status codes become exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace pgolf {

// Throw std::runtime_error naming `what` unless `status` is success.
inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                                 cudaGetErrorString(status));
    }
}

// Throw when the launch just made was refused. Errors inside a kernel surface at the next synchronization.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

}  // namespace pgolf
