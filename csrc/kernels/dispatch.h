// Which build of the kernels a GPU runs: a pure function of its properties, so that it is tested without the GPU.
#pragma once

namespace pgolf {

// Name of the folder whose kernels run on compute capability `major`.`minor` with `shared_memory` bytes of (opt-in)
// shared memory per block; "none" when there is none.
const char* build_for(int major, int minor, int shared_memory);

}  // namespace pgolf
