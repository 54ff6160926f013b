"""The contestants: each factory returns ``call(i)``, or raises with the reason why it cannot.

Every contestant gets the layout and the settings that suit it best, the same number of threads,
and inputs that are ready in memory.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from workload import Workload, torchvision_googlenet

import inception_ext

Call = Callable[[int], Any]
Factory = Callable[[Workload, torch.dtype], Call]

BASELINE = "eager channels_last"


def _inference(model: Callable[[torch.Tensor], Any], inputs: list[torch.Tensor]) -> Call:
    def call(i: int) -> Any:
        with torch.inference_mode():
            return model(inputs[i])

    return call


def _channels_last(work: Workload, dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in work.images]


def ours_freeze(work: Workload, dtype: torch.dtype) -> Call:
    model = work.model(inception_ext.googlenet)
    return _inference(inception_ext.freeze(model, dtype=dtype), _channels_last(work, dtype))


def ours_eval(work: Workload, dtype: torch.dtype) -> Call:
    model = work.model(inception_ext.googlenet)
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    return _inference(model, _channels_last(work, dtype))


def eager(work: Workload, dtype: torch.dtype) -> Call:
    model = work.model(torchvision_googlenet()).to(dtype)
    return _inference(model, [x.to(dtype) for x in work.images])


def eager_channels_last(work: Workload, dtype: torch.dtype) -> Call:
    model = work.model(torchvision_googlenet())
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    return _inference(model, _channels_last(work, dtype))


def compile_frozen(work: Workload, dtype: torch.dtype) -> Call:
    torch._dynamo.reset()
    model = work.model(torchvision_googlenet())
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, options={"freezing": True})
    inputs = _channels_last(work, dtype)

    def call(i: int) -> Any:
        with torch.no_grad():  # freezing is skipped in inference mode
            return compiled(inputs[i])

    return call


def _onnx_bytes(work: Workload, dtype: torch.dtype) -> bytes:
    """torchvision's network with the batch size of these images fixed in it."""
    model = work.model(torchvision_googlenet()).to(dtype)
    example = (work.images[0].to(dtype),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        program = torch.onnx.export(
            model,
            example,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def _bfloat16_convolution() -> bytes:
    """An ONNX model of one bfloat16 convolution."""
    import onnx
    from onnx import TensorProto, helper

    values = {"x": [1, 1, 4, 4], "w": [1, 1, 1, 1], "y": [1, 1, 4, 4]}
    x, w, y = (
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape)
        for name, shape in values.items()
    )
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="bfloat16_convolution")],
        "probe",
        [x, w],
        [y],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    )
    return model.SerializeToString()


def onnxruntime(work: Workload, dtype: torch.dtype) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Its threads wait for work by spinning: within a call that is fast, between calls it would
    # take the cores from the next contestant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    if dtype == torch.bfloat16:  # raises with the reason where it has no such convolution
        ort.InferenceSession(_bfloat16_convolution(), options, providers=providers)
    session = ort.InferenceSession(_onnx_bytes(work, dtype), options, providers=providers)
    inputs = [{"images": x.numpy()} for x in work.images]
    return lambda i: session.run(None, inputs[i])[0]


def openvino(work: Workload, dtype: torch.dtype) -> Call:
    import openvino as ov

    core = ov.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    if precision == "bf16" and "BF16" not in able:
        raise NotImplementedError(f"no bfloat16 on this CPU, only {', '.join(able)}")
    compiled = core.compile_model(
        core.read_model(_onnx_bytes(work, torch.float32)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    inputs = [x.numpy() for x in work.images]

    def call(i: int) -> Any:
        return request.infer({0: inputs[i]}, share_inputs=True)[compiled.output(0)]

    return call


def _training(
    work: Workload, dtype: torch.dtype, build: Callable[..., nn.Module], **kw: Any
) -> Call:
    """Forward with both heads, loss, backward; without optimizer. bfloat16 means autocast."""
    model = work.model(build).to(memory_format=torch.channels_last)
    criterion = inception_ext.GoogLeNetLoss()
    inputs = _channels_last(work, torch.float32)
    parameters = list(model.parameters())
    run = torch.compile(model, **kw) if kw else model

    def call(i: int) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = criterion(run(inputs[i]), work.labels[i])
        loss.backward()
        return [loss.detach(), *(p.grad for p in parameters)]

    return call


def train_ours(work: Workload, dtype: torch.dtype) -> Call:
    return _training(work, dtype, inception_ext.googlenet)


def train_eager(work: Workload, dtype: torch.dtype) -> Call:
    return _training(work, dtype, torchvision_googlenet())


def train_compile(work: Workload, dtype: torch.dtype) -> Call:
    torch._dynamo.reset()
    return _training(work, dtype, torchvision_googlenet(), dynamic=False, fullgraph=True)


INFERENCE: dict[str, Factory] = {
    "ours freeze": ours_freeze,
    "ours eval": ours_eval,
    "eager": eager,
    BASELINE: eager_channels_last,
    "compile frozen": compile_frozen,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}

TRAINING: dict[str, Factory] = {
    "ours": train_ours,
    BASELINE: train_eager,
    "compile": train_compile,
}
