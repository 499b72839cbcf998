"""What a call of `safeopt select` asks for, and which options go with it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from safeopt.scores import Scores


@dataclass(frozen=True)
class Kind:
    """One kind of selection: what it is called, options it needs, and options it takes beside."""

    title: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]

    def described(self) -> str:
        """The title and all options."""
        beside = f", and takes {_said(self.takes)}" if self.takes else ""
        return f"{self.title} needs {_said(self.needs)}{beside}"


KINDS = {
    "weights": Kind("a choice of weights", ("scores", "fraction"), ("scope", "order", "seed")),
    "difference": Kind(
        "a set difference of weights", ("scores", "utility", "fraction"), ("spare", "scope")
    ),
    "units": Kind(
        "a choice of units (scores by ssah)",
        ("scores", "model", "utility"),
        ("ratios", "top_complex", "normalise"),
    ),
    "budget": Kind("an alignment budget", ("budget", "model", "utility"), ("scores", "normalise")),
    "layers": Kind("a range of layers", ("layers", "model"), ("freeze_norms",)),
}


def kind_of(args: argparse.Namespace, scores: Scores | None) -> str:
    """The key of `KINDS` that the options and the method of the scores ask for."""
    if args.layers is not None:
        return "layers"
    if args.budget is not None:
        return "budget"
    if scores is not None and scores.provenance.get("method") == "ssah":
        return "units"
    return "weights" if args.utility is None else "difference"


def require_fitting(args: argparse.Namespace, key: str) -> None:
    """Check the options against the kind of selection.

    Raises:
        ValueError: one that is not for this kind, or one that is missing.
    """
    kind = KINDS[key]
    for option in sorted({name for each in KINDS.values() for name in (*each.needs, *each.takes)}):
        value = getattr(args, option)
        given = value is not None and value is not False
        if given and option not in (*kind.needs, *kind.takes):
            homes = [each.title for each in KINDS.values() if option in (*each.needs, *each.takes)]
            raise ValueError(
                f"{_said([option])} is {value}, and it is for {' or '.join(homes)}; this call makes"
                f" {kind.title}. Leave it out: {kind.described()}"
            )
    for option in kind.needs:
        if getattr(args, option) is None:
            raise ValueError(
                f"{_said([option])} is not given: {kind.described()}. safeopt select --help lists"
                " the other kinds of masks"
            )


def _said(options: tuple[str, ...] | list[str]) -> str:
    return ", ".join(
        "SCORES" if name == "scores" else f"--{name.replace('_', '-')}" for name in options
    )
