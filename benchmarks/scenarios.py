"""The scenarios of ``python -m benchmarks``: what each measures, and where it runs by default."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import counts
import floors
import floors_training
import module_work
import overhead
import peers
import peers_cuda
import roofs
import scenario
import torch
import training_parts
import workload
from devices import Device

import inception_ext
from inception_ext.functional import use_kernels

__all__ = ["SCENARIOS", "Options", "Scenario"]

Found = Iterator[dict[str, Any]]


@dataclass
class Options:
    """What a run was asked for.

    Args:
        device: where to run.
        quick: tiny shapes and few rounds, without contestants that take long to build.
        only: contestants whose name contains one of these; all where it is empty.
        rounds: turns of each contestant; None: by the batch.
        patience: seconds to spend on disturbed rounds, see :func:`timing.interleave`.
        dtypes: None: those that the scenario has for the device.
    """

    device: Device
    quick: bool = False
    only: tuple[str, ...] = ()
    rounds: int | None = None
    patience: float = 0.0
    dtypes: tuple[str, ...] | None = None
    _weights: dict[bool, dict[str, torch.Tensor]] = field(default_factory=dict)
    _roofs: dict[str, floors.Roof] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def size(self) -> int:
        return 64 if self.quick else 224

    def batch(self, batch: int) -> int:
        return min(batch, 2) if self.quick else batch

    def rounds_of(self, batch: int) -> int:
        if self.rounds is not None or self.quick:
            return self.rounds or 2
        return 10 if self.on_gpu else scenario.rounds_for(batch)

    def weights(self, heads: bool) -> dict[str, torch.Tensor]:
        if heads not in self._weights:
            self._weights[heads] = workload.seeded_weights(heads=heads)
        return self._weights[heads]

    def roof(self, dtype: str) -> floors.Roof:
        if dtype not in self._roofs:
            self._roofs[dtype] = roofs.measure(self.device, scenario.DTYPES[dtype])
        return self._roofs[dtype]

    def contestants(self, factories: Mapping[str, Any]) -> dict[str, Any]:
        """Those that were asked for; the baseline always takes part."""
        found = {}
        for name, factory in factories.items():
            asked = not self.only or any(word in name for word in self.only)
            if asked or name == peers.BASELINE:
                slow = any(word in name for word in _SLOW) and self.quick
                found[name] = _left_out if slow else factory
        return found


_SLOW = ("compile", "onnxruntime", "openvino", "tensorrt")


def _left_out(work: Any, dtype: Any) -> Any:
    raise NotImplementedError("left out by --quick, it takes long to build")


class Scenario(NamedTuple):
    """A name, what it stands for, and its dtypes by device: none where it has to be asked for."""

    name: str
    about: str
    run: Callable[[Options, str], Found]
    on_gpu: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()

    def dtypes(self, options: Options, asked_for: bool) -> tuple[str, ...]:
        default = self.on_gpu if options.on_gpu else self.on_cpu
        if asked_for and not default:
            default = ("fp16",) if options.on_gpu else ("fp32",)
        return options.dtypes if options.dtypes and default else default


def _run(
    options: Options, kind: str, factories: Mapping[str, Any], work: Any, dtype: str, **more: Any
) -> dict[str, Any]:
    batch = len(work.images[0])
    return scenario.run(
        kind,
        options.contestants(factories),
        work,
        dtype,
        device=options.device,
        rounds=options.rounds_of(batch),
        patience=options.patience,
        **more,
    )


def floor_of(
    options: Options, dtype: str, batch: int, size: int, parts: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The floor of a forward pass (of some parts) as arguments of scenario.run."""
    layers = floors.trace(floors.network(), size)
    layers = [layer for layer in layers if not parts or layer.part in parts]
    chain = floors.stages(layers, "all fused", scenario.DTYPES[dtype].itemsize)
    roof = options.roof(dtype)
    return {
        "floor": floors.seconds(chain, batch, roof),
        "floor_of": f"all fused, {roof.name}",
    }


def inference(batch: int, options: Options, dtype: str) -> Found:
    batch = options.batch(batch)
    factories = peers_cuda.INFERENCE if options.on_gpu else peers.INFERENCE
    work = workload.inference_workload(
        options.weights(False), batch, size=options.size, device=options.device.type
    )
    floor = floor_of(options, dtype, batch, options.size)
    counted = counts.for_batch(batch, dtype) if options.on_gpu else None
    facts = {**floor, "counters": counted} if counted else floor
    for cold in (False, True) if options.on_gpu else (False,):
        memory = not cold
        yield _run(options, "inference", factories, work, dtype, cold=cold, memory=memory, **facts)


def training(batch: int, options: Options, dtype: str) -> Found:
    """A check on small images that tells wrong gradients from rounding, then the step itself."""
    on_gpu = options.on_gpu
    factories = training_parts.contestants("step") if on_gpu else peers.TRAINING
    check = workload.decided_workload(options.weights(True), device=options.device.type)
    judged = {name: factories[name] for name in ("ours", peers.BASELINE)}
    entrants = factories if options.quick else judged
    yield _run(options, "training check", entrants, check, dtype, memory=True)
    if options.quick:
        return
    work = workload.training_workload(
        options.weights(True), batch, size=options.size, device=options.device.type
    )
    layers = floors.trace(floors.network(), options.size)
    chain = floors_training.stages(layers, "fused", scenario.DTYPES[dtype].itemsize)
    roof = options.roof(dtype)
    floor = {
        "floor": floors.seconds(chain, batch, roof),
        "floor_of": f"fused, without the auxiliary heads, {roof.name}",
    }
    yield _run(
        options, "training step", factories, work, dtype, memory=True, by_chance=True, **floor
    )


def modules(names: tuple[str, ...], batch: int, options: Options, dtype: str) -> Found:
    """Forward in evaluation, then forward and backward in training.

    The stem's max pools decide between rounded values. So its gradients are checked on small
    images, like those of the training step.
    """
    batch = options.batch(batch)
    if "stem" in names:
        check = module_work.decided_stem(options.weights(False), device=options.device.type)
        judged = {name: module_work.TRAINING[name] for name in ("ours", peers.BASELINE)}
        entrants = module_work.TRAINING if options.quick else judged
        yield _run(options, "training check stem", entrants, check, dtype)
    for training in (False, True):
        works = module_work.prepare(
            options.weights(False),
            names,
            batch,
            size=options.size,
            device=options.device.type,
            training=training,
        )
        for work in works:
            if training:
                yield _run(
                    options,
                    f"training {work.name}",
                    module_work.TRAINING,
                    work,
                    dtype,
                    memory=True,
                    by_chance=work.name == "stem",
                )
                continue
            parts = module_work.STEM if work.name == "stem" else (work.name,)
            floor = floor_of(options, dtype, batch, options.size, parts)
            yield _run(options, work.name, module_work.FORWARD, work, dtype, **floor)


def bvlc(batch: int, options: Options, dtype: str) -> Found:
    """The network of 2014: frozen, as it is, and in plain PyTorch."""
    batch = options.batch(batch)
    torch.manual_seed(0)
    state_dict = inception_ext.bvlc_googlenet(aux_logits=False).state_dict()

    def build(**arguments: Any) -> torch.nn.Module:
        del arguments["weights"], arguments["transform_input"]
        return inception_ext.bvlc_googlenet(**arguments)

    work = workload.inference_workload(
        state_dict, batch, size=options.size, device=options.device.type, build=build
    )

    def plain(work: workload.Workload, dtype: torch.dtype) -> Any:
        call = peers._inference(_model(work, build, dtype), peers._channels_last(work, dtype))

        def without_kernels(i: int) -> Any:
            with use_kernels(False):
                return call(i)

        return without_kernels

    factories = {
        "ours freeze": partial(_bvlc_freeze, build),
        "ours eval": lambda work, dtype: peers._inference(
            _model(work, build, dtype), peers._channels_last(work, dtype)
        ),
        peers.BASELINE: plain,
        "eager CUDA graph": peers_cuda.graphed(plain),
    }
    yield _run(options, "bvlc_googlenet inference", factories, work, dtype, memory=True)


def _model(work: workload.Workload, build: Any, dtype: torch.dtype) -> torch.nn.Module:
    return work.model(build).to(dtype=dtype, memory_format=torch.channels_last)


def _bvlc_freeze(build: Any, work: workload.Workload, dtype: torch.dtype) -> Any:
    engine = inception_ext.freeze(work.model(build), dtype=dtype)
    return peers._inference(engine, peers._channels_last(work, dtype))


def _growth(options: Options, dtype: str, batch: int, size: int, axis: str) -> dict[str, Any]:
    work = workload.inference_workload(
        options.weights(False), batch, size=size, inputs=2, checked=1, device=options.device.type
    )
    factories = peers_cuda.INFERENCE if options.on_gpu else peers.INFERENCE
    names = ("ours freeze", "ours eval", peers.BASELINE, "eager CUDA graph")
    few = {name: factories[name] for name in names if name in factories}
    facts = {"axis": axis, "threads": torch.get_num_threads()}
    rounds = options.rounds_of(batch) if options.on_gpu else max(3, 12 // batch)
    warmup = 2 if batch < 64 else 1
    return scenario.run(
        "inference",
        options.contestants(few),
        work,
        dtype,
        device=options.device,
        rounds=2 if options.quick else options.rounds or rounds,
        patience=options.patience,
        warmup=warmup,
        **floor_of(options, dtype, batch, size),
        **facts,
    )


def growth_batch(batches: tuple[int, ...], options: Options, dtype: str) -> Found:
    for batch in (1, 2) if options.quick else batches:
        yield _growth(options, dtype, batch, options.size, "batch")


def growth_size(options: Options, dtype: str) -> Found:
    batch = 8 if options.on_gpu else 1
    for size in (33, 64) if options.quick else (64, 96, 128, 160, 224, 299, 384, 512):
        yield _growth(options, dtype, batch, size, "size")


def growth_threads(options: Options, dtype: str) -> Found:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            options._roofs.clear()
            yield _growth(options, dtype, options.batch(8), options.size, "threads")
    finally:
        torch.set_num_threads(before)
        options._roofs.clear()


def layers_overhead(options: Options, dtype: str) -> Found:
    yield overhead.measure(rounds=3 if options.quick else 40)


_HALF = ("fp16",)
_BOTH = ("fp32", "bf16")
SCENARIOS = {
    found.name: found
    for found in (
        *(
            Scenario(
                f"I{n}",
                f"inference, batch {n}",
                partial(inference, n),
                _HALF,
                _BOTH if n <= 32 else (),
            )
            for n in (1, 8, 32, 128, 256)
        ),
        Scenario("T16", "training step, batch 16", partial(training, 16), (), ("fp32",)),
        *(
            Scenario(f"T{n}", f"training step, batch {n}", partial(training, n), ("bf16",))
            for n in (32, 128, 256)
        ),
        Scenario(
            "TM",
            "memory of a training step: saved for backward, and at most",
            partial(training, 8),
            ("bf16",),
            ("fp32",),
        ),
        *(
            Scenario(
                name.removeprefix("inception"),
                f"{name}, batch 8: forward, and forward + backward",
                partial(modules, (name,), 8),
                _HALF,
                ("fp32",),
            )
            for name in ("stem", *module_work.MODULES)
        ),
        Scenario("bvlc", "bvlc_googlenet, batch 8", partial(bvlc, 8), _HALF, ("fp32",)),
        Scenario(
            "growth-batch",
            "inference, batch 1 to 64",
            partial(growth_batch, (1, 2, 4, 8, 16, 32, 64)),
            _HALF,
            ("fp32",),
        ),
        Scenario(
            "growth-large-batch",
            "inference, batch 128 to 512",
            partial(growth_batch, (128, 256, 512)),
            _HALF,
            ("fp32",),
        ),
        Scenario("growth-size", "inference, side 64 to 512", growth_size, _HALF, ("fp32",)),
        Scenario("growth-threads", "inference, 1 and 2 threads", growth_threads, (), ("fp32",)),
        Scenario(
            "overhead", "what each Python layer costs a call", layers_overhead, ("fp32",), ("fp32",)
        ),
    )
}
