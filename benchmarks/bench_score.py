"""Time of adding up gradients; time and memory of selecting the top 1 % of the scores."""

from __future__ import annotations

from collections.abc import Callable

import memory
import pytest
import score_cases


@pytest.mark.parametrize("case", [*score_cases.ACCUMULATE, "copy"])
def bench_accumulate(weights: int, case: str, report: Callable[..., None]) -> None:
    report("accumulate", weights, case, score_cases.accumulate_cases)


@pytest.mark.parametrize("case", score_cases.SELECT)
def bench_select(
    scores: int, case: str, report: Callable[..., None], pytestconfig: pytest.Config
) -> None:
    facts = {}
    if pytestconfig.getoption("memory_weights"):
        device = pytestconfig.getoption("device")
        facts["peak_bytes"] = memory.peak("score_cases", case, scores, device, "float32")
    report("select", scores, case, score_cases.select_cases, **facts)
