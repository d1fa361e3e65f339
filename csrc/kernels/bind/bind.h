// What the bindings share: integers in (pointers, sizes, stream), exceptions out. Shapes, types and devices are checked
// in pgolf/ops, which knows tensors; nothing here does.
#pragma once

#include <pybind11/pybind11.h>

#include "common/check.h"
#include "ops.h"

namespace pgolf {

namespace py = pybind11;
using namespace py::literals;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The stream to launch on, after making its device current for this module's copy of the CUDA runtime.
inline cudaStream_t enter(int device, uintptr_t stream) {
    check(cudaSetDevice(device), "set device");
    return reinterpret_cast<cudaStream_t>(stream);
}

// The same with the build and the shared memory that Python chose (pgolf/ops/_native.py, `target`).
inline Target enter(int device, uintptr_t stream, int build, int shared_memory) {
    return {static_cast<Build>(build), shared_memory, enter(device, stream)};
}

}  // namespace pgolf
