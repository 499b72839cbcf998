"""Finished comparisons from their folders, checked, and several of one scenario as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeopt.report.summary import BASELINE, skill

Comparison = dict[str, Any]
NEEDED = ("scenario", "arms", "seeds", "settings", "model", "sets", "runs", "equal_skill")


def load_results(out: str | Path) -> Comparison:
    """The results of a finished comparison, from its folder or its results.json.

    Raises:
        ValueError: it is not finished, or the file is damaged or of something else.
        OSError: there is no such folder, or it cannot be read.
    """
    out = Path(out)
    path = out if out.is_file() else out / "results.json"
    if not path.exists():
        if (out / "runs").is_dir():
            done = len(list((out / "runs").glob("*.json")))
            raise ValueError(
                f"{out} holds {done} finished runs and no results.json: the comparison is not"
                " finished; run the same safeopt compare again, which goes on where it stopped"
            )
        raise FileNotFoundError(
            f"{path} does not exist; give the folder that safeopt compare wrote (--out)"
        )
    try:
        results = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    lacking = [key for key in NEEDED if not isinstance(results, dict) or key not in results]
    if lacking:
        raise ValueError(
            f"{path} is no result of safeopt compare: it has no {lacking[0]!r}; {_AGAIN}"
        )
    try:
        _require_whole(results)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {what}; {_AGAIN}") from error
    return results


_AGAIN = "run the same safeopt compare again, which writes it from the finished runs"


def _require_whole(results: Comparison) -> None:
    if BASELINE not in results["arms"]:
        raise ValueError(f"arm {BASELINE}, against which the others are read, is not there")
    found = {(run["settings"]["arm"], run["settings"]["seed"]): run for run in results["runs"]}
    steps = [point["step"] for point in results["runs"][0]["curve"]]
    if len(steps) < 2:
        raise ValueError("the curves have no point after training began")
    for arm in results["arms"]:
        for seed in results["seeds"]:
            if (arm, seed) not in found:
                raise ValueError(f"the run of arm {arm} with seed {seed} is not there")
            if [point["step"] for point in found[arm, seed]["curve"]] != steps:
                raise ValueError(
                    f"arm {arm} with seed {seed} was measured at other steps than the first run"
                )
    for run in results["runs"]:
        for needed in ("control", "memory"):
            run[needed]
        for point in run["curve"]:
            skill(results, point)
            for counts in (point["over_refusal"], *point["attack"].values()):
                counts["successes"], counts["n"], counts["rate"]


def grouped(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """Comparisons that can be read as one, together: one scenario, model, sets and settings."""
    groups: dict[str, list[Comparison]] = {}
    for results in comparisons:
        groups.setdefault(_key(results), []).append(results)
    return list(groups.values())


def merged(comparisons: Sequence[Comparison]) -> Comparison:
    """One comparison with the arms and seeds of all; a run that stands in two counts once.

    Raises:
        ValueError: none are given, or they differ in what every arm shares.
    """
    if not comparisons:
        raise ValueError("comparisons is empty; give at least one")
    if len({_key(results) for results in comparisons}) > 1:
        raise ValueError(
            "the comparisons differ in scenario, model, sets or settings, so their arms cannot be"
            " read beside each other; give them one at a time, or use recommendations()"
        )
    first = comparisons[0]
    runs: dict[tuple[str, int], Any] = {}
    for results in comparisons:
        for run in results["runs"]:
            runs.setdefault((run["settings"]["arm"], run["settings"]["seed"]), run)
    return {
        **first,
        "arms": list(dict.fromkeys(arm for results in comparisons for arm in results["arms"])),
        "seeds": sorted({seed for results in comparisons for seed in results["seeds"]}),
        "runs": list(runs.values()),
    }


def _key(results: Comparison) -> str:
    shared = [results[name] for name in ("scenario", "settings", "sets")]
    shared.append(results.get("skill"))
    shared += [results["model"].get("weights"), results["runs"][0]["settings"].get("unaligned")]
    return json.dumps(shared, sort_keys=True)
