// How the kernels of an op use one of its tensors.
#pragma once

#include <cstdint>

namespace inception_ext {

enum class Use : uint8_t {
  kRead,     // only read
  kWrite,    // every element is written, and none read before that
  kUpdate,   // holds values when the op starts; read and written in any way
  kScratch,  // holds nothing when the op starts; no element is read before it is written
};

}  // namespace inception_ext
