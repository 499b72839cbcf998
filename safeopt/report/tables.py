"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from safeopt.compare.kinds import LEAGUES, REFUSALS
from safeopt.report.judged import agreement_rows, judged_rows
from safeopt.report.matched import AT_MOST, early_stop, same_drift


def markdown(results: dict[str, Any], summary: dict[str, Any], verdict: str) -> str:
    """The whole report: verdict, arms at equal skill, then at equal steps, what was run."""
    level, skill = 100 * summary["level"], summary["skill"]
    share = f"{100 * results['equal_skill']:g} % of adamw's at its last step"
    return "\n".join(
        [
            f"# Comparison: {results['scenario']}, {results['settings']['steps']} steps, "
            f"{len(results['seeds'])} seeds",
            "",
            verdict,
            "",
            "## At equal skill",
            "",
            f"Each seed's first measured step with {skill} of at least {level:.1f} % ({share}).",
            "",
            equal_skill(summary),
            "",
            *judges(results),
            *_matched(results, summary),
            "## At equal steps",
            "",
            "After the last step, whatever skill each arm has: one that learned less looks safer.",
            "",
            equal_steps(summary),
            "",
            "## How to read it",
            "",
            *_notes(results),
            "",
            "## What was run",
            "",
            *_provenance(results),
            "",
        ]
    )


def judges(results: dict[str, Any]) -> list[str]:
    """Lines: attack success by every judge, and how far they agree; none without judges."""
    if not results.get("judges"):
        return []
    return [
        "## By every judge, at equal skill",
        "",
        "The same answers at the same steps; a missing verdict is neither safe nor unsafe.",
        "A margin tells refusing from complying; a model may also do neither of them.",
        "",
        markdown_table(*judged_rows(results)),
        "",
        markdown_table(*agreement_rows(results)),
        "",
    ]


def _matched(results: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    early, drift = early_stop(results), same_drift(results)
    lines = []
    if early:
        lines += [
            "## Against adamw stopped early",
            "",
            "Each seed's adamw at its first measured step with the arm's last skill.",
            "",
            stopped_early(summary, early),
            "",
        ]
    if drift:
        lines += [
            "## Against a smaller learning rate of the same drift",
            "",
            "Of the arms adamw and adamw-lr, the one whose last drift is nearest; more than"
            f" {AT_MOST:g} times apart",
            "is too far to be read as the same.",
            "",
            of_same_drift(summary, drift),
            "",
        ]
    return lines


def equal_steps(summary: dict[str, Any]) -> str:
    """One row per arm after the last step, and one for the model before training."""
    sets = list(summary["start"]["attack"])
    text = summary["start"]["text_perplexity"] is not None
    device = any(row.get("device_bytes") for row in summary["equal_steps"].values())
    across = summary["start"]["drift_across"] is not None
    league = _leagues(summary)
    tokens = _tokens(summary)
    header = [
        "arm", *(["league"] if league else []), "weights trained",
        *[f"attack success, {name}" for name in sets], "over-refusal",
        "task accuracy", *(["task token accuracy"] if tokens else []), "perplexity, task",
        *(["perplexity, text"] if text else []),
        "drift, critical", "drift, other", *(["across C"] if across else []), "train loss",
        "seconds", "peak memory",
        *(["peak device memory"] if device else []), "optimizer state",
    ]  # fmt: skip
    rows = []
    for arm, row in {"(before training)": summary["start"], **summary["equal_steps"]}.items():
        rows.append([
            arm, *([row.get("league") or "-"] if league else []), _percent(row.get("trained")),
            *[_rate(row["attack"][name]) for name in sets],
            _rate(row["over_refusal"]), _rate(row["accuracy"]),
            *([_rate(row["tokens"])] if tokens else []), _number(row["perplexity"]),
            *([_number(row["text_perplexity"])] if text else []), _percent(row["drift_critical"]),
            _percent(row["drift_other"]),
            *([_percent(row["drift_across"])] if across else []), _number(row["loss"]),
            _number(row["seconds"]),
            _megabytes(row.get("host_bytes")),
            *([_megabytes(row.get("device_bytes"))] if device else []),
            _megabytes(row.get("state_bytes")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def equal_skill(summary: dict[str, Any]) -> str:
    """One row per arm at the first step where it has the common skill, or "not reached"."""
    sets = list(summary["start"]["attack"])
    league, tokens = _leagues(summary), _tokens(summary)
    header = ["arm", *(["league"] if league else []), "seeds that reach it", "step"]
    header += [f"attack success, {name}" for name in sets] + ["over-refusal", "task accuracy"]
    header += [*(["task token accuracy"] if tokens else []), "perplexity, task"]
    rows = []
    for arm, row in summary["equal_skill"].items():
        reached = f"{row['reached']} of {row['seeds']}"
        first = [arm, *([row["league"]] if league else []), reached]
        if not row["reached"]:
            rows.append([*first, "not reached", *["-"] * (len(header) - len(first) - 1)])
            continue
        attack = [_rate(row["attack"][name]) for name in sets]
        rest = [_rate(row["over_refusal"]), _rate(row["accuracy"])]
        rest += [*([_rate(row["tokens"])] if tokens else []), _number(row["perplexity"])]
        rows.append([*first, f"{row['step']:.0f}", *attack, *rest])
    return markdown_table(header, rows)


def stopped_early(summary: dict[str, Any], found: dict[str, Any]) -> str:
    """One row per protected arm: adamw at the step where it is as able, from `early_stop`."""
    sets, skill = list(summary["start"]["attack"]), summary["skill"]
    header = ["arm", f"its last {skill}", "seeds where adamw reaches it", "step of adamw"]
    header += [f"{name}: arm, adamw" for name in sets]
    rows = []
    for arm, row in found.items():
        line = [arm, _percent(row["skill"]), f"{row['reached']} of {row['seeds']}"]
        if not row["reached"]:
            rows.append([*line, "not reached", *["-"] * len(sets)])
            continue
        pairs = [_two(row["arm"]["attack"][n], row["adamw"]["attack"][n]) for n in sets]
        rows.append([*line, f"{row['adamw']['step']:.0f}", *pairs])
    return markdown_table(header, rows)


def of_same_drift(summary: dict[str, Any], found: dict[str, Any]) -> str:
    """One row per protected arm: the learning rate that moves the weights as far, `same_drift`."""
    sets, skill = list(summary["start"]["attack"]), summary["skill"]
    header = ["arm", "drift", "nearest", "its drift", f"{skill}: arm, nearest"]
    header += [f"{name}: arm, nearest" for name in sets]
    rows = []
    for arm, row in found.items():
        line = [arm, _percent(row["drift"]), row["nearest"], _percent(row["nearest_drift"])]
        if not row["matched"]:
            rows.append([*line, "too far: " + row["advice"], *["-"] * len(sets)])
            continue
        one, two = summary["equal_steps"][arm], summary["equal_steps"][row["nearest"]]
        skills = f"{_percent(row['skill'])}, {_percent(row['nearest_skill'])}"
        pairs = [_two(one["attack"][name], two["attack"][name]) for name in sets]
        rows.append([*line, skills, *pairs])
    return markdown_table(header, rows)


def _leagues(summary: dict[str, Any]) -> bool:
    return all(row.get("league") for row in summary["equal_steps"].values())


def _tokens(summary: dict[str, Any]) -> bool:
    return summary["skill"] == "task token accuracy"


def _notes(results: dict[str, Any]) -> list[str]:
    reset = all(run["memory"]["host_since"] == "run start" for run in results["runs"])
    covers = "one run" if reset else "the whole process so far, so it cannot tell arms apart"
    fraction = 100 * results["settings"]["fraction"]
    return [
        "- Rates are means over seeds, with a 95 % Wilson interval over the answers of all seeds",
        "  together. It leaves out how much training runs differ: the real uncertainty is larger.",
        "- Attack success is the share of harmful prompts that are not refused (an empty answer is",
        "  no refusal), over-refusal the share of harmless prompts that are. Perplexity is per",
        "  response token.",
        *(_SKILL_OF_TOKENS if results.get("skill") == "tokens" else []),
        *_leagues_told(results),
        "- Drift is the norm of the change over the norm before training; critical are the top",
        f"  {fraction:g} % of the scored weights, the same weights for every arm.",
        *_across(results),
        "- Seconds are those of training, without evaluation. Peak memory is the host's and covers",
        f"  {covers}.",
        f"- {results['phrases']['note']}",
    ]


_SKILL_OF_TOKENS = [
    "- Task token accuracy is the share of the test answers' tokens that the model finds",
    "  likeliest, the right answer so far given; its interval takes the tokens of one answer as",
    "  independent.",
]


def _leagues_told(results: dict[str, Any]) -> list[str]:
    if not results.get("leagues"):
        return []
    lines = ["- Leagues are never ranked together:"]
    lines += [f"  {name} is {LEAGUES[name]};" for name in LEAGUES]
    if REFUSALS not in results["leagues"].values():
        return [*lines, "  no arm of the second was run."]
    used = max(run["budget"]["refusals_at_hand"] for run in results["runs"])
    beside = max(run["budget"]["rows_beside"] for run in results["runs"])
    share = 100 * results["settings"]["refusal_share"]
    return [
        *lines,
        f"  up to {used} refusals were used, {share:g} % of all rows where they are mixed in, and",
        f"  up to {beside} rows went through the model beside the training rows.",
    ]


def _across(results: dict[str, Any]) -> list[str]:
    if not results.get("direction"):
        return []
    matrices = results["direction"]["matrices"].values()
    norm = fmean(row["norm"] for row in matrices)
    largest = max(row["largest"] for row in matrices)
    return [
        "- Across C is the norm of (I - C) dW over that of dW, C = V V^T / ||V||_F, in the"
        f" {len(matrices)} matrices",
        f"  of the direction, whose ||V||_F is {norm:.3g} on average and whose largest eigenvalue"
        f" is {largest:.3g}.",
    ]


def _provenance(results: dict[str, Any]) -> list[str]:
    machine, versions = results["machine"], results["versions"]
    direction = results.get("direction")
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    lines = [f"    {results['command']}", ""] if results["command"] else []
    lines += [
        f"- machine: {machine['name']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['device']}",
        f"- versions: {', '.join(f'{name} {value}' for name, value in versions.items() if value)}",
        f"- model: {results['model']['folder']} (weights {results['model']['weights'][:16]})",
        *([f"- unaligned: {direction['unaligned']}"] if direction else []),
        f"- seeds: {', '.join(map(str, results['seeds']))}",
        f"- settings: {settings}",
        f"- phrase list: version {results['phrases']['version']}, "
        f"sha256 {results['phrases']['sha256']}",
        "- sets, with sha256 of the texts:",
    ]
    return lines + [
        f"    - {name}: {one['rows']} rows, {one['sha256']}"
        for name, one in results["sets"].items()
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, all others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _two(one: dict[str, Any], two: dict[str, Any]) -> str:
    return f"{_rate(one)}, {_rate(two)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g} MB"
