#include "conv_group.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_group<TensorMath<__half>>(const ConvGroupLaunch&, cudaStream_t);

}  // namespace inception_ext::kernels
