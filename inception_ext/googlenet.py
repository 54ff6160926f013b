"""GoogLeNet (Inception v1) with two auxiliary classifiers, a drop-in for torchvision's."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_ext._checkpoint import load_strict, read_state_dict
from inception_ext._layers import max_pool
from inception_ext._legacy import legacy_weights_interface
from inception_ext.modules import BasicConv2d, Inception, InceptionAux, conv_chain
from inception_ext.weights import GoogLeNet_Weights, is_checkpoint_path

__all__ = ["GoogLeNet", "GoogLeNetOutputs", "GoogLeNet_Weights", "googlenet"]


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet in training returns; each is ``[N, num_classes]``, or None without head."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


_GoogLeNetOutputs = GoogLeNetOutputs  # torchvision exports both names


class GoogLeNet(nn.Module):
    """The network of "Going Deeper with Convolutions" (Szegedy et al., 2014), with BatchNorm.

    Signature, module names, state_dict keys and seeded initial values are torchvision's.

    Args:
        num_classes: width of all three classifiers.
        aux_logits: build the auxiliary classifiers, and return their logits in training.
        transform_input: the images are normalised with ImageNet's mean and deviation; renormalise
            them to the mean and deviation of 0.5 that the published weights were trained with.
        init_weights: fill weights from a normal distribution (deviation 0.01, cut at +-2). None
            means True, and warns as torchvision does.
        blocks: the three block types, called as ``conv_block(in_channels, out_channels,
            **conv_kwargs)``, ``inception_block(in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red,
            ch5x5, pool_proj)`` and ``aux_block(in_channels, num_classes, dropout=...)``; default
            :class:`BasicConv2d`, :class:`Inception`, :class:`InceptionAux`.
        dropout: probability of zeroing a unit before the classifier.
        dropout_aux: the same within the auxiliary classifiers.
        branch3_kernel_size: 3 as in torchvision, or 5 as in the paper (see :class:`Inception`);
            the inception block gets it as a keyword where it is not 3.

    Shape:
        ``[N, 3, H, W]``, H and W at least 15, any floating dtype ->
        :class:`GoogLeNetOutputs` where ``training`` and ``aux_logits`` are both set, otherwise a
        Tensor ``[N, num_classes]``.

    Raises:
        ValueError: ``blocks`` has not three entries; or, in the forward pass, images of another
            number of dimensions than 4, or training on a single value per channel.
        RuntimeError: in the forward pass, images with another number of channels than 3, of
            another dtype than the weights, or too small.
    """

    __constants__ = ("aux_logits", "transform_input")

    num_features = 1024  # channels of forward_features(), inputs of each classifier

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool | None = None,
        blocks: Sequence[Callable[..., nn.Module]] | None = None,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        *,
        branch3_kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if blocks is None:
            blocks = [BasicConv2d, Inception, InceptionAux]
        if init_weights is None:
            warnings.warn(
                "The default weight initialization of GoogleNet will be changed in future releases "
                "of torchvision. If you wish to keep the old behavior (which leads to long "
                "initialization times due to scipy/scipy#11299), please set init_weights=True.",
                FutureWarning,
                stacklevel=2,
            )
            init_weights = True
        if len(blocks) != 3:
            raise ValueError(f"blocks length should be 3 instead of {len(blocks)}")
        conv, inception, aux = blocks
        if branch3_kernel_size != 3:
            inception = partial(inception, branch3_kernel_size=branch3_kernel_size)

        self.aux_logits = aux_logits
        self.transform_input = transform_input

        self.conv1 = conv(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = conv(64, 64, kernel_size=1)
        self.conv3 = conv(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)

        self.aux1 = aux(512, num_classes, dropout=dropout_aux) if aux_logits else None
        self.aux2 = aux(528, num_classes, dropout=dropout_aux) if aux_logits else None

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=dropout)
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes)

        if init_weights:
            self._init_weights(self)

    def _init_weights(self, root: nn.Module) -> None:
        for module in root.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, mean=0.0, std=0.01, a=-2, b=2)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)

    def _transform_input(self, x: Tensor) -> Tensor:
        if not self.transform_input:
            return x
        r = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        g = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        b = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        if not torch.jit.is_scripting() and _is_channels_last(x):
            # cat() of one-channel slices would forget the memory format.
            return torch.stack((r, g, b), -1).squeeze(1).permute(0, 3, 1, 2)
        return torch.cat((r, g, b), 1)

    # The trunk in three parts; the auxiliary classifiers read what lies between them.

    def _to_4a(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.maxpool1(self.conv1(x))
            x = self.maxpool2(self.conv3(self.conv2(x)))
        else:
            x = conv_chain([self.conv1], self.maxpool1, x)  # [N, 64, 56, 56] for 224 x 224 images
            x = conv_chain([self.conv2, self.conv3], self.maxpool2, x)  # [N, 192, 28, 28]
        x = self.inception3a(x)  # [N, 256, 28, 28]
        x = self.inception3b(x)  # [N, 480, 28, 28]
        x = self.maxpool3(x) if torch.jit.is_scripting() else max_pool(self.maxpool3, x)
        return self.inception4a(x)  # [N, 512, 14, 14]

    def _to_4d(self, x: Tensor) -> Tensor:
        x = self.inception4b(x)
        x = self.inception4c(x)
        return self.inception4d(x)  # [N, 528, 14, 14]

    def _to_5b(self, x: Tensor) -> Tensor:
        x = self.inception4e(x)  # [N, 832, 14, 14]
        x = self.maxpool4(x) if torch.jit.is_scripting() else max_pool(self.maxpool4, x)
        x = self.inception5a(x)  # [N, 832, 7, 7]
        return self.inception5b(x)  # [N, 1024, 7, 7]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[N, 1024, ceil(H / 32), ceil(W / 32)]`` or near it.

        The auxiliary classifiers do not run.
        """
        return self._to_5b(self._to_4d(self._to_4a(self._transform_input(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[N, num_classes]`` of a feature map ``[N, 1024, H, W]``.

        With ``pre_logits``, the pooled features ``[N, 1024]`` that the classifier reads.
        """
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        return x if pre_logits else self.fc(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        aux1: Tensor | None = None
        aux2: Tensor | None = None
        x = self._to_4a(x)
        if self.aux1 is not None and self.training:
            aux1 = self.aux1(x)
        x = self._to_4d(x)
        if self.aux2 is not None and self.training:
            aux2 = self.aux2(x)
        x = self._to_5b(x)
        return self.forward_head(x), aux2, aux1

    @torch.jit.unused
    def eager_outputs(
        self, x: Tensor, aux2: Tensor | None, aux1: Tensor | None
    ) -> GoogLeNetOutputs:
        """All three in training with ``aux_logits``, otherwise the logits alone."""
        if self.training and self.aux_logits:
            return GoogLeNetOutputs(x, aux2, aux1)
        return x  # type: ignore[return-value]  # TorchScript needs one return type

    def forward(self, x: Tensor) -> GoogLeNetOutputs:
        x = self._transform_input(x)
        x, aux2, aux1 = self._forward(x)
        if torch.jit.is_scripting():
            if not (self.training and self.aux_logits):
                warnings.warn(
                    "Scripted GoogleNet always returns GoogleNetOutputs Tuple", stacklevel=2
                )
            return GoogLeNetOutputs(x, aux2, aux1)
        else:
            return self.eager_outputs(x, aux2, aux1)

    def get_classifier(self) -> nn.Module:
        """The main classifier, ``fc``."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Gives the network, in place, new classifiers of another width.

        The last layer of the main classifier and of each auxiliary classifier that the network has
        is replaced by a freshly initialised one of the same dtype and on the same device.

        Args:
            num_classes: the new width; 0 takes the layers away (``nn.Identity``), so that the
                network returns the 1024 features that each of them read.

        Raises:
            ValueError: ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes should not be negative but got {num_classes}")
        self.fc = self._new_classifier(num_classes)
        for head in (self.aux1, self.aux2):
            if head is not None:
                head.fc2 = self._new_classifier(num_classes)

    def _new_classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        weight = next(self.parameters())
        layer = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        self._init_weights(layer)
        return layer

    def extra_repr(self) -> str:
        return f"aux_logits={self.aux_logits}, transform_input={self.transform_input}"


@torch.jit.unused
def _is_channels_last(x: Tensor) -> bool:
    if isinstance(x, torch.fx.Proxy):
        return False  # unknown while tracing
    # By strides: is_contiguous(memory_format=...) is not implemented under vmap.
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) == x.shape[1]


@legacy_weights_interface(GoogLeNet_Weights.IMAGENET1K_V1)
def googlenet(
    *,
    weights: GoogLeNet_Weights | str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> GoogLeNet:
    """GoogLeNet, with or without trained weights; takes what torchvision's ``googlenet`` takes.

    Args:
        weights: a member of :class:`GoogLeNet_Weights` (or of torchvision's), or its name; or the
            path of a checkpoint, that is a state_dict saved by ``torch.save``, bare or as entry
            ``"model"`` or ``"state_dict"`` of a dict. Names of members come before file names.
        progress: show a progress bar while downloading.
        **kwargs: arguments of :class:`GoogLeNet`. With weights of the enum ``num_classes`` and
            ``init_weights`` are settled, ``transform_input`` becomes True unless given, and the
            auxiliary classifiers (whose published weights are not trained) are dropped unless
            ``aux_logits=True``. With a checkpoint ``num_classes`` and ``aux_logits`` become what
            the file holds unless given, and ``aux_logits=False`` leaves out heads that it holds.
            A file does not tell ``transform_input``, which stays False unless given. A file under
            the name of the published one is taken like a member of the enum.

    Raises:
        KeyError: a string that names no weights and no file.
        TypeError: a member of another enum.
        ValueError: an argument that contradicts the weights.
        FileNotFoundError: no such checkpoint.
        RuntimeError: a broken checkpoint, or one of another network; the message names the file.
    """
    if is_checkpoint_path(weights):
        return _from_checkpoint(os.fspath(weights), kwargs)

    verified = GoogLeNet_Weights.verify(weights)
    if verified is None:
        return GoogLeNet(**kwargs)

    keep_heads = kwargs.get("aux_logits", False)
    kwargs.setdefault("transform_input", True)
    _settle(kwargs, "aux_logits", True)
    _settle(kwargs, "init_weights", False)
    _settle(kwargs, "num_classes", len(verified.meta["categories"]))
    model = GoogLeNet(**kwargs)
    model.load_state_dict(verified.get_state_dict(progress=progress, check_hash=True))
    if keep_heads:
        warnings.warn(
            "auxiliary heads in the pretrained googlenet model are NOT pretrained, "
            "so make sure to train them",
            stacklevel=3,
        )
    else:
        model.aux_logits = False
        model.aux1 = None
        model.aux2 = None
    return model


def _settle(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Sets an argument that the weights decide; whoever gave another value gets an error."""
    if kwargs.setdefault(name, value) != value:
        raise ValueError(
            f"The parameter '{name}' expected value {value} but got {kwargs[name]} instead."
        )


def _from_checkpoint(path: str, kwargs: dict[str, Any]) -> GoogLeNet:
    state_dict = read_state_dict(path)
    if "fc.weight" in state_dict:
        kwargs.setdefault("num_classes", state_dict["fc.weight"].shape[0])
    published = os.path.basename(path) == os.path.basename(GoogLeNet_Weights.DEFAULT.url)
    has_heads = any(key.startswith("aux") for key in state_dict)
    kwargs.setdefault("aux_logits", has_heads and not published)
    kwargs.setdefault("transform_input", published)
    _settle(kwargs, "init_weights", False)

    model = GoogLeNet(**kwargs)
    if not kwargs["aux_logits"]:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(("aux1.", "aux2."))}
    load_strict(model, state_dict, path)
    return model
