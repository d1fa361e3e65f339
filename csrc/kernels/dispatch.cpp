#include "dispatch.h"

namespace pgolf {
namespace {

// What the smallest tiles of the generic kernels take; every GPU from sm_80 grants it (sm_86, sm_89, sm_120: 99 KiB).
constexpr int kGenericSharedMemory = 96 * 1024;
#ifdef PGOLF_SM90
// What the wgmma kernels take: a Hopper GPU grants 227 KiB.
constexpr int kSm90SharedMemory = 227 * 1024;
#endif

}  // namespace

Build build_for(int major, [[maybe_unused]] int minor, int shared_memory) {
#ifdef PGOLF_SM90
    // wgmma exists on 9.0 alone: sm_90a code runs on no other version.
    if (major == 9 && minor == 0 && shared_memory >= kSm90SharedMemory) return Build::kSm90;
#endif
    // bfloat16 arithmetic starts with sm_80.
    if (major >= 8 && shared_memory >= kGenericSharedMemory) return Build::kGeneric;
    return Build::kNone;
}

const char* name_of(Build build) {
    switch (build) {
        case Build::kGeneric:
            return "generic";
        case Build::kSm90:
            return "sm90";
        case Build::kNone:
            break;
    }
    return "none";
}

}  // namespace pgolf
