// Count, mean and sum of squared deviations of a set of values, merged by Chan's formula (Chan,
// Golub and LeVeque 1979): no difference of large squares, whatever the mean.
#pragma once

#include "platform.cuh"

namespace inception_ext::kernels {

struct Moments {
  float count = 0;
  float mean = 0;
  float m2 = 0;  // sum of (value - mean)^2

  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    const float share = total > 0 ? other.count / total : 0.0f;
    const float delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

}  // namespace inception_ext::kernels
