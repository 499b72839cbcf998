"""Time and memory of one optimizer step, beside torch's AdamW and what people write by hand."""

from __future__ import annotations

from collections.abc import Callable

import memory
import pytest
import step_cases


@pytest.mark.parametrize("case", [*step_cases.recipes(), "copy"])
def bench_step(
    weights: int, case: str, report: Callable[..., None], pytestconfig: pytest.Config
) -> None:
    facts = {}
    at, option = pytestconfig.getoption("memory_weights"), pytestconfig.getoption
    if at and case != "copy":
        facts["peak_bytes"] = memory.peak("step_cases", case, at, option("device"), option("dtype"))
    report("step", weights, case, step_cases.cases, **facts)
