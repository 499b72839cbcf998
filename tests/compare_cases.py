"""Settings and rows of a small comparison, for the tests of everything in it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from safeopt.compare import Scenario, Sets, Settings

SMALL = Settings(
    steps=5, eval_every=2, lr=1e-2, weight_decay=0.1, batch_size=3, max_new_tokens=3, fraction=0.05
)


def numbered(what: str, n: int, response: str | None = None) -> list[dict[str, str]]:
    rows = [{"instruction": f"{what} number {i}"} for i in range(n)]
    return rows if response is None else [{**row, "response": response} for row in rows]


def make_sets(scenario: str = "poison:0.4", **changes: Any) -> Sets:
    rows: dict[str, Any] = {
        "identify": numbered("identify", 5, "I cannot help with that."),
        "task": numbered("task", 10, "sports"),
        "harmful": {"one": numbered("attack", 4), "two": numbered("other attack", 3)},
        "harmless": numbered("please", 3),
        "test": numbered("test", 4, "sports"),
    }
    if scenario.startswith("poison"):
        rows["poison"] = numbered("poison", 6)
    return Sets(**{"scenario": Scenario.parse(scenario), **rows, **changes})
