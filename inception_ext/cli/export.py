"""Write a network as ONNX, as a torch.export program, or compiled ahead of time (AOTInductor).

The graph is that of the plain PyTorch operations: it needs nothing of this package to run. What is
written is loaded again and compared with the network; the exit status is 1 where they differ.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inception_ext._console import CommandError, require, say
from inception_ext._files import make_folder
from inception_ext.cli._arguments import positive

__all__ = ["FORMATS", "add_arguments", "run"]

TOLERANCE = 1e-3  # of the largest logit
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".aoti.pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="a checkpoint of train, a state_dict, or DEFAULT: the published weights",
    )
    parser.add_argument("--averaged", action="store_true", help="the averaged weights in FILE")
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx", help="default: onnx")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: googlenet.SUFFIX")
    parser.add_argument("--size", type=positive, help="of the images; default: as trained")
    parser.add_argument("-b", "--batch-size", type=positive, default=1, help="of a fixed batch")
    parser.add_argument("--dynamic-batch", action="store_true", help="any number of images")
    parser.add_argument("--threads", type=positive, help="of PyTorch")


def run(args: argparse.Namespace) -> int:
    from inception_ext.trained import load_trained

    if args.format == "onnx":
        require("export", onnx="onnx", onnxscript="onnxscript", onnxruntime="onnxruntime")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        trained = load_trained(args.weights, args.averaged)
    except (FileNotFoundError, RuntimeError) as error:
        raise CommandError(str(error).splitlines()[0]) from error
    trained.model.aux1 = trained.model.aux2 = None  # they are for training
    size = args.size or trained.crop
    path: Path = args.output or Path(f"googlenet{SUFFIXES[args.format]}")
    make_folder(path.parent)

    torch.manual_seed(0)
    # A dynamic dimension wants an example of more than one.
    batch = max(2, args.batch_size) if args.dynamic_batch else args.batch_size
    images = torch.randn(batch, 3, size, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters warn of torch
            call = FORMATS[args.format](trained.model, images, args.dynamic_batch, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:
        raise CommandError(f"{args.format}: {str(error).splitlines()[0]}") from error

    worst = 0.0
    for number in sorted({batch, 1, 3} if args.dynamic_batch else {batch}):
        images = torch.randn(number, 3, size, size)
        with torch.no_grad():
            want = trained.model(images)
        difference = (call(images) - want).abs().max() / want.abs().max()
        worst = max(worst, difference.item())
    batches = "any number of" if args.dynamic_batch else str(batch)
    say(
        f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB, {batches} images of {size} x "
        f"{size}, normalised as in training; largest difference from the network {worst:.1e} "
        "of the largest logit"
    )
    if not worst <= TOLERANCE:
        raise CommandError(f"{path} differs from the network by {worst:.1e}, beyond {TOLERANCE}")
    return 0


Call = Callable[[Tensor], Tensor]


def _shapes(dynamic: bool) -> Any:
    return ({0: torch.export.Dim("batch")},) if dynamic else None


def _onnx(model: nn.Module, images: Tensor, dynamic: bool, path: Path) -> Call:
    """Writes ONNX; returns it in ONNX Runtime."""
    import onnxruntime

    torch.onnx.export(
        model,
        (images,),
        str(path),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_shapes(dynamic),
        external_data=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _torch(model: nn.Module, images: Tensor, dynamic: bool, path: Path) -> Call:
    """Writes a torch.export program; returns it loaded."""
    program = torch.export.export(model, (images,), dynamic_shapes=_shapes(dynamic))
    torch.export.save(program, path)
    module: Any = torch.export.load(path).module()
    return _without_grad(module)


def _aoti(model: nn.Module, images: Tensor, dynamic: bool, path: Path) -> Call:
    """Compiles by AOTInductor; returns what was compiled."""
    program = torch.export.export(model, (images,), dynamic_shapes=_shapes(dynamic))
    inductor: Any = torch._inductor
    settings = {"aot_inductor.precompile_headers": False}  # pays where many are compiled
    inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return _without_grad(inductor.aoti_load_package(str(path)))


def _without_grad(function: Call) -> Call:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x)

    return call


FORMATS: dict[str, Callable[[nn.Module, Tensor, bool, Path], Call]] = {
    "onnx": _onnx,
    "torch": _torch,
    "aoti": _aoti,
}
