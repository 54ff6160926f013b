// The device guard, the stream and the error check around every CUDA launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch/checks.h"
#include "torch/stable.h"

// Only a CUDA torch has this symbol; weak, so that the same file loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace inception_ext {

// The device of one op's tensors made current, and its current stream.
class CudaLaunch {
 public:
  CudaLaunch(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()) {
    if (!aoti_torch_get_current_cuda_stream) {
      fail(op, "device", "expected a torch with CUDA, got one without");
    }
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    fail(op_, "launch", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
         error == cudaErrorNoKernelImageForDevice
             ? " (the binary has no code for this device: see python -m inception_ext info)"
             : "");
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace inception_ext
