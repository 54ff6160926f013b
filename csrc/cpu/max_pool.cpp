#include "max_pool.h"

#include "kernels.h"

namespace inception_ext::cpu {

void max_pool_forward(const MaxPoolForwardParams& params) { kernels().max_pool_forward(params); }

void max_pool_backward(const MaxPoolBackwardParams& params) { kernels().max_pool_backward(params); }

}  // namespace inception_ext::cpu
