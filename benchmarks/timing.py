"""Check, then time: the one helper behind every benchmark here.

Contestants run interleaved in one process: each round gives every contestant one turn, in an order
that changes from round to round, so that a neighbour's load, a clock that drifts or a warm cache
meets all of them alike.
"""

import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from environment import Company
from torch import Tensor

__all__ = [
    "COMPANY",
    "Candidate",
    "Outcome",
    "Result",
    "Summary",
    "Timing",
    "contest",
    "interleave",
    "largest",
    "relative_error",
    "relative_errors",
    "summarize",
    "together",
]

Call = Callable[[int], Any]  # call(i) runs the contestant on input number i
Timer = Callable[[Callable[[], Any]], float]  # seconds that a call takes

COMPANY = 0.1  # cores that other programs may use before times count as disturbed
SHORT_CALL = 0.1  # s: shorter calls start each turn with one that is not timed
TURN = 0.05  # s: what a turn of short calls lasts, about
MOST = 100  # calls a turn


@dataclass(frozen=True)
class Summary:
    """Statistics of the samples of one contestant, in seconds."""

    samples: int
    median: float
    p20: float
    p80: float


@dataclass
class Timing:
    """What :func:`interleave` measured.

    Args:
        samples: seconds of each timed call, by name, in the order of the contestants.
        others_cores: how many cores other programs used meanwhile; None where the system does not
            tell.
        repeated: rounds that were thrown away and run again.
    """

    samples: dict[str, list[float]]
    others_cores: float | None = None
    repeated: int = 0


@dataclass(frozen=True)
class Candidate:
    """A contestant before it is built.

    Args:
        name: unique in its contest.
        make: builds the contestant and returns its ``call(i)``; an exception means that it does
            not take part, and its text is the reason given.
    """

    name: str
    make: Callable[[], Call]


@dataclass
class Result:
    """How one contestant fared.

    ``status`` is ``"ok"``, ``"wrong"`` (timed, but its error is above the limit) or ``"missing"``
    (not timed; ``reason`` says why).
    """

    name: str
    status: str
    reason: str | None = None
    error: float | None = None
    summary: Summary | None = field(default=None)
    probed: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Results in the order of the candidates; the rest as in :class:`Timing`."""

    results: list[Result]
    others_cores: float | None
    repeated: int


def summarize(samples: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile (linear between samples) of at least one sample."""
    if not samples:
        raise ValueError("samples should hold at least one time")
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples
    return Summary(len(samples), statistics.median(samples), p20=cuts[0], p80=cuts[-1])


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    inputs: int = 1,
    warmup: int = 2,
    seed: int = 0,
    patience: float = 0.0,
    company: Callable[[], Company] = Company,
    clock: Callable[[], float] = time.perf_counter,
    timer: Timer | None = None,
    samples: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Timing:
    """Times every contestant in every round, in a shuffled order.

    A turn is one timed call where calls are long. Where they are shorter than 0.1 s, one untimed
    call comes first (the caches hold the neighbour's data), and as many timed ones follow as fit
    in about 0.05 s.

    Times taken beside other programs are worth little: threads that wait for one another wait for
    the neighbours too. A round in which others used more than 0.1 cores is run again, until that
    has cost ``patience`` seconds; after that every round counts.

    Args:
        calls: ``call(i)`` by name.
        rounds: turns of each contestant.
        inputs: calls rotate over the inputs 0 ... inputs - 1.
        warmup: untimed calls of each contestant before the first round.
        seed: of the order within the rounds.
        patience: seconds to spend on rounds that do not count.
        company: makes the observer of a round.
        clock: seconds, monotonic.
        timer: takes the time of a call; default: by the clock.
        samples: of a turn, all of them timed; None: as many as the calls are short.
        progress: called with the number of finished rounds.
    """
    order = random.Random(seed)
    timing = Timing({name: [] for name in calls})
    turns: dict[str, int] = {}
    counter = dict.fromkeys(calls, 0)

    def timed(name: str) -> float:
        index = counter[name] % inputs
        counter[name] += 1
        if timer is not None:
            return timer(lambda: calls[name](index))
        start = clock()
        calls[name](index)
        return clock() - start

    for name in calls:
        last = [timed(name) for _ in range(max(warmup, 1))][-1]
        if samples is not None:
            continue
        turns[name] = 0 if last >= SHORT_CALL else min(MOST, max(1, round(TURN / max(last, 1e-6))))

    def one_round() -> dict[str, list[float]]:
        found = {}
        names = list(calls)
        order.shuffle(names)
        for name in names:
            if turns.get(name):
                timed(name)
            found[name] = [timed(name) for _ in range(samples or turns[name] or 1)]
        return found

    seen: list[float] = []
    wasted = 0.0
    while (done := len(seen)) < rounds:
        start = clock()
        observer = company()
        in_round = one_round()
        others = observer.cores()
        if others is not None and others > COMPANY and wasted < patience:
            timing.repeated += 1
            wasted += clock() - start
            continue
        seen.append(others or 0.0)
        timing.others_cores = None if others is None else round(statistics.mean(seen), 2)
        for name, times in in_round.items():
            timing.samples[name] += times
        if progress:
            progress(done + 1)
    return timing


def relative_errors(output: Any, reference: Sequence[Tensor] | Tensor) -> list[float]:
    """``|output - reference| / |reference|`` in the 2-norm, of each Tensor of a list.

    The 2-norm, because the largest single difference says little about a gradient: where rounding
    moves one activation across the kink of a ReLU or to another winner of a max pool, single
    elements differ by a tenth in any float32 implementation.

    Args:
        output: what a contestant returned: a Tensor, an array, or a list of them.
        reference: float64 Tensors of the same shapes.
    """
    if isinstance(reference, Tensor):
        output, reference = [output], [reference]
    errors = []
    for got, want in zip(output, reference, strict=True):
        got = torch.as_tensor(got).detach().to(want.device).double()
        if got.shape != want.shape:
            raise ValueError(f"output is {list(got.shape)}, the reference {list(want.shape)}")
        errors.append(((got - want).norm() / want.norm()).item())
    return errors


def relative_error(output: Any, reference: Sequence[Tensor] | Tensor) -> float:
    """The largest of :func:`relative_errors`; NaN where one of them is."""
    return largest([relative_errors(output, reference)])


def largest(errors: Sequence[Sequence[float]]) -> float:
    """The largest error of any result on any input; NaN where one is."""
    return max((error for one in errors for error in one), key=_nan_last)


def together(errors: Sequence[Sequence[float]]) -> float:
    """Root mean square over the inputs, the largest of any result; NaN where one is.

    For gradients, whose errors differ from input to input by more than between implementations:
    how many ReLUs and max pools rounding decides is chance.
    """
    squares = (statistics.fmean(e * e for e in over) for over in zip(*errors, strict=True))
    return max((square**0.5 for square in squares), key=_nan_last)


def _nan_last(error: float) -> float:
    return error if error == error else float("inf")


def contest(
    candidates: Sequence[Candidate],
    references: Sequence[Any],
    *,
    rounds: int,
    limit: Callable[[Mapping[str, float | None]], float],
    judge: Callable[[Sequence[Sequence[float]]], float] = largest,
    inputs: int | None = None,
    warmup: int = 2,
    patience: float = 0.0,
    timer: Timer | None = None,
    probes: Mapping[str, Callable[[Callable[[], Any]], float | None]] | None = None,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Builds, checks and times contestants.

    Args:
        candidates: in the order of the table.
        references: float64 results for the inputs 0, 1, ...; each contestant runs all of them
            before the first is compared, so that an output buffer used twice shows.
        rounds, warmup, patience, timer, progress: as in :func:`interleave`.
        probes: further figures by name, each taken from a call on the first input.
        limit: from the errors of all contestants by name to the largest error that is right.
        judge: from a contestant's errors, by input and result, to one: :func:`largest` or
            :func:`together`.
        inputs: how many inputs the calls rotate over; default: those with a reference.
        announce: called with a line before each slow step.
    """
    results = {candidate.name: Result(candidate.name, "missing") for candidate in candidates}
    calls: dict[str, Call] = {}
    for candidate in candidates:
        result = results[candidate.name]
        announce(f"building {candidate.name}")
        try:
            call = candidate.make()
            outputs = [call(i) for i in range(len(references))]
            errors = [relative_errors(*pair) for pair in zip(outputs, references, strict=True)]
            del outputs
            for name, probe in (probes or {}).items():
                result.probed[name] = probe(partial(call, 0))
        except Exception as error:  # whatever a peer raises is a reason, not the end of the run
            result.reason = _one_line(error)
            continue
        result.error = judge(errors)
        calls[candidate.name] = call

    announce(f"timing {len(calls)} contestants, {rounds} rounds")
    timing = interleave(
        calls,
        rounds=rounds,
        inputs=inputs or len(references),
        warmup=warmup,
        patience=patience,
        timer=timer,
        progress=progress,
    )
    right = limit({name: results[name].error for name in calls}) if calls else 0.0
    for name, samples in timing.samples.items():
        result = results[name]
        result.summary = summarize(samples)
        result.status = "ok" if result.error is not None and result.error <= right else "wrong"
        if result.status == "wrong":
            result.reason = f"error {result.error:.1e} is above {right:.1e}"
    return Outcome(list(results.values()), timing.others_cores, timing.repeated)


def _one_line(error: Exception) -> str:
    text = re.sub(r"^\[\w+\] : \d+ : ", "", str(error).strip()).splitlines()  # ONNX Runtime's head
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
