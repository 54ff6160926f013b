#include "copy_channels.h"

#include "kernels.h"

namespace inception_ext::cpu {

void copy_channels(const CopyChannelsParams& params) { kernels().copy_channels(params); }

void relu_channels(const CopyChannelsParams& params) { kernels().relu_channels(params); }

void image_to_nhwc(const ImageToNhwcParams& params) { kernels().image_to_nhwc(params); }

}  // namespace inception_ext::cpu
