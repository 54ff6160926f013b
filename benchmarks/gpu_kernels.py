"""Times of every launch of the frozen network, and of its modules one by one."""

from collections.abc import Callable, Iterator
from typing import Any

import floors
import launches
import module_work
import roofs
import scenario
import torch
from devices import Device, captured
from timing import summarize

import inception_ext

__all__ = ["kernels", "modules", "times"]

_REPEATS = 10  # of a launch in a graph: one alone is shorter than the time between two events


def kernels(job: Any) -> Iterator[dict[str, Any]]:
    """Each launch at each batch size: microseconds warm and cold, FLOPs, bytes, floor."""
    roof = roofs.measure(job.device, scenario.DTYPES[job.dtype])
    for batch in job.batches:
        work = job.inference(batch)
        dtype = scenario.DTYPES[job.dtype]
        engine = inception_ext.freeze(work.model(inception_ext.googlenet), dtype=dtype)
        x = work.images[0].to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), launches.Catch() as caught:
            engine(x)
        for index, launch in enumerate(caught.launches):
            scenario.say(f"kernels {job.dtype} batch {batch}: {launches.describe(launch)}")
            flops, size = launches.flops(launch), launches.touched_bytes(launch)
            floor = max(flops / roof.flops, size / roof.bytes)
            found = {"batch": batch, "dtype": job.dtype, "index": index}
            found |= {"name": launches.describe(launch), "flops": flops, "bytes": size}
            found["floor_us"] = floor * 1e6
            try:
                found |= times(job.device, launch)
                found["share_of_floor"] = round(floor / found["warm_us"]["median"] * 1e6, 4)
            except Exception as error:  # the next launch may do better
                found["error"] = f"{type(error).__name__}: {error}"[:300]
            yield {"kernel": found}
        scenario.say("")


def times(device: Device, launch: Callable[[], None]) -> dict[str, Any]:
    """``warm_us``, and on a GPU ``cold_us``: median, p20 and p80."""
    if device.type != "cuda":
        return {"warm_us": _microseconds(lambda: device.seconds(launch))}

    def several() -> None:
        for _ in range(_REPEATS):
            launch()

    many, _ = captured(several)
    one, _ = captured(launch)
    return {
        "warm_us": _microseconds(lambda: device.seconds(many) / _REPEATS),
        "cold_us": _microseconds(lambda: device.seconds(one, cold=True)),
    }


def _microseconds(sample: Callable[[], float], count: int = 30) -> dict[str, float]:
    sample()
    summary = summarize([sample() for _ in range(count)])
    return {key: round(getattr(summary, key) * 1e6, 3) for key in ("median", "p20", "p80")}


def modules(job: Any) -> Iterator[dict[str, Any]]:
    """The nine modules and the stem: ours, eager, and eager in a CUDA graph."""
    roof = roofs.measure(job.device, scenario.DTYPES[job.dtype])
    layers = floors.trace(floors.network(), job.size)
    names = [name for name in module_work.FORWARD if not name.startswith("compile")]
    for batch in job.batches:
        for work in module_work.prepare(
            job.state_dict(False),
            job.parts,
            batch,
            size=job.size,
            device=job.device.type,
        ):
            parts = module_work.STEM if work.name == "stem" else (work.name,)
            of_part = [layer for layer in layers if layer.part in parts]
            chain = floors.stages(of_part, "all fused", job.element_size)
            found = scenario.run(
                work.name,
                {name: module_work.FORWARD[name] for name in names},
                work,  # type: ignore[arg-type]
                job.dtype,
                device=job.device,
                rounds=max(2, job.rounds // 4),
                floor=floors.seconds(chain, batch, roof),
                floor_of=f"all fused, {roof.name}",
            )
            yield {"scenario": found}
