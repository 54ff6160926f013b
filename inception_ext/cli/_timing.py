"""Times two or more calls side by side; benchmarks/ holds the thorough way."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cpu_in_use", "interleaved_medians"]


def cpu_in_use(seconds: float = 0.3) -> tuple[float, int]:
    """How many cores all programs together use while this one sleeps, and how many there are.

    The first is 0 where the system does not tell (it is Linux's ``/proc/stat`` that does).
    """
    stat = Path("/proc/stat")
    cores = os.cpu_count() or 1
    if not stat.exists():
        return 0.0, cores

    def idle_and_total() -> tuple[int, int]:
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)  # idle and waiting for a disk; guests are in user

    idle, total = idle_and_total()
    time.sleep(seconds)
    later_idle, later_total = idle_and_total()
    share = 1 - (later_idle - idle) / max(later_total - total, 1)
    return share * cores, cores


def interleaved_medians(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, warmup: int = 2
) -> dict[str, float]:
    """Median time of each call in seconds.

    The calls take turns, each turn one untimed and one timed call, until ``seconds`` are over, but
    at least three turns.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}
