"""The network as the 2014 paper has it: no BatchNorm, biases, local response normalisation, 5x5.

Layer by layer this is ``bvlc_googlenet`` of Caffe's model zoo, trained by BVLC after Szegedy et
al., "Going Deeper with Convolutions" (2014), table 1.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext._conv_relu import ConvReLU, conv_relu_chain
from inception_ext._layers import aux_pool, lrn, max_pool
from inception_ext.googlenet import GoogLeNet
from inception_ext.modules import Inception, InceptionAux

__all__ = ["BVLCGoogLeNet", "BVLCInceptionAux", "ConvReLU", "bvlc_googlenet"]


@torch.fx.wrap
def paper_aux_pool(x: Tensor) -> Tensor:
    """Average pool 5x5 stride 3 of maps from 14x14 to 16x16, which it brings to 4x4.

    The linear layer behind it takes nothing else, so maps of other sizes are pooled adaptively.
    """
    fits = 14 <= x.shape[2] <= 16 and 14 <= x.shape[3] <= 16
    if torch.jit.is_scripting():
        return F.avg_pool2d(x, 5, 3) if fits else F.adaptive_avg_pool2d(x, (4, 4))
    else:  # the compiler of TorchScript leaves this branch alone
        return aux_pool(x, 5, 3) if fits else aux_pool(x)


class BVLCInceptionAux(InceptionAux):
    """Auxiliary classifier of the paper: :func:`paper_aux_pool`, no BatchNorm.

    Args:
        in_channels: channels of the input.
        num_classes: width of the output.
        dropout: probability of zeroing a unit between the two linear layers.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.7) -> None:
        super().__init__(in_channels, num_classes, conv_block=ConvReLU, dropout=dropout)

    def _pool(self, x: Tensor) -> Tensor:
        return paper_aux_pool(x)


class BVLCGoogLeNet(GoogLeNet):
    """The paper's GoogLeNet; arguments, outputs and methods of :class:`inception_ext.GoogLeNet`.

    What differs: :class:`ConvReLU` for all convolutions, 5x5 in the third branch, local response
    normalisation (5 channels, alpha 1e-4, beta 0.75, k 1) after the first pool and after the
    third convolution, 3x3 stride 2 for all four pools, and :class:`BVLCInceptionAux`.

    Args:
        num_classes: width of all three classifiers.
        aux_logits: build the auxiliary classifiers, and return their logits in training.
        init_weights: fill weights as Caffe does (uniform with variance 1 / fan_in; biases 0.2,
            those of the classifiers 0).
        dropout: probability of zeroing a unit before the classifier.
        dropout_aux: the same within the auxiliary classifiers.

    Shape:
        as for :class:`inception_ext.GoogLeNet`, but H and W at least 31. Images of 223 to 270
        pixels a side, 224 in the paper, give the auxiliary classifiers the maps that their 5x5
        pool fits; for others see :func:`paper_aux_pool`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        init_weights: bool = True,
        dropout: float = 0.4,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__(
            num_classes,
            aux_logits,
            init_weights=False,
            blocks=[ConvReLU, partial(Inception, conv_block=ConvReLU), BVLCInceptionAux],
            dropout=dropout,
            dropout_aux=dropout_aux,
            branch3_kernel_size=5,
        )
        self.lrn1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.lrn2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.maxpool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        if init_weights:
            self._init_weights(self)
            self.reset_classifier(num_classes)  # with biases of 0

    def _init_weights(self, root: nn.Module) -> None:
        for module in root.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                # Caffe's "xavier" filler: a bound of sqrt(3 / fan_in).
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                nn.init.constant_(module.bias, 0.2)

    def _new_classifier(self, num_classes: int) -> nn.Module:
        layer = super()._new_classifier(num_classes)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
        return layer

    def _to_4a(self, x: Tensor) -> Tensor:  # shapes are those of 224 x 224 images
        if torch.jit.is_scripting():
            x = self.lrn1(self.maxpool1(self.conv1(x)))
            x = self.maxpool2(self.lrn2(self.conv3(self.conv2(x))))
        else:
            x = conv_relu_chain([self.conv1], self.maxpool1, x)  # [N, 64, 56, 56]
            x = lrn(self.lrn1, x)
            x = conv_relu_chain([self.conv2, self.conv3], None, x)  # [N, 192, 56, 56]
            x = max_pool(self.maxpool2, lrn(self.lrn2, x))  # [N, 192, 28, 28]
        x = self.inception3a(x)
        x = self.inception3b(x)  # [N, 480, 28, 28]
        x = self.maxpool3(x) if torch.jit.is_scripting() else max_pool(self.maxpool3, x)
        return self.inception4a(x)  # [N, 512, 14, 14]


def bvlc_googlenet(num_classes: int = 1000, **kwargs: Any) -> BVLCGoogLeNet:
    """Builds the network of the 2014 paper, untrained.

    Args:
        num_classes: width of all three classifiers.
        **kwargs: further arguments of :class:`BVLCGoogLeNet`.
    """
    return BVLCGoogLeNet(num_classes, **kwargs)
