#include "conv_group.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_group<TensorMath<__nv_bfloat16>>(const ConvGroupLaunch&,
                                                               cudaStream_t);

}  // namespace inception_ext::kernels
