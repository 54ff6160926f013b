// What every op needs to call the kernels under csrc/cpu.
#pragma once

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

inline cpu::DType cpu_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Byte:
      return cpu::DType::kUInt8;
    default:
      return cpu::DType::kFloat32;
  }
}

}  // namespace inception_ext
