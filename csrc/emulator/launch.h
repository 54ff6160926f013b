// Starting a kernel on the emulator: what csrc/kernels/launch.h becomes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "place.h"

namespace inception_ext::emulator {

// For the whole process.
struct Settings {
  uint64_t seed = 0;     // of the order in which blocks, warps and lanes take turns
  bool checks = true;    // races, bounds, alignment, unwritten values
  bool counting = true;  // LaunchRecords
  int workers = 0;       // host threads; 0: one a core
  // Of the device, here an H100.
  int capability = 90;
  int multiprocessors = 132;
  size_t shared_limit = 227 << 10;  // bytes a block
};
Settings settings();
void set_settings(const Settings& settings);

// A grid, and where the launch stands in the source.
struct GridAt {
  GridAt(dim3 grid, Place place = Place::current()) : grid(grid), place(place) {}
  dim3 grid;
  Place place;
};

// Multiply-accumulates that the result of this host thread's next launch needs.
void note_useful_macs(int64_t macs);

// Runs all blocks. cudaErrorInvalidConfiguration: a grid, a block or an amount of shared memory
// that no device takes. Throws Error where a check fails.
cudaError_t run_kernel(const void* kernel, const GridAt& grid, dim3 block, size_t shared_bytes,
                       void (*body)(const void*), const void* arguments);

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), GridAt grid, dim3 block, size_t shared_bytes,
                   cudaStream_t /*stream*/, const Args&... args) {
  const std::tuple<void (*)(Params...), const Args&...> call(kernel, args...);
  const auto body = [](const void* arguments) {
    std::apply([](const auto& kernel, const auto&... args) { kernel(args...); },
               *static_cast<const std::tuple<void (*)(Params...), const Args&...>*>(arguments));
  };
  return run_kernel(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call);
}

template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), GridAt grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  return launch(kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace inception_ext::emulator
