#pragma once

#include <cstdint>

namespace inception_ext::cpu {

enum class DType : int32_t {
  kFloat32,
  kBFloat16,
  kUInt8,  // input of image_to_nhwc only
};

// Storage of a bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

}  // namespace inception_ext::cpu
