// What stands around every CUDA launch: the device guard, the stream, the error check; on the
// emulator the tensors that the kernels are held to.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "emulator/use.h"
#include "torch/checks.h"

#ifdef INCEPTION_EXT_EMULATE

#include "emulator/global_memory.h"

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch/stable.h"

// Only a CUDA torch has this symbol; weak, so that the same file loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

#endif

namespace inception_ext {

// Makes a tensor's device the current one.
class OnDeviceOf {
 public:
#ifdef INCEPTION_EXT_EMULATE
  explicit OnDeviceOf(const Tensor&) {}
#else
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A tensor that an op's kernels get, all of it that they may touch.
struct Operand {
  const char* name;
  const Tensor& tensor;
  Use use;
};

// Calls launch(stream), which starts kernels and returns a cudaError_t, with the device of the
// first operand current. The operands are every tensor that the kernels touch; the emulator reports
// an access to anything else and, once launch has returned, what Use::kWrite promised and nobody
// wrote.
template <typename Launch>
void launch_kernels(const char* op, const std::vector<Operand>& operands, const Launch& launch) {
#ifdef INCEPTION_EXT_EMULATE
  std::vector<emulator::Operand> declared;
  for (const auto& [name, tensor, use] : operands) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    declared.push_back({name,
                        use,
                        tensor.data_ptr(),
                        static_cast<int64_t>(tensor.element_size()),
                        {sizes.begin(), sizes.end()},
                        {strides.begin(), strides.end()}});
  }
  const emulator::Scope scope(op, declared);
  const cudaError_t error = launch(cudaStream_t{nullptr});
  if (error != cudaSuccess) fail(op, "launch", "cudaError_t ", static_cast<int>(error));
  scope.check_complete();
#else
  const int32_t device = operands.front().tensor.get_device_index();
  const OnDeviceOf guard(operands.front().tensor);
  if (!aoti_torch_get_current_cuda_stream) {
    fail(op, "device", "expected a torch with CUDA, got one without");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  fail(op, "launch", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
       error == cudaErrorNoKernelImageForDevice
           ? " (the binary has no code for this device: see python -m inception_ext info)"
           : "");
#endif
}

}  // namespace inception_ext
