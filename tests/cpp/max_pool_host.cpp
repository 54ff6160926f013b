// The max pool kernels, compiled for the host and called through ctypes.
//
//   g++ -DINCEPTION_EXT_EMULATE -shared -fPIC -I $CUDA_HOME/include max_pool_host.cpp
#include <cstdio>

#include "../../csrc/kernels/max_pool.cu"

namespace {

namespace emulator = inception_ext::emulator;
namespace kernels = inception_ext::kernels;

char message[256];

// Returns the cudaError_t, or -1 after a bad access; `last_error` says which.
template <typename Launcher, typename Params>
int run(const Launcher& launcher, const Params& params, const emulator::Region* regions,
        int region_count, uint32_t seed) {
  emulator::State& state = emulator::state();
  state.seed = seed;
  state.launches = 0;
  state.regions.assign(regions, regions + region_count);
  try {
    return launcher(params, nullptr);
  } catch (const std::out_of_range& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return -1;
  }
}

}  // namespace

extern "C" {

int forward(const kernels::MaxPoolForwardParams* params, const emulator::Region* regions,
            int region_count, uint32_t seed) {
  return run(kernels::max_pool_forward, *params, regions, region_count, seed);
}

int backward(const kernels::MaxPoolBackwardParams* params, const emulator::Region* regions,
             int region_count, uint32_t seed) {
  return run(kernels::max_pool_backward, *params, regions, region_count, seed);
}

int64_t launches() { return emulator::state().launches; }
int64_t grid_x() { return emulator::state().grid_dim.x; }
const char* last_error() { return message; }
int64_t forward_params_size() { return sizeof(kernels::MaxPoolForwardParams); }
int64_t backward_params_size() { return sizeof(kernels::MaxPoolBackwardParams); }

}  // extern "C"
