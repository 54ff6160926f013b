// The namespace that the ops register in.
#pragma once

#include "torch/stable.h"

// The emulator's build registers the same ops once more, for CPU tensors.
#ifdef INCEPTION_EXT_EMULATE
#define INCEPTION_EXT_OPS inception_ext_emulated
#else
#define INCEPTION_EXT_OPS inception_ext
#endif
