"""Frozen inference: batch norms folded, 1x1 convolutions merged, weights packed.

:func:`freeze` reads a GoogLeNet (ours, torchvision's, or the paper's) into a list of steps. A
step that it knows (convolution + batch norm + ReLU, an Inception module, a pool) runs fused; a
module that it does not know (a replaced classifier, a block with hooks) is called as it is. So a
frozen model always computes what the model computes in evaluation mode.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inception_ext import _gate, _library
from inception_ext._compiled import call_engine, number
from inception_ext._fold import is_inception
from inception_ext._frozen import BODY, STEM, Frozen
from inception_ext._frozen_cpu import FrozenCpu
from inception_ext._frozen_cuda import FusedNetwork
from inception_ext._fuse import fold_inception as fold
from inception_ext._fuse import has_two_launches
from inception_ext._images import Images, check_images
from inception_ext._profiling import region
from inception_ext._steps import FoldedInception
from inception_ext._tracing import is_exporting
from inception_ext._watch import Watch

__all__ = ["Engine", "fold_inception", "freeze"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def freeze(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    early_exit: float | None = None,
) -> "Engine":
    """A fast inference-only view of a GoogLeNet, whatever mode the model is in.

    The model stays as it is and remains the owner of the weights: when a parameter, a statistic or
    a submodule changes (training, ``load_state_dict``, ``.to()``, a new ``fc``), the next call
    folds and packs them anew. What torch keeps no count of it cannot notice: after
    ``p.data.mul_(2)``, or writes from another process, call :meth:`Engine.refresh`. A call within
    ``torch.compile`` is one op that notices as much; an engine that went through ``torch.export``
    has the weights of that time.

    On CUDA the network is planned once for each shape of the images, and kept as a CUDA graph.
    float32 is multiplied as TF32 where torch's own convolutions (``torch.backends.cudnn``) and, for
    the classifier, matrix products (``torch.backends.cuda.matmul``) may be.

    Args:
        model: :class:`inception_ext.GoogLeNet`, torchvision's, or a network with their children.
        dtype: of the computation and of the logits; default: that of the model. float32 or
            bfloat16 on the CPU, also float16 on CUDA.
        mean, std: per channel; uint8 images are brought to ``(x / 255 - mean) / std``, as the
            transforms that come with the published weights do. Float images are used as they are.
        early_exit: a confidence above 0, at most 1. Images of which an auxiliary classifier is so
            sure skip the rest, and get its logits; ``engine.saved`` reports the work saved.

    Returns:
        an :class:`Engine`: ``engine(images) -> logits``.

    Raises:
        TypeError: the model lacks the children of a GoogLeNet.
        ValueError: a dtype that inference does not run in, ``mean`` or ``std`` of another length
            than 3, a ``std`` that is not positive, or ``early_exit`` out of range or without
            auxiliary classifiers in the model.
    """
    if early_exit is None:
        return Engine(model, dtype, mean, std)
    from inception_ext.early_exit import EarlyExitEngine

    return EarlyExitEngine(model, dtype, mean, std, early_exit)


def fold_inception(block: nn.Module, dtype: torch.dtype | None = None) -> FoldedInception:
    """An Inception module of any widths, folded and packed: for inference outside a GoogLeNet.

    ::

        folded = fold_inception(block, torch.float16)
        y = inception_ext.functional.folded_inception(x, *folded)

    Args:
        block: :class:`inception_ext.Inception` or torchvision's; later changes go unnoticed.
        dtype: of the weights, and of x; default: that of the block.

    Raises:
        TypeError: a module that computes anything else, or has hooks.
    """
    if not (is_inception(block) and has_two_launches(block)):
        raise TypeError(
            f"fold_inception: block: expected an Inception without hooks, got a "
            f"{type(block).__name__} that computes something else"
        )
    with torch.no_grad():
        return fold(block, dtype or next(block.parameters()).dtype)


class Engine:
    """What :func:`freeze` returns. Safe to call from several threads once warmed up."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise TypeError("freeze: model: expected a GoogLeNet, got a scripted or traced one")
        missing = [
            name
            for name in (*STEM, *BODY, "avgpool", "fc")
            if not name.startswith("lrn") and not isinstance(getattr(model, name, None), nn.Module)
        ]
        if missing:
            is_wrapper = isinstance(getattr(model, "module", None), nn.Module)
            raise TypeError(
                f"freeze: model: expected a GoogLeNet, got a {type(model).__name__} without "
                + ("its children; pass its .module" if is_wrapper else ", ".join(missing))
            )
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"freeze: mean and std: expected 3 values each, got {len(mean)} and {len(std)}"
            )
        if not min(std) > 0:
            raise ValueError(f"freeze: std: expected values above 0, got {tuple(std)}")
        self.model = model
        self._asked_dtype = dtype
        self._mean, self._std = tuple(mean), tuple(std)
        self._number = number(self)
        self._watch: Watch | None = None
        self._networks: dict[Any, Any]
        self.refresh()

    def refresh(self) -> None:
        """Reads the model's weights as they are now; a call does it where it notices a change."""
        watch = Watch(self.model)
        weight = next(self.model.parameters())
        self.device = weight.device
        self.dtype = self._asked_dtype or weight.dtype
        on_cpu = _library.device_type(weight) == "cpu"
        supported = _CPU_DTYPES if on_cpu else (torch.float16, *_CPU_DTYPES)
        if self.dtype not in supported:
            names = " or ".join(str(d) for d in supported)
            raise ValueError(
                f"freeze: dtype: expected {names} on {self.device.type}, got {self.dtype}"
            )
        self._model_dtype = weight.dtype
        self._networks = {}
        self._network = self._network_for(weight)
        self._looks_last = isinstance(self._network, FusedNetwork) and self._network.is_whole
        self._watch = watch

    def _network_for(self, x: Tensor) -> Any:
        """The network in kernels or, where these do not take x, in PyTorch's operations."""
        kind: type[Frozen | FusedNetwork] = FrozenCpu if x.device.type == "cpu" else Frozen
        if _gate.why_inference_reference(x, self.dtype) is None:
            kind = FusedNetwork
        networks = self._networks
        if kind not in networks:
            with torch.no_grad():
                networks[kind] = self._make_network(kind)
        return networks[kind]

    def _make_network(self, kind: type[Frozen] | type[FusedNetwork]) -> Any:
        return kind(self.model, self.dtype, self._model_dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of ``images``.

        Args:
            images: ``[N, 3, H, W]`` in any memory format, or ``[N, H, W, 3]``; uint8 in 0..255, or
                floating, normalised as the model expects it. H and W as the model takes them.

        Raises:
            ValueError: images of another shape. TypeError: of another dtype. RuntimeError: on
                another device than the model's.
        """
        assert self._watch is not None
        if torch.compiler.is_compiling():
            fc = self.model.fc
            if not is_exporting() and type(fc) is nn.Linear:
                dtype = self._asked_dtype or fc.weight.dtype
                return call_engine(images, self._number, fc.out_features, dtype)
            return self._run(images)
        if not self._looks_last:
            if self._watch.changed():
                self.refresh()
            return self._run(images)
        # Looking takes as long as the kernels of one image, and they run meanwhile. What they wrote
        # is dropped where the look finds a change; nothing of the model was called.
        try:
            logits = self._run(images)
        except Exception:
            if not self._watch.changed():
                raise
        else:
            if not self._watch.changed():
                return logits
        self.refresh()
        return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        """The logits, by the weights as they were read."""
        # Autocast is for models that leave their dtypes open.
        autocast = torch.autocast(self.device.type, enabled=False)
        with region("engine"), torch.no_grad(), autocast:
            given = self._images(images)
            network = self._network_for(given.pixels)
            return network(given if network.reads_images else self._to_nhwc(given))

    def name_launches(self, shape: Sequence[int]) -> list[str]:
        """The modules that each kernel launch of a call stands for, in order.

        Args:
            shape: ``[N, 3, H, W]``, of the images.

        Raises:
            ValueError: the engine does not run on CUDA kernels alone.
        """
        if not isinstance(self._network, FusedNetwork):
            raise ValueError("name_launches: expected an engine on CUDA, got one on the CPU")
        pixels = torch.empty(tuple(shape), device=self.device)
        return self._network.name_launches(Images(pixels, *self._affine(False)))

    def _images(self, images: Tensor) -> Images:
        pixels = check_images(images, self.device)
        return Images(pixels, *self._affine(pixels.dtype == torch.uint8))

    def _load(self, images: Tensor) -> Tensor:
        """Images of any accepted kind to ``[N, 3, H, W]``, channels_last, normalised."""
        return self._to_nhwc(self._images(images))

    def _to_nhwc(self, images: Images) -> Tensor:
        x = images.pixels
        kernel_takes = x.dtype in (torch.uint8, *_CPU_DTYPES) and self.dtype in _CPU_DTYPES
        if _gate.why_unavailable() is None and x.device.type == "cpu" and kernel_takes:
            return torch.ops.inception_ext.image_to_nhwc(
                x, list(images.scale), list(images.shift), self.dtype
            )
        return images.to_nhwc(self.dtype)

    def _affine(self, is_uint8: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and shift per channel that bring an image to what the first convolution reads.

        ``transform_input`` belongs here, before the convolution pads with zeros, and not in its
        weights: folded into them it would be wrong at the borders.
        """
        scale, shift = [1.0] * 3, [0.0] * 3
        if is_uint8:
            scale = [1.0 / (255.0 * s) for s in self._std]
            shift = [-m / s for m, s in zip(self._mean, self._std, strict=True)]
        if getattr(self.model, "transform_input", False):
            for c in range(3):
                ratio = IMAGENET_STD[c] / 0.5
                scale[c] *= ratio
                shift[c] = shift[c] * ratio + (IMAGENET_MEAN[c] - 0.5) / 0.5
        return tuple(scale), tuple(shift)

    def __repr__(self) -> str:
        fused, steps = self._network.count_fused()
        return (
            f"Engine({type(self.model).__name__}, {self.dtype}, {self.device}, "
            f"{fused} of {steps} steps fused)"
        )
