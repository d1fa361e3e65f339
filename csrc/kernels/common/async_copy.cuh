// Copies from device to shared memory that run while the thread goes on (cp.async), for any GPU from sm_80.
#pragma once

#include <cstdint>

namespace pgolf {

// Copy 16 bytes to shared memory, or write 16 zero bytes: then `source` is not read and may be anything.
__device__ __forceinline__ void copy16(uint32_t target, const void* source, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

// What this thread has copied since the last call becomes one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `kPending` groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace pgolf
