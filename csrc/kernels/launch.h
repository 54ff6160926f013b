// The one way to start a kernel: launch attributes, the error check and the emulator come in here.
//
//   return launch(kernel, grid, block, shared_bytes, stream, params, rows);
//
// Only kernel sources (.cu) include this file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/platform.cuh"
#ifdef INCEPTION_EXT_EMULATE
#include "../emulator/launch.h"
#endif

namespace inception_ext::kernels {

// What the current device has, where it decides which kernel runs and in what tiles.
struct DeviceLimits {
  int capability;       // 75, 80, 90 and so on
  int multiprocessors;  // 132 on an H100
  int shared_bytes;     // of shared memory that one block may use
};

#ifdef INCEPTION_EXT_EMULATE

inline cudaError_t device_limits(DeviceLimits& limits) {
  const emulator::Settings settings = emulator::settings();
  limits = {settings.capability, settings.multiprocessors, static_cast<int>(settings.shared_limit)};
  return cudaSuccess;
}

using emulator::launch;
using emulator::launch_dependent;
using emulator::note_useful_macs;

#else

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.capability = 10 * major + minor;
  return error;
}

namespace detail {

// Dynamic shared memory that a kernel may use without opting in.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Programmatic dependent launch exists from compute capability 9.0 on.
inline bool has_dependent_launch() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

template <typename... Params, typename... Args>
cudaError_t launch(bool dependent, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent && has_dependent_launch() ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
  }
  // The error is the caller's to report: left behind, the next call of somebody else would find it.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace detail

// Multiply-accumulates that the result of the next launch needs; the emulator sets them against
// those that the kernel issues.
inline void note_useful_macs(int64_t /*macs*/) {}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  return detail::launch(false, kernel, grid, block, shared_bytes, stream,
                        static_cast<Args&&>(args)...);
}

// As launch, and where the device has it (sm_90 and later) with programmatic dependent launch: the
// blocks may start while the previous kernel of the stream still runs. Only for kernels in which
// every thread calls cudaGridDependencySynchronize() before it touches memory that another kernel
// writes or reads.
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, Args&&... args) {
  return detail::launch(true, kernel, grid, block, shared_bytes, stream,
                        static_cast<Args&&>(args)...);
}

#endif

}  // namespace inception_ext::kernels
