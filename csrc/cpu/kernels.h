// One table of kernels per ISA. Every table is compiled from the same *_impl.h headers.
#pragma once

#include "batch_norm.h"
#include "copy_channels.h"
#include "isa.h"
#include "max_pool.h"
#include "winograd.h"

namespace inception_ext::cpu {

struct Kernels {
  void (*batch_norm_statistics)(const BatchNormStatisticsParams&);
  void (*batch_norm_relu_apply)(const BatchNormReluApplyParams&);
  void (*batch_norm_relu_backward_reduce)(const BatchNormReluBackwardParams&);
  void (*batch_norm_relu_backward_apply)(const BatchNormReluBackwardParams&);
  void (*max_pool_forward)(const MaxPoolForwardParams&);
  void (*max_pool_backward)(const MaxPoolBackwardParams&);
  void (*copy_channels)(const CopyChannelsParams&);
  void (*relu_channels)(const CopyChannelsParams&);
  void (*image_to_nhwc)(const ImageToNhwcParams&);
  void (*winograd_weight)(const WinogradWeightParams&);
  void (*winograd_input)(const WinogradInputParams&);
  void (*winograd_output)(const WinogradOutputParams&);
};

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;    // x86-64 only
extern const Kernels kAvx512Kernels;  // x86-64 only

// The table of active_isa().
const Kernels& kernels();

}  // namespace inception_ext::cpu
