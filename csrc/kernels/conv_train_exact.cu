// As conv_group_exact.cu.
#include "conv_train.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_train<ScalarMath<float>>(const ConvTrainLaunch&, cudaStream_t);
template cudaError_t run_conv_train<ScalarMath<__nv_bfloat16>>(const ConvTrainLaunch&,
                                                               cudaStream_t);

}  // namespace inception_ext::kernels
