"""Timing cases in turn, round by round, so that a busy moment of the machine strikes all of them.

Speed is read from the ratio of two cases within a round, and from the median of those ratios over
the rounds; a ratio of two medians would mix quiet rounds of one with busy rounds of the other.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLE = 2e-3  # seconds: a case that is faster runs several times for one sample
MOST_CALLS = 100
FEWEST_ROUNDS = 3


@dataclass
class Case:
    """One contestant. `after` runs untimed behind each sample; `facts` go to the report as is."""

    name: str
    run: Callable[[], object]
    after: Callable[[], object] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def interleave(
    cases: Sequence[Case], rounds: int, device: str = "cpu", budget: float = 600.0
) -> dict[str, list[float]]:
    """Seconds per call of each case, one number for each round.

    Every case runs twice first, untimed. The order within a round is shuffled, so that no case
    always finds the caches as one certain other leaves them.

    Args:
        cases: contestants with distinct names.
        rounds: how many; fewer, but at least 3, where so many would take longer than `budget`.
        device: "cpu", or a CUDA device, which is timed by its own events.
        budget: seconds.
    """
    calls = {}
    for case in cases:
        case.run()
        once = _timed(case.run, 1, device)
        calls[case.name] = max(1, min(MOST_CALLS, int(SAMPLE / once)))
        _after(case)
    order, shuffle = list(cases), random.Random(0)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    start = time.perf_counter()
    for done in range(rounds):
        shuffle.shuffle(order)
        for case in order:
            seconds[case.name].append(_timed(case.run, calls[case.name], device))
            _after(case)
        spent = time.perf_counter() - start
        if done + 1 >= FEWEST_ROUNDS and spent * (done + 2) / (done + 1) > budget:
            break
    return seconds


def _after(case: Case) -> None:
    if case.after is not None:
        case.after()


def _timed(run: Callable[[], object], calls: int, device: str) -> float:
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def ratio(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of times / reference, the ratio taken round by round."""
    return quartiles([a / b for a, b in zip(times, reference, strict=True)])


def copy_case(nbytes: int, device: str) -> Case:
    """torch's copy of one large buffer, the measure of what the memory gives in this run."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return Case("copy", lambda: target.copy_(source), facts={"bytes": 2 * nbytes})
