"""The judges that `safeopt evaluate` and `safeopt judge` are given, and what they found."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeopt.cli.options import proportion
from safeopt.compare.judged import Asked
from safeopt.environment import pick_device
from safeopt.evaluate import Judge, MarginJudge, PhraseJudge, Verdicts, agreement
from safeopt.evaluate.judges_margin import MARGIN
from safeopt.evaluate.judges_models import model_judge

PHRASES = PhraseJudge.name
KINDS = (
    "phrases (a list: a smoke signal), {margin}or the folder of a classifier or guard model: PATH,"
    " PATH@UNSAFE or PATH@UNSAFE/SAFE, with a guard's two words or a classifier's label; PATH@/SAFE"
    " where all other labels are unsafe"
)
MARGIN_TEXT = "margin (how likely MODEL begins with a refusal), "


def add_judges(parser: argparse.ArgumentParser, *, margin: bool) -> None:
    """--judge and --judge-template; `margin`: whether there is a model to ask for its margin."""
    parser.add_argument(
        "--judge", nargs="+", metavar="JUDGE",
        help="who rates the answers to the harmful prompts: "
        + KINDS.format(margin=MARGIN_TEXT if margin else ""),
    )  # fmt: skip
    parser.add_argument(
        "--judge-template", metavar="FILE",
        help="text file that says what the judges in folders read, with {prompt} and {response}"
        " (default: their chat template)",
    )  # fmt: skip


def load_judges(args: argparse.Namespace) -> list[Asked]:
    """The judges asked for, in order; "margin" stands for itself until there is a model.

    Raises:
        ValueError: two judges of one name, a template without a folder, or as `model_judge`.
        OSError: the template cannot be read.
    """
    words = args.judge or []
    folders = [word for word in words if word not in (PHRASES, MARGIN)]
    if args.judge_template and not folders:
        raise ValueError(
            f"--judge-template {args.judge_template} is for judges in folders, and --judge names"
            " none; leave it out, or give a folder"
        )
    template = Path(args.judge_template).read_text("utf-8") if args.judge_template else None
    found: list[Asked] = []
    for word in words:
        if word == PHRASES:
            found.append(PhraseJudge())
        elif word == MARGIN:
            found.append("margin")
        else:
            folder, unsafe, safe = split_judge(word)
            device = pick_device(args.device)
            found.append(
                model_judge(folder, unsafe=unsafe, safe=safe, template=template, device=device)
            )
    names = [one if isinstance(one, str) else one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two judges are named {twice[0]!r}; name one once, or rename a folder")
    return found


def split_judge(word: str) -> tuple[str, str | None, str | None]:
    """Folder, and what stands for unsafe and for safe, of PATH, PATH@UNSAFE, PATH@UNSAFE/SAFE."""
    if Path(word).is_dir() or "@" not in word:
        return word, None, None
    folder, _, labels = word.rpartition("@")
    unsafe, _, safe = labels.partition("/")
    return folder, unsafe or None, safe or None


def with_model(judges: Sequence[Asked], model: Any, tokenizer: Any) -> list[Judge]:
    """The same, with the margin judge of this model in place of its name."""
    return [MarginJudge(model, tokenizer) if isinstance(one, str) else one for one in judges]


def described(sets: Mapping[str, Mapping[str, Verdicts]]) -> dict[str, Any]:
    """Rates by set and judge, and how far the judges of a set agree, as plain values."""
    return {
        "judges": {
            name: [found.to_json() for found in verdicts.values()]
            for name, verdicts in sets.items()
        },
        "agreement": {
            name: agreement({judge: found.unsafe for judge, found in verdicts.items()})
            for name, verdicts in sets.items()
            if len(verdicts) > 1
        },
    }


def judges_text(result: Mapping[str, Any]) -> list[str]:
    """A row per set and judge, and one per pair of judges."""
    rows = [
        ("judge", name, one["judge"], _rate(one))
        for name, found in result.get("judges", {}).items()
        for one in found
    ]
    rows += [
        ("agreement", name, f"{one['first']}, {one['second']}", _agreement(one))
        for name, found in result.get("agreement", {}).items()
        for one in found
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _rate(one: Mapping[str, Any]) -> str:
    rate = f"{proportion(one['unsafe'])} unsafe" if one["unsafe"] else "no verdict at all"
    return f"{rate}, {one['missing']} of {one['asked']} missing"


def _agreement(one: Mapping[str, Any]) -> str:
    if not one["n"]:
        return "no answer that both rated"
    kappa = "undefined" if one["kappa"] is None else f"{one['kappa']:.2f}"
    return f"{proportion(one['agree'])}, kappa {kappa}"
