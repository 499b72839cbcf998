"""Write what a run or a comparison shows as one HTML page, or as a section of a model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.cli.options import (
    MODEL,
    ROWS,
    WITH_RESPONSE,
    add_number,
    harmful_sets,
)
from safeopt.cli.record import FILE, described, load
from safeopt.compare.sets import load_rows
from safeopt.data import Row, require_disjoint
from safeopt.environment import pick_device
from safeopt.evaluate.refusal import PHRASES_VERSION, phrases_hash
from safeopt.mask import SafetyMask

EXAMPLE = (
    "  safeopt report tuned --harmful harmful.jsonl --harmless harmless.jsonl --task test.jsonl"
)
RESULTS = "results.json"
PAGE = "report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt report`."""
    parser.add_argument("out", metavar="OUT", help="the --out of safeopt train or safeopt compare")
    parser.add_argument(
        "--compare", metavar="DIR", help="with a run: the --out of a comparison to show as well"
    )
    parser.add_argument(
        "--mask", metavar="MASK", help="mask to show (default: the one the run was trained with)"
    )
    parser.add_argument(
        "--reference", metavar="MODEL0", help=f"model before training, if it was moved: {MODEL}"
    )
    parser.add_argument(
        "--harmful", nargs="+", metavar="ROWS", help=f"harmful prompts, NAME=FILE or FILE: {ROWS}"
    )
    parser.add_argument(
        "--harmless", metavar="ROWS", help="harmless prompts, which should be answered"
    )
    parser.add_argument("--task", metavar="ROWS", help="task rows with the right response")
    add_number(parser, "examples", 4, "prompts of each set whose answers are shown")
    add_number(parser, "batch-size", 32, "prompts at a time")
    add_number(parser, "max-new-tokens", 24, "tokens of an answer")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--html", metavar="FILE", help=f"write the page here (default OUT/{PAGE})")
    parser.add_argument(
        "--model-card", metavar="FILE",
        help="write a section of this Markdown file, in place of an earlier one of ours",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, measure, write, and return the files and what they say."""
    found = _found(args)
    files = _write(args, found)
    return {"files": files, **{key: found[key] for key in ("measured", "sets", "unseen")}}


def text(result: dict[str, Any]) -> str:
    """Where it was written, and what was left out."""
    lines = [f"written: {path}" for path in result["files"]]
    if result["measured"] is not None and not result["measured"]["attack"]:
        lines.append("no prompts were given, so no refusals were measured: give --harmful")
    return "\n".join(lines)


def _found(args: argparse.Namespace) -> dict[str, Any]:
    from safeopt.report.page_compare import require_comparison

    out = Path(args.out)
    trained = (out / FILE).exists() or not (out / RESULTS).exists()
    record = load(out) if trained else None
    results = None
    folder = Path(args.compare) if args.compare else None if trained else out
    if folder is not None:
        results = _results(folder)
        require_comparison(results, folder / RESULTS)
    found: dict[str, Any] = {
        "run": record,
        "mask": None,
        "measured": None,
        "comparison": results,
        "sets": {},
        "unseen": None,
        "phrases": {"version": PHRASES_VERSION, "sha256": phrases_hash()},
    }
    if record is not None:
        _about_run(args, out, record, found)
    elif args.mask or args.harmful or args.harmless or args.task or args.reference:
        raise ValueError(
            f"{out} is a comparison, which has no trained model to measure; leave --mask,"
            " --harmful, --harmless, --task and --reference out, or give the --out of safeopt train"
        )
    return found


def _about_run(
    args: argparse.Namespace, out: Path, record: dict[str, Any], found: dict[str, Any]
) -> None:
    """Measure the two models of a run; what was measured goes into `found`."""
    from safeopt.integrations.transformers import load_model
    from safeopt.report.page_measure import measured

    if "trained" not in record or not (out / "model").is_dir():
        raise ValueError(
            f"{out} holds a run that is not finished; run its safeopt train again with --resume"
        )
    harmful = harmful_sets(args.harmful or [])
    harmless = load_rows(args.harmless) if args.harmless else []
    task = load_rows(args.task, WITH_RESPONSE) if args.task else []
    named = {f"harmful/{name}": rows for name, rows in harmful.items()}
    named |= {"harmless": harmless, "task": task}
    named = {name: rows for name, rows in named.items() if rows}
    found["unseen"] = _unseen(record, named) if named else None
    mask = _mask(args, record, found)
    device = pick_device(args.device)
    before, _ = load_model(args.reference or record["arguments"]["model"])
    after, tokenizer = load_model(out / "model")
    for model, key in ((before, "model"), (after, "trained")):
        if artifact.fingerprint(model)["weights"] != record[key]["weights"]:
            where = "before training (give --reference)" if key == "model" else f"in {out}/model"
            raise ValueError(f"the model {where} is not the one that {out / FILE} tells of")
    found["measured"] = measured(
        {"before": before.to(device), "after": after.to(device)},
        tokenizer,
        harmful=harmful,
        harmless=harmless,
        task=task,
        mask=mask,
        examples=args.examples,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    found["sets"] = {name: described(rows) for name, rows in named.items()}


def _unseen(record: dict[str, Any], evaluation: dict[str, list[Row]]) -> bool:
    """Whether no row was trained on; False when the training rows are not there to be looked at.

    Raises:
        ValueError: a row was.
    """
    source = record["arguments"]["data"]
    try:
        rows = load_rows(source)
    except (OSError, ValueError):
        return False
    if described(rows) != record["rows"]:
        return False
    require_disjoint({"training": {source: rows}, "evaluation": evaluation})
    return True


def _mask(
    args: argparse.Namespace, record: dict[str, Any], found: dict[str, Any]
) -> SafetyMask | None:
    from safeopt.cli.inspect import made
    from safeopt.report.masks import layout

    given = record["arguments"]
    path = args.mask or given["freeze"] or given["train"]
    if path is None:
        return None
    mask = SafetyMask.load(path)
    digest, used = mask.digest(), record["mask"]
    role = None
    if used is not None:
        if digest != used["digest"]:
            raise ValueError(
                f"{path} is not the mask of the run: its digest is {digest[:12]}, that of the run"
                f" {used['digest'][:12]}; give the right file with --mask"
            )
        role = "freeze" if given["freeze"] else "train"
    found["mask"] = {
        "file": str(path),
        "digest": digest,
        "role": role,
        "made": made(mask.manifest),
        "layout": layout(mask),
    }
    return mask


def _results(folder: Path) -> Any:
    try:
        return json.loads((folder / RESULTS).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder / RESULTS} is missing: the comparison is not finished, or {folder} is none;"
            " run its safeopt compare again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / RESULTS} is damaged ({error}); compare again") from error


def _write(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    from safeopt._version import __version__
    from safeopt.report.page import document
    from safeopt.report.page_html import html
    from safeopt.report.page_markdown import markdown, write_section

    sections = document(found)
    footer = f"Made by safeopt {__version__}: {args.line}"
    files = []
    page = args.html or (None if args.model_card else str(Path(args.out) / PAGE))
    if page:
        with artifact.atomic(page) as temporary:
            temporary.write_text(html(f"Safety report: {args.out}", sections, footer), "utf-8")
        files.append(page)
    if args.model_card:
        write_section(args.model_card, markdown("Safety under fine-tuning", sections, footer))
        files.append(args.model_card)
    return files
