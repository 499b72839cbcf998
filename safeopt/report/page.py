"""The report of a run, a comparison, or both: one page of HTML, or a section of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeopt.report import page_run as run_page
from safeopt.report.page_blocks import Block, Bullets, Code, Section, Table, Text
from safeopt.report.page_compare import compared

LIMITS = (
    "This report shows less damage, or more, on these prompts. It is no guarantee: other prompts,"
    " other languages, longer talks and attackers who try can get what these did not.",
    "A mask keeps the selected weights as they were. It does not keep the model's behaviour: the"
    " other weights move, and they can learn a way around. With 67 % of the weights of"
    " Llama-2-7B-chat frozen, 50 to 100 examples still took attack success to 85 to 89 %"
    " (arXiv 2402.05162, Table 3).",
    "It protects against damage by accident, while you train. Whoever has the weights can train"
    " without it.",
    "Refusals are counted with a phrase list: a smoke signal, not a judge. It cannot see whether an"
    " answer is harmful, helpful or sincere.",
    "The intervals are over prompts. They leave out how much one training run differs from the"
    " next, and prompts that nobody thought of.",
)


def document(found: Mapping[str, Any]) -> list[Section]:
    """The sections of a report, in the order of the page.

    Args:
        found: plain data. "run": what `safeopt train` recorded, or None. "mask": None, or
            {"layout": `report.masks.layout`, "role": "freeze", "train" or None, "made": str,
            "file": str, "digest": str}. "measured": what `page_measure.measured` returned, or None.
            "unseen": whether its prompts were found not to be among the training rows; None without
            prompts.
            "comparison": the results of a comparison, or None. "phrases": version and sha256.

    Raises:
        ValueError: neither a run nor a comparison.
    """
    run, mask, measured = found["run"], found["mask"], found["measured"]
    if run is None and found["comparison"] is None:
        raise ValueError("there is nothing to report: give a run, a comparison or both")
    sections = []
    if run is not None:
        sections += [
            run_page.in_short(run, measured),
            run_page.protected(run, mask),
            run_page.cost(run, measured, found["unseen"]),
            run_page.course(run),
            run_page.drifted(measured),
        ]
    if found["comparison"] is not None:
        sections.append(compared(found["comparison"]))
    if run is not None:
        sections.append(run_page.examples(measured))
    limits = Section("limits", "Limits, in plain words", [Bullets(LIMITS)])
    return [*sections, limits, _provenance(found)]


def _provenance(found: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    run, results = found["run"], found["comparison"]
    if run is not None:
        blocks.append(
            Table("Hashes (SHA-256) of the run", ["what", "hash"], _hashes(found), words=True)
        )
        settings = run["arguments"].items()
        said = [f"{k.replace('_', '-')} {v}" for k, v in settings if v not in (None, "")]
        blocks += [Text("The run was made by"), Code(run["command"])]
        blocks.append(Text(f"Settings: {', '.join(said)}."))
    if results is not None:
        if results.get("command"):
            blocks += [Text("The comparison was made by"), Code(results["command"])]
        rows = [["model", results["model"]["weights"]]]
        rows += [
            [f"{name} ({one['rows']} rows)", one["sha256"]]
            for name, one in results.get("sets", {}).items()
        ]
        blocks.append(
            Table("Hashes (SHA-256) of the comparison", ["what", "hash"], rows, words=True)
        )
    versions = (run or results)["versions"]
    said = [f"{name} {version}" for name, version in versions.items() if version]
    blocks.append(Text(f"Versions: {', '.join(said)}."))
    return Section("provenance", "Versions and hashes", blocks)


def _hashes(found: Mapping[str, Any]) -> list[list[str]]:
    run, mask = found["run"], found["mask"]
    rows = [
        ["model before", run["model"]["weights"]],
        ["model after", run["trained"]["weights"]],
        [f"training rows ({run['rows']['rows']})", run["rows"]["sha256"]],
    ]
    if run["watched"]:
        rows.append([f"watched rows ({run['watched']['rows']})", run["watched"]["sha256"]])
    if mask:
        rows.append([f"mask {mask['file']}", mask["digest"]])
    if run.get("space"):
        rows.append([f"input space {run['arguments']['space']}", run["space"]["digest"]])
    rows += [
        [f"{name} ({one['rows']} rows)", one["sha256"]]
        for name, one in found.get("sets", {}).items()
    ]
    phrases = found["phrases"]
    return [*rows, [f"phrase list, version {phrases['version']}", phrases["sha256"]]]
