// Synchronisation beyond what CUDA C++ has a name for. __syncthreads, __syncwarp, the shuffles and
// the votes keep their names; the emulator has twins for them.
#pragma once

#include "platform.cuh"

namespace inception_ext::kernels {

// Named barrier kBarrier (1 to 15; 0 is __syncthreads) of `threads` threads of the block, in whole
// warps. Orders their accesses to shared memory.
template <int kBarrier>
__device__ __forceinline__ void sync_named(int threads, Place place = Place::current()) {
  static_assert(kBarrier >= 1 && kBarrier <= 15);
#ifdef INCEPTION_EXT_EMULATE
  emulator::sync_named(kBarrier, threads, /*wait=*/true, place);
#else
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
#endif
}

// Counts as one of the threads that the barrier waits for, without waiting.
template <int kBarrier>
__device__ __forceinline__ void arrive_named(int threads, Place place = Place::current()) {
  static_assert(kBarrier >= 1 && kBarrier <= 15);
#ifdef INCEPTION_EXT_EMULATE
  emulator::sync_named(kBarrier, threads, /*wait=*/false, place);
#else
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
#endif
}

// In a kernel started by launch_dependent: waits until the kernels before it in the stream have
// written everything. Without programmatic dependent launch that is so from the start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the next kernel of the stream start its blocks; what it waits for is still the end of this.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace inception_ext::kernels
