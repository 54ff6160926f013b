// From what a launcher knows to the template arguments of its kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "device/types.cuh"
#include "params.h"

namespace inception_ext::kernels {

// A type as a value.
template <typename T>
struct Kind {
  using Type = T;
};

// function(Kind<Math>()) of how products are made: Tensor<T> on tensor cores, Scalar<T> on the
// scalar units, which float16 does not know.
template <template <typename> typename Tensor, template <typename> typename Scalar,
          typename Function>
cudaError_t with_math(DType dtype, bool scalar, const Function& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(Kind<Tensor<__half>>());
    case DType::kBFloat16:
      return scalar ? function(Kind<Scalar<__nv_bfloat16>>())
                    : function(Kind<Tensor<__nv_bfloat16>>());
    case DType::kFloat32:
      return scalar ? function(Kind<Scalar<float>>()) : function(Kind<Tensor<float>>());
  }
  return cudaErrorInvalidValue;
}

// function(std::integral_constant<int, shape>()) of an index of kTileShapes, from kFirstShape on.
template <int kFirstShape, typename Function>
cudaError_t with_shape(int32_t shape, const Function& function) {
  switch (shape) {
    case 0:
      if constexpr (kFirstShape > 0) return cudaErrorNotSupported;
      return function(std::integral_constant<int, kFirstShape>());
    case 1:
      return function(std::integral_constant<int, 1>());
    default:
      return function(std::integral_constant<int, 2>());
  }
}

}  // namespace inception_ext::kernels
