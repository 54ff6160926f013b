"""The steps of gpu_report.py, each run as a process of its own: a line of JSON for each finding.

    python benchmarks/gpu_steps.py network --lines out.jsonl

A step orders its work by what it is worth, and writes each finding when it has it, so that one that
is stopped, or that a broken kernel takes down, leaves what it found until then.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import environment
import floors
import floors_training
import gpu_correctness
import gpu_kernels
import gpu_layers
import module_work
import peers_cuda
import roofs
import scenario
import training_parts
import workload
from devices import Device, device_for

Findings = Iterator[dict[str, Any]]


@dataclass
class Job:
    """What a step works on; tiny on a CPU, where it only shows that everything runs."""

    device: Device
    batches: tuple[int, ...] = (8, 1, 128, 32, 256)  # the most telling first
    size: int = 224
    rounds: int = 10
    dtype: str = "fp16"
    parts: tuple[str, ...] = ("stem", *module_work.MODULES)
    weights: dict[bool, dict[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def on(cls, name: str) -> "Job":
        device = device_for(name)
        if device.type == "cuda":
            return cls(device)
        torch.set_num_threads(1)
        parts = ("stem", module_work.MODULES[0])
        return cls(device, batches=(1, 2), size=64, rounds=2, dtype="fp32", parts=parts)

    def state_dict(self, heads: bool) -> dict[str, torch.Tensor]:
        if heads not in self.weights:
            self.weights[heads] = workload.seeded_weights(heads=heads)
        return self.weights[heads]

    def inference(self, batch: int) -> workload.Workload:
        weights = self.state_dict(False)
        return workload.inference_workload(
            weights, batch, size=self.size, inputs=2, checked=1, device=self.device.type
        )

    @property
    def element_size(self) -> int:
        return scenario.DTYPES[self.dtype].itemsize


def environment_step(job: Job) -> Findings:
    from inception_ext import _library

    yield {"environment": environment.describe(), "binary": _library.build_info()}
    roof = roofs.measure(job.device, scenario.DTYPES[job.dtype])
    nothing = [job.device.seconds(lambda: None) for _ in range(100)]
    yield {
        "roof": {"flops": roof.flops, "bytes": roof.bytes, "dtype": job.dtype},
        "seconds_of_nothing": sorted(nothing)[50],
    }


def correctness_step(job: Job) -> Findings:
    yield from gpu_correctness.findings(job)
    yield from gpu_layers.checks(job)


def network_step(job: Job) -> Findings:
    """Ours, eager in all its ways, and cuDNN's fused convolutions."""
    names = [name for name in peers_cuda.INFERENCE if not name.startswith("compile")]
    yield from _inference(job, names, memory=True)
    yield from _inference(job, _SHORT, cold=True)


_SHORT = ("ours freeze", "ours freeze, CUDA graph", peers_cuda.baseline, "eager CUDA graph")


def compile_step(job: Job) -> Findings:
    """torch.compile by default, by itself and in a CUDA graph."""
    yield from _inference(job, (*_SHORT, "compile", "compile CUDA graph"))


def autotune_step(job: Job) -> Findings:
    """torch.compile with max-autotune and freezing, which takes minutes a batch size."""
    yield from _inference(job, (*_SHORT, "compile max-autotune frozen, CUDA graph"))


def _inference(
    job: Job, names: tuple[str, ...] | list[str], *, cold: bool = False, memory: bool = False
) -> Findings:
    if cold and job.device.type != "cuda":
        return
    roof = roofs.measure(job.device, scenario.DTYPES[job.dtype])
    layers = floors.trace(floors.network(), job.size)
    chain = floors.stages(layers, "all fused", job.element_size)
    for batch in job.batches:
        found = scenario.run(
            "inference",
            {name: peers_cuda.INFERENCE[name] for name in names},
            job.inference(batch),
            job.dtype,
            device=job.device,
            rounds=job.rounds,
            cold=cold,
            memory=memory,
            floor=floors.seconds(chain, batch, roof),
            floor_of=f"all fused, {roof.name}",
        )
        yield {"scenario": found}


def kernels_step(job: Job) -> Findings:
    yield from gpu_kernels.kernels(job)
    yield from gpu_layers.kernels(job)


def modules_step(job: Job) -> Findings:
    yield from gpu_kernels.modules(job)


def training_step(job: Job) -> Findings:
    """Forward, backward, both, and with the optimizer; eager, and each in a CUDA graph."""
    yield from _training(job, compiled=False)


def training_compile_step(job: Job) -> Findings:
    """The same against torch.compile, which takes a minute a dtype and batch size."""
    yield from _training(job, compiled=True)


def _training(job: Job, *, compiled: bool) -> Findings:
    """The most telling first: a step at batch 128 in mixed precision."""
    on_gpu = job.device.type == "cuda"
    dtypes = ("fp16", "bf16", "fp32") if on_gpu else (job.dtype,)
    layers = floors.trace(floors.network(), job.size)
    check = workload.decided_workload(job.state_dict(True), device=job.device.type)
    if on_gpu and not compiled:
        for dtype in dtypes:
            entrants = training_parts.contestants("step", graphs=False, compiled=False)
            found = scenario.run(
                "training check", entrants, check, dtype, device=job.device, rounds=2
            )
            yield {"scenario": found}
    for batch in (128, 32, 256) if on_gpu else (None,):
        work = check
        if batch is not None:
            work = workload.training_workload(
                job.state_dict(True), batch, size=job.size, device=job.device.type
            )
        for dtype in dtypes:
            roof = roofs.measure(job.device, scenario.DTYPES[dtype])
            element_size = scenario.DTYPES[dtype].itemsize
            chain = floors_training.stages(layers, "fused", element_size)
            floor = {
                "floor": floors.seconds(chain, len(work.images[0]), roof),
                "floor_of": f"fused, without the auxiliary heads, {roof.name}",
                "memory": True,
            }
            for part, kind in training_parts.PARTS.items():
                found = scenario.run(
                    kind,
                    training_parts.contestants(part, graphs=not compiled, compiled=compiled),
                    training_parts.work_of(part, work),
                    dtype,
                    device=job.device,
                    rounds=job.rounds,
                    by_chance=batch is not None and part != "forward",
                    **(floor if part == "step" else {}),
                )
                yield {"scenario": found}


STEPS: Mapping[str, Callable[[Job], Findings]] = {
    "environment": environment_step,
    "correctness": correctness_step,
    "network": network_step,
    "kernels": kernels_step,
    "modules": modules_step,
    "compile": compile_step,
    "training": training_step,
    "training-compile": training_compile_step,
    "autotune": autotune_step,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--lines", type=Path, required=True, help="where the findings go")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args = parser.parse_args(argv)
    with args.lines.open("a", encoding="utf-8") as lines:
        for finding in STEPS[args.step](Job.on(args.device)):
            lines.write(json.dumps(finding) + "\n")
            lines.flush()
            if "scenario" in finding:
                print(scenario.table(finding["scenario"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
