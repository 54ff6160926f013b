// The max pool kernels on the emulator, called through ctypes.
#include <cstdio>

#include "../../csrc/emulator/counters.h"
#include "../../csrc/emulator/global_memory.h"
#include "../../csrc/emulator/report.h"
#include "../../csrc/kernels/max_pool.cu"

namespace {

namespace emulator = inception_ext::emulator;
namespace kernels = inception_ext::kernels;

// Memory that the kernels of a launch may touch: [begin, end).
struct Region {
  char* begin;
  char* end;
};

char message[1024];
std::vector<emulator::LaunchRecord> launches_of_last_run;

// Returns the cudaError_t, or -1 after a bad access; `last_error` says which.
template <typename Launcher, typename Params>
int run(const Launcher& launcher, const Params& params, const Region* regions, int region_count,
        uint32_t seed) {
  std::vector<emulator::Operand> operands;
  for (const Region* region = regions; region != regions + region_count; ++region) {
    operands.push_back({"region " + std::to_string(region - regions),
                        inception_ext::Use::kUpdate,
                        region->begin,
                        1,
                        {region->end - region->begin},
                        {1}});
  }
  emulator::set_settings({.seed = seed, .workers = 1});
  const emulator::Scope scope("max_pool", operands);
  emulator::take_launches();
  try {
    const cudaError_t error = launcher(params, nullptr);
    launches_of_last_run = emulator::take_launches();
    return error;
  } catch (const emulator::Error& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return -1;
  }
}

}  // namespace

extern "C" {

int forward(const kernels::MaxPoolForwardParams* params, const Region* regions, int region_count,
            uint32_t seed) {
  return run(kernels::max_pool_forward, *params, regions, region_count, seed);
}

int backward(const kernels::MaxPoolBackwardParams* params, const Region* regions, int region_count,
             uint32_t seed) {
  return run(kernels::max_pool_backward, *params, regions, region_count, seed);
}

int64_t launches() { return static_cast<int64_t>(launches_of_last_run.size()); }
int64_t grid_x() { return launches_of_last_run.at(0).grid[0]; }
const char* last_error() { return message; }
int64_t forward_params_size() { return sizeof(kernels::MaxPoolForwardParams); }
int64_t backward_params_size() { return sizeof(kernels::MaxPoolBackwardParams); }

}  // extern "C"
