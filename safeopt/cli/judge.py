"""Rate answers from a file, without the model that gave them, and compare the judges."""

from __future__ import annotations

import argparse
from typing import Any

from safeopt.cli.judging import MARGIN, add_judges, described, judges_text, load_judges
from safeopt.evaluate import Judge, Verdicts, judged, read_answers, verdicts_in, write_answers
from safeopt.evaluate.answers_file import Record, add_verdicts
from safeopt.evaluate.refusal import NOTE

EXAMPLE = "  safeopt judge answers.jsonl --judge phrases ./guard ./classifier@toxic"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt judge`."""
    parser.add_argument(
        "answers_file", metavar="FILE",
        help="JSONL with instruction and answer, from safeopt evaluate --answers; verdicts in it,"
        ' also those of other tools ("judge": NAME, "unsafe": true, false or null), are compared',
    )  # fmt: skip
    add_judges(parser, margin=False)
    parser.add_argument(
        "--answers", metavar="OUT", help="write the lines with all verdicts to OUT (JSONL)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rate every set of the file by every judge, beside the verdicts that it holds."""
    if MARGIN in (args.judge or []):
        raise ValueError(
            "--judge margin asks the model itself, and there is none here; give it to safeopt"
            " evaluate, whose --answers file keeps its verdicts"
        )
    records = read_answers(args.answers_file)
    judges = [judge for judge in load_judges(args) if not isinstance(judge, str)]
    sets: dict[str, list[Record]] = {}
    for record in records:
        sets.setdefault(str(record["set"]), []).append(record)
    found = {name: _rated(held, judges) for name, held in sets.items()}
    if not any(found.values()):
        raise ValueError(
            f"{args.answers_file} holds no verdicts and --judge names no judge; give one"
        )
    result: dict[str, Any] = {"file": args.answers_file} | described(found)
    if args.answers:
        write_answers(args.answers, records)
        result["answers"] = args.answers
    return result


def text(result: dict[str, Any]) -> str:
    """A row per set and judge, and one per pair of judges."""
    lines = judges_text(result)
    if "answers" in result:
        lines.append(f"prompts, answers and verdicts: {result['answers']}")
    listed = any(one["judge"] == "phrases" for found in result["judges"].values() for one in found)
    return "\n".join([*lines, *([NOTE] if listed else [])])


def _rated(records: list[Record], judges: list[Judge]) -> dict[str, Verdicts]:
    prompts = [record["instruction"] for record in records]
    answers = [record["answer"] for record in records]
    new = {judge.name: judged(judge, prompts, answers) for judge in judges}
    for one in new.values():
        add_verdicts(records, one)
    return verdicts_in(records) | new
