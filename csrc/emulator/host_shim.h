// Runs kernels on the host: the emulator's seed, for kernels without shared memory or barriers.
//
// device/platform.cuh includes it in place of the CUDA runtime when INCEPTION_EXT_EMULATE is
// defined. The blocks of a launch, and the threads of a block, run one after another in an order
// drawn from `seed`, so that a result that depends on the order shows. Every access that goes
// through check_access has to be aligned to its size and lie in one of `regions`.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)

namespace inception_ext::emulator {

// Memory that the kernels of a launch may touch: [begin, end).
struct Region {
  uintptr_t begin;
  uintptr_t end;
};

struct State {
  uint32_t seed = 0;
  std::vector<Region> regions;
  int64_t launches = 0;
  dim3 grid_dim;
  dim3 block_dim;
  uint3 block_index = {};
  uint3 thread_index = {};
};

inline State& state() {
  static thread_local State instance;
  return instance;
}

inline std::vector<int64_t> random_order(int64_t count, std::mt19937& random) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

inline uint3 unravel(int64_t index, const dim3& extent) {
  return {static_cast<unsigned>(index % extent.x),
          static_cast<unsigned>(index / extent.x % extent.y),
          static_cast<unsigned>(index / extent.x / extent.y)};
}

// As kernels::launch; throws std::out_of_range on a bad access.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t /*stream*/, const Args&... args) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64 || shared_bytes != 0) {
    return cudaErrorInvalidConfiguration;
  }
  State& current = state();
  current.launches += 1;
  current.grid_dim = grid;
  current.block_dim = block;
  std::mt19937 random(current.seed);
  for (const int64_t block_id : random_order(blocks, random)) {
    current.block_index = unravel(block_id, grid);
    for (const int64_t thread_id : random_order(threads, random)) {
      current.thread_index = unravel(thread_id, block);
      kernel(args...);
    }
  }
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  return launch(kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace inception_ext::emulator

namespace inception_ext::kernels {

inline void check_access(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  if (begin % bytes != 0) {
    throw std::out_of_range(std::to_string(bytes) + " bytes at a misaligned address");
  }
  for (const emulator::Region& region : emulator::state().regions) {
    if (begin >= region.begin && begin + bytes <= region.end) return;
  }
  throw std::out_of_range(std::to_string(bytes) + " bytes outside every tensor of the launch");
}

}  // namespace inception_ext::kernels

#define threadIdx (::inception_ext::emulator::state().thread_index)
#define blockIdx (::inception_ext::emulator::state().block_index)
#define blockDim (::inception_ext::emulator::state().block_dim)
#define gridDim (::inception_ext::emulator::state().grid_dim)
