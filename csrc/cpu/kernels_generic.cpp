// The kernels for what the compiler targets by default; see kernels_impl.h.
#include <cstddef>
#include <cstdint>

#include "batch_norm_plan.h"
#include "kernels.h"
#include "parallel.h"

#define INCEPTION_EXT_ISA generic
#define INCEPTION_EXT_LANES 4
#define INCEPTION_EXT_KERNELS kGenericKernels

#include "kernels_impl.h"
