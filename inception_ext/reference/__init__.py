"""Every op of this package in plain PyTorch, with the signature of its fused counterpart.

These functions are the definition of what the kernels compute, the path for whatever the kernels
do not take (float64, second derivatives, functorch transforms, ...), and the oracle of the tests.
Activations are ``[N, C, H, W]`` in any memory format and any floating dtype.
"""

from inception_ext.reference.groups import conv_group, conv_wgrad
from inception_ext.reference.inference import (
    folded_inception,
    global_avg_pool,
    lrn_out,
    max_pool_out,
    stem_conv_conv_pool,
    stem_conv_pool,
)
from inception_ext.reference.layers import (
    aux_pool,
    batch_norm_relu,
    conv3x3,
    conv_bn_relu,
    conv_chain,
    inception,
    lrn,
    max_pool,
)
from inception_ext.reference.packed import pack_weight, unpack_weight

__all__ = [
    "aux_pool",
    "batch_norm_relu",
    "conv3x3",
    "conv_bn_relu",
    "conv_chain",
    "conv_group",
    "conv_wgrad",
    "folded_inception",
    "global_avg_pool",
    "inception",
    "lrn",
    "lrn_out",
    "max_pool",
    "max_pool_out",
    "pack_weight",
    "stem_conv_conv_pool",
    "stem_conv_pool",
    "unpack_weight",
]
