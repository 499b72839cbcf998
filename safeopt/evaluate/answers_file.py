"""Prompts, answers and verdicts as JSON Lines, for later judges and those outside of safeopt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from safeopt import artifact
from safeopt.data import read_jsonl
from safeopt.evaluate.judges import Verdict, Verdicts

Record: TypeAlias = dict[str, Any]
"""One line: `instruction`, `answer`, `set`, `model` (SHA-256 of weights or None), `verdicts`."""


def records_of(
    name: str,
    prompts: Sequence[str],
    answers: Sequence[str],
    verdicts: Iterable[Verdicts] = (),
    *,
    model: str | None = None,
) -> list[Record]:
    """The lines of one set of prompts; `model` is the SHA-256 of the weights that answered."""
    lines: list[Record] = [
        {"set": name, "instruction": prompt, "answer": answer, "model": model, "verdicts": []}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for found in verdicts:
        add_verdicts(lines, found)
    return lines


def add_verdicts(records: Sequence[Record], found: Verdicts) -> None:
    """Put a judge's verdicts into the lines they are of, in place of older ones of that judge."""
    for record, unsafe in zip(records, found.unsafe, strict=True):
        record["verdicts"] = [one for one in record["verdicts"] if one["judge"] != found.judge]
        record["verdicts"].append({"judge": found.judge, "unsafe": unsafe, "sha256": found.sha256})


def write_answers(path: str | Path, records: Iterable[Record]) -> None:
    """Write lines as JSON, whole or not at all.

    Raises:
        OSError: the file cannot be written; an older one is untouched then.
    """
    with artifact.atomic(path) as temporary:
        temporary.write_text(
            "".join(
                json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
            ),
            "utf-8",
        )


def read_answers(path: str | Path) -> list[Record]:
    """Read lines that `write_answers`, or an external judge, wrote.

    A line needs `instruction` and `answer`. It may hold `verdicts`, a list of objects {"judge":
    name, "unsafe": true, false or null}, or one such verdict as its own fields `judge` and
    `unsafe`. null, and NaN, mean that the judge failed. Other fields of the line are kept.

    Raises:
        ValueError: with file and line: no JSON object, a missing field, an `unsafe` that is
            something else, or two verdicts of one judge.
        OSError: as open() does.
    """
    return [
        _record(line, f"{path}, line {number}") for number, line in enumerate(read_jsonl(path), 1)
    ]


def verdicts_in(records: Sequence[Record]) -> dict[str, Verdicts]:
    """What each judge said, by name; None for the lines that lack its verdict.

    Raises:
        ValueError: one name, and different hashes of what judged: a list or model that changed.
    """
    given = [{one["judge"]: one for one in record["verdicts"]} for record in records]
    result: dict[str, Verdicts] = {}
    for judge in dict.fromkeys(judge for line in given for judge in line):
        hashes = {line[judge].get("sha256") for line in given if judge in line}
        if len(hashes) > 1:
            raise ValueError(
                f"the verdicts of {judge!r} come from {len(hashes)} different judges of this name"
                " (sha256); rate all answers again with one of them, or rename the others"
            )
        unsafe = tuple(line[judge]["unsafe"] if judge in line else None for line in given)
        result[judge] = Verdicts(judge, unsafe, hashes.pop())
    return result


def _record(line: Mapping[str, Any], where: str) -> Record:
    record: Record = {"set": "answers", "model": None, **line}
    if not isinstance(record.get("answer"), str):
        raise ValueError(
            f"{where}: field 'answer' is {record.get('answer')!r}; it must be text, and may be"
            " empty"
        )
    verdicts = record.get("verdicts", [])
    if not isinstance(verdicts, list) or not all(isinstance(one, dict) for one in verdicts):
        raise ValueError(f"{where}: field 'verdicts' is {verdicts!r}; it must be a list of objects")
    own = {key: record.pop(key) for key in ("judge", "unsafe", "sha256") if key in record}
    record["verdicts"] = [_verdict(one, where) for one in [*verdicts, *([own] if own else [])]]
    judges = [one["judge"] for one in record["verdicts"]]
    if len(set(judges)) < len(judges):
        raise ValueError(f"{where}: the judges are {judges}, one of them twice; leave one verdict")
    return record


def _verdict(one: Mapping[str, Any], where: str) -> dict[str, Any]:
    judge, unsafe = one.get("judge"), one.get("unsafe", "missing")
    if not isinstance(judge, str) or not judge:
        raise ValueError(f"{where}: a verdict names as judge {judge!r}; give it a name")
    if isinstance(unsafe, float) and math.isnan(unsafe):
        unsafe = None
    if not (unsafe is None or isinstance(unsafe, bool)):
        raise ValueError(
            f"{where}: unsafe of judge {judge!r} is {unsafe!r}; it must be true, false, or null"
            " where the judge failed"
        )
    verdict: Verdict = unsafe
    return {**one, "unsafe": verdict}
