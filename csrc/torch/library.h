// The namespace that the ops register in.
#pragma once

#include "torch/stable.h"

// The emulator's build registers the same ops once more, for CPU tensors: the key under which ops
// that only CUDA has find their kernels.
#ifdef INCEPTION_EXT_EMULATE
#define INCEPTION_EXT_OPS inception_ext_emulated
#define INCEPTION_EXT_CUDA_KEY CPU
namespace inception_ext {
inline constexpr const char* kNamespace = "inception_ext_emulated";
}
#else
#define INCEPTION_EXT_OPS inception_ext
#define INCEPTION_EXT_CUDA_KEY CUDA
namespace inception_ext {
inline constexpr const char* kNamespace = "inception_ext";
}
#endif
