#include "winograd.h"

#include "kernels.h"

namespace inception_ext::cpu {

void winograd_weight(const WinogradWeightParams& params) { kernels().winograd_weight(params); }

void winograd_input(const WinogradInputParams& params) { kernels().winograd_input(params); }

void winograd_output(const WinogradOutputParams& params) { kernels().winograd_output(params); }

}  // namespace inception_ext::cpu
