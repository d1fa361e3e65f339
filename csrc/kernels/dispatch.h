// Which build of the kernels a GPU runs: pure functions of its properties, so that they are tested without the GPU.
#pragma once

#include "ops.h"

namespace pgolf {

// The build for compute capability `major`.`minor` with `shared_memory` bytes of (opt-in) shared memory per block.
Build build_for(int major, int minor, int shared_memory);

// The folder's name, or "none".
const char* name_of(Build build);

}  // namespace pgolf
