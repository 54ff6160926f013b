#include "conv_train.cuh"

namespace inception_ext::kernels {

template cudaError_t run_conv_train<TensorMath<__half>>(const ConvTrainLaunch&, cudaStream_t);

}  // namespace inception_ext::kernels
