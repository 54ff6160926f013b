"""Times two or more calls side by side; benchmarks/ holds the thorough way."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["interleaved_medians"]


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
