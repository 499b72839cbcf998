"""The comparisons below results/, read as `safeopt recommend` reads them: for results_table.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeopt import report
from safeopt.report.pareto import ParetoPoint, arm_runs, mean_curve
from safeopt.report.recommend_controls import is_control, is_plain
from safeopt.report.recommend_evidence import assess, best_of
from safeopt.report.summary import BASELINE, skill_name

PAIR = ("aligned", "unaligned")
TASKS = {
    "/asft.py ": "agnews", "/locate.py ": "agnews", "/esi.py ": "agnews",
    "safeopt demo": "headlines",
}  # fmt: skip
"""By command, where it names none."""


@dataclass(frozen=True)
class Read:
    """One arm: where it is read, its best point, and whether it has the skill and is a control.

    ``refuses``: whether it refuses so many harmless prompts there that it is not recommended.
    """

    at: ParetoPoint
    best: ParetoPoint
    reached: bool
    control: bool
    refuses: bool


@dataclass(frozen=True)
class Scenario:
    """One results.json: the folder's name below results/, its content and what it says."""

    name: str
    results: dict[str, Any]
    found: tuple[report.Recommendation, ...]
    arms: dict[str, Read]

    @property
    def chosen(self) -> set[str]:
        """The recommended arms, one of each league at most."""
        return {one.arm for one in self.found if one.arm}

    @classmethod
    def of(cls, file: Path, root: Path) -> Scenario:
        """Read a file; raises ValueError where it is not a finished comparison."""
        results = report.load_results(file)
        found = tuple(report.recommendations([results]))
        arms = {}
        for arm in results["arms"]:
            one = assess(results, arm, found[0].skill)
            curve = mean_curve(results, arm, sorted(arm_runs(results, arm)))
            control = is_control(results, arm)
            refuses = one.refuses_harmless
            arms[arm] = Read(one.reading, best_of(curve), one.reached, control, refuses)
        return cls(file.parent.relative_to(root).as_posix(), results, found, arms)


def read(root: Path) -> list[Scenario]:
    """Every comparison below a folder, by name."""
    return [Scenario.of(file, root) for file in sorted(root.rglob("results.json"))]


def about(one: Scenario) -> dict[str, str]:
    """What was run, in words; older files lack some settings."""
    results, settings = one.results, one.results["settings"]
    rank = settings.get("lora_rank")
    scores = results.get("scores") or {}
    folder = str(results["model"].get("folder", "?"))
    if not folder.startswith("organism:"):  # of a pair the folder around both tells them apart
        path = Path(folder)
        folder = "/".join(path.parts[-2:]) if path.name in PAIR else path.name
    return {
        "scenario": str(results["scenario"]),
        "task": task_of(results),
        "model": folder,
        "scores": str(settings.get("method") or scores.get("method", "?")),
        "trained": f"LoRA, rank {rank}" if rank else "all weights",
        "seeds": ", ".join(map(str, results["seeds"])),
        "steps": str(settings["steps"]),
        "skill": skill_name(results),
    }


def task_of(results: Mapping[str, Any]) -> str:
    """Of the option --task, or of the script, whose task it then is."""
    if results["scenario"] == "repair":
        return "refusals"
    command = results.get("command", "")
    named = re.search(r"--task[ =](\S+)", command)
    if named:
        return named[1]
    return next((task for script, task in TASKS.items() if script in command), "?")


def kind(arm: str, found: Read) -> str:
    """Whether an arm protects or is there to be compared with."""
    if arm == BASELINE or is_plain(arm):
        return "plain"
    return "control" if found.control else "protection"
