"""What a frozen network reads: images of any kind, and what makes them its first layer's input."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Images", "check_images"]


class Images(NamedTuple):
    """Images ``[N, 3, H, W]``, uint8 or floating, in any strides; to be read as scaled, shifted."""

    pixels: Tensor
    scale: tuple[float, ...]  # a number per channel
    shift: tuple[float, ...]

    def to_nhwc(self, dtype: torch.dtype) -> Tensor:
        """``pixels * scale + shift`` in dtype, channels_last, by PyTorch's own operations."""
        x = self.pixels.float()
        if (self.scale, self.shift) != ((1.0,) * 3, (0.0,) * 3):
            scale, shift = (
                torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.scale, self.shift)
            )
            x = x * scale + shift
        return x.to(dtype).contiguous(memory_format=torch.channels_last)


def check_images(images: Tensor, device: torch.device) -> Tensor:
    """Images as ``[N, 3, H, W]``, or the error of :meth:`inception_ext.engine.Engine.__call__`."""
    if not isinstance(images, Tensor) or images.layout != torch.strided:
        what = images.layout if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"engine: images: expected a dense Tensor, got {what}")
    if type(images) is not Tensor and not torch.compiler.is_compiling():
        images = images.as_subclass(Tensor)  # such as torchvision's tv_tensors.Image
    if images.dim() != 4:
        raise ValueError(
            f"engine: images: expected 4D input (got {images.dim()}D input) of shape "
            "[N, 3, H, W] or [N, H, W, 3]"
        )
    if images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] != 3:
        raise ValueError(
            f"engine: images: expected shape [N, 3, H, W] or [N, H, W, 3], got {list(images.shape)}"
        )
    if images.device != device:
        raise RuntimeError(f"engine: images: expected device {device}, got {images.device}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"engine: images: expected uint8 or floating, got {images.dtype}")
    return images
