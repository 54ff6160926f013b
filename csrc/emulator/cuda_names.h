// CUDA C++ for a host compiler: the keywords, built-in variables and intrinsics that kernels use
// by the names that nvcc gives them.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <atomic>
#include <cstring>

#include "device.h"

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__  // stays undefined: device/shared.cuh hands out shared memory that is checked
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)

#define threadIdx (::inception_ext::emulator::thread_index())
#define blockIdx (::inception_ext::emulator::block_index())
#define blockDim (::inception_ext::emulator::block_extent())
#define gridDim (::inception_ext::emulator::grid_extent())

inline void __syncthreads(
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  inception_ext::emulator::sync_block(place);
}

inline void __syncwarp(
    unsigned mask = inception_ext::emulator::kFullWarp,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  inception_ext::emulator::sync_warp(mask, place);
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

namespace inception_ext::emulator {

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int lane, int width, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, lane, width, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace inception_ext::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  using inception_ext::emulator::Shuffle;
  return shuffle_value(Shuffle::kIndex, mask, value, lane, width, place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  using inception_ext::emulator::Shuffle;
  return shuffle_value(Shuffle::kUp, mask, value, static_cast<int>(delta), width, place);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  using inception_ext::emulator::Shuffle;
  return shuffle_value(Shuffle::kDown, mask, value, static_cast<int>(delta), width, place);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask, int width = 32,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  using inception_ext::emulator::Shuffle;
  return shuffle_value(Shuffle::kXor, mask, value, lane_mask, width, place);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  return inception_ext::emulator::ballot(mask, predicate != 0, place);
}

inline int __any_sync(
    unsigned mask, int predicate,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  return inception_ext::emulator::ballot(mask, predicate != 0, place) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate,
    inception_ext::emulator::Place place = inception_ext::emulator::Place::current()) {
  return inception_ext::emulator::ballot(mask, predicate == 0, place) == 0;
}
