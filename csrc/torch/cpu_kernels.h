// What every op needs to call the kernels under csrc/cpu.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#include "cpu/dtype.h"
#include "cpu/parallel.h"
#include "torch/checks.h"
#include "torch/no_grad.h"
#include "torch/stable.h"

namespace inception_ext {

// torch's own threads.
inline void torch_threads(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body,
                          void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

// task(i) for i in [0, count), on torch's threads; may call operators, and may throw.
template <typename Task>
void run_tasks(int64_t count, const Task& task) {
  std::exception_ptr error;
  std::mutex error_mutex;
  cpu::parallel_for(torch_threads, 0, count, 1, [&](int64_t first, int64_t last) {
    const NoGrad no_grad;  // a thread has its own mode
    try {
      for (int64_t i = first; i < last; ++i) task(i);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline cpu::DType cpu_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Byte:
      return cpu::DType::kUInt8;
    default:
      return cpu::DType::kFloat32;
  }
}

inline cpu::DType cpu_dtype(const Tensor& x) { return cpu_dtype(x.scalar_type()); }

// An activation of the CPU kernels: [N, C, H, W], float32 or bfloat16.
inline void check_cpu_activation(const Argument& argument) {
  argument.is_dense_of(/*cuda=*/false)
      .has_dim(4)
      .has_dtype({ScalarType::Float, ScalarType::BFloat16});
}

}  // namespace inception_ext
