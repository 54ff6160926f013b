"""GoogLeNet with its batch norms folded, over any convolution + bias + ReLU: cuDNN's, to compare.

What separates it from ``freeze``: every convolution is a kernel of its own, and the branches of a
module are concatenated.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext._fold import fold

__all__ = ["Folded", "cudnn_frontend", "cudnn_relu", "plain_relu"]

# conv(x, weight [K, C, R, S], bias [K], stride, padding) -> relu(x * weight + bias)
Conv = Callable[[Tensor, Tensor, Tensor, list[int], list[int]], Tensor]


class Folded:
    """The network in evaluation mode: images ``[N, 3, H, W]`` -> logits.

    Args:
        model: torchvision's GoogLeNet or ours; it stays as it is.
        dtype: of the computation.
        conv: convolution + bias + ReLU.
    """

    def __init__(self, model: Any, dtype: torch.dtype, conv: Conv) -> None:
        self.model, self.dtype, self.conv = model, dtype, conv
        self.fc = (model.fc.weight.detach().to(dtype), model.fc.bias.detach().to(dtype))
        self.folded: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for block in model.modules():
            if isinstance(getattr(block, "conv", None), nn.Conv2d):
                weight, bias = fold(block)
                weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
                self.folded[block] = (weight, bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.maxpool1(self._conv(m.conv1, x))
        x = m.maxpool2(self._conv(m.conv3, self._conv(m.conv2, x)))
        x = m.maxpool3(self._inception(m.inception3b, self._inception(m.inception3a, x)))
        for block in (m.inception4a, m.inception4b, m.inception4c, m.inception4d, m.inception4e):
            x = self._inception(block, x)
        x = m.maxpool4(x)
        x = self._inception(m.inception5b, self._inception(m.inception5a, x))
        return F.linear(torch.flatten(m.avgpool(x), 1), *self.fc)

    def _conv(self, block: Any, x: Tensor) -> Tensor:
        conv = block.conv
        return self.conv(x, *self.folded[block], list(conv.stride), list(conv.padding))

    def _inception(self, block: Any, x: Tensor) -> Tensor:
        two = (self._conv(b[1], self._conv(b[0], x)) for b in (block.branch2, block.branch3))
        pool = block.branch4
        return torch.cat([self._conv(block.branch1, x), *two, self._conv(pool[1], pool[0](x))], 1)


def plain_relu() -> Conv:
    """PyTorch's convolution and ReLU."""

    def conv(
        x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding).relu_()

    return conv


def cudnn_relu() -> Conv:
    """cuDNN's fused kernel, as torch calls it."""

    def conv(
        x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]
    ) -> Tensor:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, [1, 1], 1)

    return conv


def cudnn_frontend() -> Conv:
    """cuDNN's graphs of three operations, by its own Python package, one for each layer."""
    import cudnn

    handle = cudnn.create_handle()
    types = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    types[torch.float32] = cudnn.data_type.FLOAT
    built: dict[Any, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

    def build(
        x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]
    ) -> Any:
        graph = cudnn.pygraph(
            handle=handle,
            io_data_type=types[x.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        gx, gw = graph.tensor_like(x), graph.tensor_like(weight)
        gb = graph.tensor_like(bias)
        product = graph.conv_fprop(
            image=gx, weight=gw, padding=padding, stride=stride, dilation=[1, 1]
        )
        gy = graph.relu(input=graph.bias(name="bias", input=product, bias=gb))
        gy.set_output(True)
        graph.build([cudnn.heur_mode.A])
        memory = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)
        p, q = (
            (size + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1
            for i, size in enumerate(x.shape[2:])
        )

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = torch.empty(
                (x.shape[0], weight.shape[0], p, q),
                dtype=x.dtype,
                device=x.device,
                memory_format=torch.channels_last,
            )
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute({gx: x, gw: weight, gb: bias, gy: y}, memory, handle=handle)
            return y

        return run

    def conv(
        x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]
    ) -> Tensor:
        bias = bias.view(1, -1, 1, 1)
        key = (x.shape, x.stride(), x.dtype, weight.shape, *stride, *padding)
        if key not in built:
            built[key] = build(x, weight, bias, stride, padding)
        return built[key](x, weight, bias)

    return conv
