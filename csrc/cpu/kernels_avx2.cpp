// The kernels for AVX2 + FMA; see kernels_impl.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "batch_norm_plan.h"
#include "kernels.h"
#include "parallel.h"

#define INCEPTION_EXT_ISA avx2
#define INCEPTION_EXT_LANES 8
#define INCEPTION_EXT_KERNELS kAvx2Kernels

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
