"""Options and texts that several sub-commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.compare.sets import load_rows, set_name
from safeopt.data import Row
from safeopt.evaluate import Proportion

MODEL = "Hugging Face causal-LM folder, or organism:aligned, organism:unaligned"
ROWS = "JSONL file or organism:NAME; FILE@identify, @tune, @evaluate are three disjoint parts"
WITH_RESPONSE = ("instruction", "response")
USES = {
    "freeze": "use: freeze. The selected weights carry safety: safeopt train --freeze {out}",
    "train": "use: train. The selected weights alone may move: safeopt train --train {out}, never"
    " --freeze",
    None: "use: safeopt train --freeze {out} to keep the selected weights (SPA), --train {out} to"
    " move them alone (SET)",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and --device."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default)"
    )


def add_number(parser: argparse.ArgumentParser, name: str, default: float, text: str) -> None:
    """An option with a number, of the default's type, whose help names the default."""
    parser.add_argument(
        f"--{name}",
        type=type(default),
        default=default,
        metavar="N",
        help=f"{text} (default {default})",
    )


def layer_range(option: str, text: str) -> tuple[int, int]:
    """First and last layer of `"6-14"`, counted from 0, both in the range.

    Raises:
        ValueError: anything else; the message names the option.
    """
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(
            f"{option} is {text!r}; give the first and the last layer, counted from 0 and both in"
            " the range, such as 6-14"
        )
    return int(first), int(last)


def harmful_sets(sources: list[str]) -> dict[str, list[Row]]:
    """The harmful evaluation sets by name, from FILE or NAME=FILE.

    Raises:
        ValueError: two sets of one name, or as `load_rows`.
    """
    sets: dict[str, list[Row]] = {}
    for source in sources:
        name, equals, rest = source.partition("=")
        name, source = (
            (name, rest) if equals and not Path(source).exists() else (set_name(source), source)
        )
        if name in sets:
            raise ValueError(
                f"two harmful sets are named {name!r}; name them: --harmful one=FILE two=FILE"
            )
        sets[name] = load_rows(source)
    return sets


def proportion(found: dict[str, Any]) -> str:
    """A rate with its interval, for people."""
    return str(Proportion(found["successes"], found["n"]))
