// Everything that is compiled once per ISA, in a namespace of its own. A kernels_<isa>.cpp includes
// this after all other headers, with the instruction set switched on by a pragma (setuptools has
// no flags per file), and defines
//   INCEPTION_EXT_ISA      name of the namespace
//   INCEPTION_EXT_LANES    float32 lanes of a vector
//   INCEPTION_EXT_KERNELS  the table to define
//
// Rule for the *_impl.h headers and simd.h: include and call no std function. An inline one would
// be compiled here with the instruction set on, and the linker could keep that copy for callers
// on a CPU without it.
#pragma once

// A product and a sum fuse where the code says fma() and nowhere else: left to the compiler, the
// same formula would round one way in a loop over 4 pixels and another way in a loop over 1, and
// results would depend on where the threads split.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
// GCC's own intrinsics read a variable that they leave uninitialized on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "batch_norm_impl.h"
#include "copy_channels_impl.h"
#include "max_pool_impl.h"
#include "simd.h"
#include "winograd_impl.h"

namespace inception_ext::cpu {

const Kernels INCEPTION_EXT_KERNELS = {
    INCEPTION_EXT_ISA::batch_norm_statistics,
    INCEPTION_EXT_ISA::batch_norm_relu_apply,
    INCEPTION_EXT_ISA::batch_norm_relu_backward_reduce,
    INCEPTION_EXT_ISA::batch_norm_relu_backward_apply,
    INCEPTION_EXT_ISA::max_pool_forward,
    INCEPTION_EXT_ISA::max_pool_backward,
    INCEPTION_EXT_ISA::copy_channels,
    INCEPTION_EXT_ISA::relu_channels,
    INCEPTION_EXT_ISA::image_to_nhwc,
    INCEPTION_EXT_ISA::winograd_weight,
    INCEPTION_EXT_ISA::winograd_input,
    INCEPTION_EXT_ISA::winograd_output,
};

}  // namespace inception_ext::cpu

#if !defined(__clang__)
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
