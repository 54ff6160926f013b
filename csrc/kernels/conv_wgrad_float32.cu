#include "conv_wgrad.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_wgrad<PixelTensorMath<float>>(const ConvWgradLaunch&, cudaStream_t);

}  // namespace inception_ext::kernels
