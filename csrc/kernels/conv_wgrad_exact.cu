// Products on the scalar units: float32 without rounding to TF32, and bfloat16 on devices whose
// tensor cores do not know it.
#include "conv_wgrad.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_wgrad<PixelScalarMath<float>>(const ConvWgradLaunch&, cudaStream_t);
template cudaError_t run_conv_wgrad<PixelScalarMath<__nv_bfloat16>>(const ConvWgradLaunch&,
                                                                    cudaStream_t);

}  // namespace inception_ext::kernels
