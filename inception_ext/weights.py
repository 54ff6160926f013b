"""The published ImageNet weights and their preprocessing; needs neither torchvision nor numpy."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GoogLeNet_Weights", "ImageClassification", "Weights", "is_checkpoint_path"]


class ImageClassification(nn.Module):
    """Resize, center crop, scale to [0, 1], normalise: the preset that the weights expect.

    Args:
        crop_size: height and width of the result.
        resize_size: length of the shorter side before the crop (bilinear, antialiased).
        mean, std: of each channel.

    Shape:
        a PIL image in mode RGB, or a Tensor ``[..., 3, H, W]`` of integers (0 to the dtype's
        largest value) or floats (0 to 1) -> float32 ``[..., 3, crop_size, crop_size]``.

    Raises:
        TypeError: the image is neither.
        ValueError: the image has not three channels.
    """

    def __init__(
        self,
        *,
        crop_size: int = 224,
        resize_size: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.resize_size = resize_size
        self.mean = tuple(mean)
        self.std = tuple(std)

    def forward(self, image: "Image | Tensor") -> Tensor:
        x = self.crop(image)
        if x.is_floating_point():
            x = x.to(torch.float32)
        else:
            x = x.to(torch.float32) / torch.iinfo(x.dtype).max
        mean = torch.tensor(self.mean, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(-1, 1, 1)
        return (x - mean) / std

    def crop(self, image: "Image | Tensor") -> Tensor:
        """The image resized and cropped, not yet scaled or normalised: uint8 of a PIL image, what
        ``freeze`` takes as it is; ``[..., 3, crop_size, crop_size]``."""
        return _center_crop(self._resized(image), self.crop_size)

    def _resized(self, image: "Image | Tensor") -> Tensor:
        if isinstance(image, Tensor):
            if image.dim() < 3 or image.shape[-3] != 3:
                raise ValueError(f"image should be [..., 3, H, W] but is {list(image.shape)}")
            return _resize(image, self._resized_size(*image.shape[-2:]))

        try:  # Pillow is needed only for those who come with its images
            from PIL import Image
        except ImportError:
            is_pil_image = False
        else:
            is_pil_image = isinstance(image, Image.Image)
        if not is_pil_image:
            raise TypeError(f"image should be a PIL image or a Tensor but is {type(image)}")
        if image.mode != "RGB":
            raise ValueError(
                f"image should be in mode RGB but is in {image.mode}: use image.convert('RGB')"
            )
        height, width = self._resized_size(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, 3).permute(2, 0, 1)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        longer = int(self.resize_size * max(height, width) / min(height, width))
        return (self.resize_size, longer) if height <= width else (longer, self.resize_size)

    def extra_repr(self) -> str:
        return (
            f"crop_size={self.crop_size}, resize_size={self.resize_size}, "
            f"mean={self.mean}, std={self.std}"
        )


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of ``[..., 3, H, W]``; integers are rounded to integers."""
    if tuple(x.shape[-2:]) == size:
        return x
    exact = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    y = F.interpolate(
        exact.reshape(-1, *x.shape[-3:]), size, mode="bilinear", align_corners=False, antialias=True
    ).reshape(*x.shape[:-2], *size)
    return y.to(x.dtype) if x.is_floating_point() else y.round().to(x.dtype)


def _center_crop(x: Tensor, size: int) -> Tensor:
    """The middle ``size`` x ``size`` of ``[..., H, W]``, which is padded with 0 where smaller."""
    height, width = x.shape[-2:]
    missing_h, missing_w = max(size - height, 0), max(size - width, 0)
    if missing_h or missing_w:
        x = F.pad(x, (missing_w // 2, -(-missing_w // 2), missing_h // 2, -(-missing_h // 2)))
    top = round((x.shape[-2] - size) / 2)
    left = round((x.shape[-1] - size) / 2)
    return x[..., top : top + size, left : left + size]


@dataclass
class Weights:
    """Trained weights: where they are, how to prepare images for them, and facts about them."""

    url: str
    transforms: Callable[..., Callable[[Any], Tensor]]
    meta: dict[str, Any]


def _imagenet_categories() -> list[str]:
    text = files("inception_ext").joinpath("data/imagenet_categories.txt").read_text("utf-8")
    return text.splitlines()


class GoogLeNet_Weights(Enum):
    """Trained weights for :func:`inception_ext.googlenet`, the ones that torchvision publishes."""

    IMAGENET1K_V1 = Weights(
        url="https://download.pytorch.org/models/googlenet-1378be20.pth",
        transforms=ImageClassification,
        meta={
            "num_params": 6624904,
            "min_size": (15, 15),
            "categories": _imagenet_categories(),
            "recipe": "https://github.com/pytorch/vision/tree/main/references/classification#googlenet",
            "_metrics": {"ImageNet-1K": {"acc@1": 69.778, "acc@5": 89.530}},
            "_ops": 1.498,
            "_file_size": 49.731,
            "_docs": "Converted from the TensorFlow weights; the auxiliary heads are untrained.",
        },
    )
    DEFAULT = IMAGENET1K_V1

    @classmethod
    def verify(cls, obj: Any) -> Any:
        """The weights that ``obj`` stands for.

        Args:
            obj: a member, the name of one (with or without ``GoogLeNet_Weights.`` before it), a
                member of torchvision's enum of the same name, or None. The last two are returned
                as they are.

        Raises:
            KeyError: a string that names no member.
            TypeError: anything else.
        """
        if isinstance(obj, str):
            return cls[obj.replace(f"{cls.__name__}.", "")]
        is_torchvisions = isinstance(obj, Enum) and type(obj).__name__ == cls.__name__
        if obj is None or isinstance(obj, cls) or is_torchvisions:
            return obj
        raise TypeError(
            f"Invalid Weight class provided; expected {cls.__name__} "
            f"but received {type(obj).__name__}."
        )

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Downloads the weights, or takes them from the cache of ``torch.hub``.

        Arguments are those of ``torch.hub.load_state_dict_from_url`` after the url.
        """
        return torch.hub.load_state_dict_from_url(self.url, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    @property
    def url(self) -> str:
        return self.value.url

    @property
    def transforms(self) -> Callable[..., Callable[[Any], Tensor]]:
        return self.value.transforms

    @property
    def meta(self) -> dict[str, Any]:
        return self.value.meta


def is_checkpoint_path(weights: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a ``weights`` argument means a file: a path-like, a name ending in .pth or .pt, or
    the name of a file that exists. Names of weights come first."""
    if isinstance(weights, os.PathLike):
        return True
    if not isinstance(weights, str):
        return False
    if weights.replace("GoogLeNet_Weights.", "") in GoogLeNet_Weights.__members__:
        return False
    return weights.endswith((".pth", ".pt")) or os.path.isfile(weights)
