// cp.async: copies from global to shared memory that run while the thread goes on (sm_80 and
// later). On sm_75 the same calls copy at once.
//
//   copy_async<16>(shared, global, valid);  // any number of copies
//   commit_copies();                        // ... make one group
//   wait_copies<1>();                       // all groups but the newest are there
//   __syncthreads();                        // and for the other threads too
#pragma once

#include "platform.cuh"
#include "shared.cuh"

namespace inception_ext::kernels {

// kBytes (4, 8 or 16) of shared memory become the first `valid` bytes at `global`, then zeros.
// Both pointers are aligned to kBytes; `global` is not read where `valid` is 0. kKeep: in the L1
// cache too, for what the block will read again; else 16 bytes go past it.
template <int kBytes, bool kKeep = false>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes,
                                           Place place = Place::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef INCEPTION_EXT_EMULATE
  emulator::copy_async(shared, global, kBytes, valid, place);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  char* to = static_cast<char*>(shared);
  const char* from = static_cast<const char*>(global);
  if (valid == kBytes) {
    *reinterpret_cast<Vector<char, kBytes>*>(to) =
        *reinterpret_cast<const Vector<char, kBytes>*>(from);
  } else {
    for (int i = 0; i < kBytes; ++i) to[i] = i < valid ? from[i] : 0;
  }
#else
  const uint32_t address = shared_address(shared);
  if constexpr (kBytes == 16 && !kKeep) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
#endif
}

// The thread's copies since the last commit become a group.
__device__ __forceinline__ void commit_copies() {
#ifdef INCEPTION_EXT_EMULATE
  emulator::commit_copies();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest kPending of the thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#ifdef INCEPTION_EXT_EMULATE
  emulator::wait_copies(kPending);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace inception_ext::kernels
