"""GoogLeNet (Inception v1) in a few fused kernels, a drop-in for torchvision's."""

from inception_ext import functional
from inception_ext._version import __version__
from inception_ext.bvlc import BVLCGoogLeNet, bvlc_googlenet
from inception_ext.convert import LoadReport, accelerate, load_compatible, restore
from inception_ext.engine import Engine, freeze
from inception_ext.googlenet import (
    GoogLeNet,
    GoogLeNet_Weights,
    GoogLeNetOutputs,
    _GoogLeNetOutputs,
    googlenet,
)
from inception_ext.losses import GoogLeNetLoss
from inception_ext.modules import BasicConv2d, Inception, InceptionAux

__all__ = [
    "BVLCGoogLeNet",
    "BasicConv2d",
    "Engine",
    "GoogLeNet",
    "GoogLeNetLoss",
    "GoogLeNetOutputs",
    "GoogLeNet_Weights",
    "Inception",
    "InceptionAux",
    "LoadReport",
    "_GoogLeNetOutputs",
    "__version__",
    "accelerate",
    "bvlc_googlenet",
    "freeze",
    "functional",
    "googlenet",
    "load_compatible",
    "restore",
]
