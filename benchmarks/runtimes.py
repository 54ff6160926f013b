"""Inference runtimes beside PyTorch, on a GPU: TensorRT, ONNX Runtime, OpenVINO."""

from collections.abc import Callable
from typing import Any

import torch
from peers import _onnx_bytes
from workload import Workload

__all__ = ["onnxruntime_cuda", "openvino_cuda", "tensorrt"]

Call = Callable[[int], Any]


def tensorrt(work: Workload, dtype: torch.dtype) -> Call:
    """torchvision's network through ONNX, in its dtypes ("strongly typed")."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_onnx_bytes(work, dtype)):
        raise RuntimeError(str(parser.get_error(0)))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    inputs = [x.to(dtype) for x in work.images]
    logits = torch.empty(len(inputs[0]), 1000, dtype=dtype, device=inputs[0].device)
    context.set_tensor_address("logits", logits.data_ptr())

    def call(i: int) -> torch.Tensor:
        context.set_tensor_address("images", inputs[i].data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        if not context.execute_async_v3(stream):
            raise RuntimeError("TensorRT could not start the engine")
        return logits.clone()

    return call


def onnxruntime_cuda(work: Workload, dtype: torch.dtype) -> Call:
    """The same file on ONNX Runtime's CUDA provider, inputs and outputs in the GPU's memory."""
    import onnxruntime as ort

    available = ort.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise NotImplementedError(f"this onnxruntime has no CUDA, only {', '.join(available)}")
    if dtype == torch.bfloat16:
        raise NotImplementedError("no bfloat16 convolution")
    stream = torch.cuda.current_stream().cuda_stream
    session = ort.InferenceSession(
        _onnx_bytes(work, dtype),
        providers=[("CUDAExecutionProvider", {"user_compute_stream": str(stream)})],
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        raise NotImplementedError("its CUDA provider does not load")
    inputs = [x.to(dtype).contiguous() for x in work.images]
    logits = torch.empty(len(inputs[0]), 1000, dtype=dtype, device=inputs[0].device)
    element = {torch.float16: "float16", torch.float32: "float32"}[dtype]
    bindings = []
    for x in inputs:
        binding = session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, "images", x),
            (binding.bind_output, "logits", logits),
        ):
            bind(name, "cuda", 0, _numpy_type(element), tuple(tensor.shape), tensor.data_ptr())
        bindings.append(binding)

    def call(i: int) -> torch.Tensor:
        session.run_with_iobinding(bindings[i])
        return logits.clone()

    return call


def _numpy_type(name: str) -> Any:
    import numpy

    return getattr(numpy, name)


def openvino_cuda(work: Workload, dtype: torch.dtype) -> Call:
    import openvino as ov

    devices = ov.Core().available_devices
    raise NotImplementedError(f"OpenVINO runs on {', '.join(devices)}, not on NVIDIA GPUs")
