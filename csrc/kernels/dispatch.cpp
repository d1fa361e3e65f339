#include "dispatch.h"

namespace pgolf {

const char* build_for(int major, int /*minor*/, int shared_memory) {
    // bfloat16 arithmetic starts with sm_80; the generic kernels assume no more than the 48 KiB every GPU grants.
    constexpr int kGenericSharedMemory = 48 * 1024;
    if (major >= 8 && shared_memory >= kGenericSharedMemory) return "generic";
    return "none";
}

}  // namespace pgolf
