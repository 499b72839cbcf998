"""Find a range of layers that carries refusals, by cosine curves and an over-rejection search."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.cli.layers_text import curve_table, text
from safeopt.cli.options import ROWS, add_model, add_number, layer_range
from safeopt.compare.sets import load_rows
from safeopt.environment import pick_device
from safeopt.mask import SafetyMask
from safeopt.methods.safety_layers import (
    DETECTORS,
    AlphaChoice,
    InitialRange,
    LayerCurves,
    Localisation,
    OverRejection,
    blocks_of,
    choose_alpha,
    hidden_states,
    initial_range,
    layer_curves,
    layer_mask,
    localise,
)

__all__ = ["EXAMPLE", "RESUME", "configure", "run", "text"]

EXAMPLE = (
    "  safeopt layers ./my-model --normal harmless.jsonl --malicious harmful.jsonl@identify "
    "--over-rejection dangerous-words.jsonl --figure layers.png --out mask.safetensors"
)
RESUME = "run the same command again: counts of the search are kept in --cache, or beside --out"
SEARCH = ("alpha", "spread", "window", "detector", "cache")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt layers`."""
    add_model(parser)
    parser.add_argument("--normal", required=True, metavar="ROWS", help=f"harmless prompts: {ROWS}")
    parser.add_argument(
        "--malicious", required=True, metavar="ROWS", help="harmful prompts of the same form"
    )
    add_number(parser, "threshold", 0.05, "cosine by which the suggested range begins")
    parser.add_argument(
        "--start", metavar="I-J", help="a range instead of the suggested one, from 0, such as 6-14"
    )
    add_number(parser, "batch-size", 16, "prompts at a time")
    parser.add_argument(
        "--figure", metavar="PNG", help="draw the curves with the range, and the search's counts"
    )
    parser.add_argument("--out", metavar="MASK", help="write the mask of the range (.safetensors)")
    parser.add_argument("--freeze-norms", action="store_true", help="with the norms of the layers")
    search = parser.add_argument_group("search, from the suggested range or --start")
    search.add_argument(
        "--over-rejection",
        metavar="ROWS",
        help="harmless prompts with dangerous words, whose refusals are counted while ranges of "
        "layers are scaled",
    )
    search.add_argument(
        "--alpha",
        metavar="A",
        help="scale by this much: 1.1 to 1.2, 0.8 for a model that refuses much, or auto: the first"
        " above 1 whose counts spread enough (default 1.1)",
    )
    search.add_argument(
        "--spread",
        type=float,
        metavar="S",
        help="with --alpha auto: how much the counts must spread, as a standard deviation in "
        "prompts; the paper's is 15 to 20 on 721 prompts",
    )
    search.add_argument(
        "--window", type=int, metavar="N", help="layers each bound may move (default 2)"
    )
    search.add_argument(
        "--detector",
        choices=tuple(DETECTORS),
        help="what counts as a refusal: one of five published openings (default), or any of the "
        "phrases of safeopt evaluate; both are counted, and this one decides",
    )
    search.add_argument(
        "--cache",
        metavar="FILE",
        help="keeps every count, so that a killed search goes on (default: beside --out)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Take the curves, search, draw, write the mask, and return all that was seen."""
    from safeopt.integrations.transformers import load_model

    alpha = _checked(args)
    if args.figure:
        from safeopt.report.figures import require_drawable

        require_drawable(args.figure)
    given = None if args.start is None else layer_range("--start", args.start)
    normal, malicious = _prompts(args.normal), _prompts(args.malicious)
    _require_disjoint(normal, malicious)
    harmless = _prompts(args.over_rejection) if args.over_rejection else None
    model, tokenizer = load_model(args.model)
    if given:
        blocks_of(model).check(given, "--start")
    count = _counter(args, tokenizer, harmless) if harmless else None
    model.to(pick_device(args.device))
    states = [
        hidden_states(model, tokenizer, prompts, batch_size=args.batch_size)
        for prompts in (normal, malicious)
    ]
    curves = layer_curves(*states)
    initial, missing = _suggested(curves, args.threshold)
    start = given or (initial.layers if initial else None)
    _draw(args, curves, given or initial, None)
    try:
        if start is None and (count or args.out):
            wanted = "--over-rejection has no range to search from" if count else "no mask is made"
            raise ValueError(f"{missing}. So {wanted}: give --start I-J, or a lower --threshold")
        choice, found = _search(args, model, count, start, alpha) if count else (None, None)
    except ValueError:
        print(curve_table(curves.to_json()), file=sys.stderr)
        raise
    if found:
        _draw(args, curves, given or initial, found)
    layers = found.layers if found else start
    if args.out:
        mask = _mask(args, model, layers, found, digest=artifact.digest([*normal, *malicious]))
        mask.save(args.out)
    return {
        "curves": curves.to_json(),
        "initial": asdict(initial) if initial else None,
        "no_initial": missing,
        "given": given,
        "alpha_choice": choice.to_json() if choice else None,
        "search": found.to_json() if found else None,
        "cache": _cache(args) if found else None,
        "layers": layers,
        "figure": args.figure,
        "out": args.out,
    }


def _checked(args: argparse.Namespace) -> float | None:
    """Alpha, None for auto; ValueError for options that do not go together or are out of range."""
    beside = [name for name in SEARCH if getattr(args, name) is not None]
    if beside and not args.over_rejection:
        raise ValueError(
            f"--{beside[0]} is {getattr(args, beside[0])}, and it is for the search, which needs"
            " --over-rejection ROWS; give them, or leave it out"
        )
    if args.start and not (args.over_rejection or args.figure or args.out):
        raise ValueError(
            f"--start is {args.start}, and nothing is done with it; give --over-rejection to search"
            " from it, --figure to mark it, or --out for its mask"
        )
    if args.freeze_norms and not args.out:
        raise ValueError("--freeze-norms is about the mask; give --out MASK too, or leave it out")
    if not 0 < args.threshold < 2:
        raise ValueError(
            f"--threshold is {args.threshold}; a difference of cosines lies above 0 and below 2"
        )
    if args.window is not None and args.window < 1:
        raise ValueError(f"--window is {args.window}; give at least 1 layer")
    if (args.alpha == "auto") != (args.spread is not None):
        raise ValueError(
            f"--alpha is {args.alpha} and --spread is {args.spread}; auto needs --spread, which is"
            " for auto alone: there is no published one for other than 721 prompts"
        )
    return None if args.alpha == "auto" else _alpha("1.1" if args.alpha is None else args.alpha)


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not (0 < alpha < math.inf and alpha != 1):
        raise ValueError(
            f"--alpha is {text}; give a number above 0 that is not 1, such as 1.1 or 0.8, or auto"
        )
    return alpha


def _prompts(source: str) -> list[str]:
    return [row["instruction"] for row in load_rows(source)]


def _counter(args: argparse.Namespace, tokenizer: Any, prompts: list[str]) -> OverRejection:
    first = args.detector or next(iter(DETECTORS))
    detectors = {first: DETECTORS[first], **DETECTORS}
    return OverRejection(tokenizer, prompts, detectors=detectors, batch_size=args.batch_size)


def _require_disjoint(normal: list[str], malicious: list[str]) -> None:
    both = set(normal) & set(malicious)
    if both:
        raise ValueError(
            f"{len(both)} prompts stand in --normal and in --malicious, such as {min(both)!r}; a"
            " gap between the two needs two sets"
        )


def _suggested(curves: LayerCurves, threshold: float) -> tuple[InitialRange | None, str | None]:
    """The suggested range, or why there is none."""
    try:
        return initial_range(curves, threshold), None
    except ValueError as error:  # the threshold was checked: there is no gap
        return None, str(error)


def _search(
    args: argparse.Namespace, model: Any, count: OverRejection, start: Any, alpha: float | None
) -> tuple[AlphaChoice | None, Localisation]:
    settings = {"start": start, "window": args.window or 2, "cache": _cache(args)}
    choice = None
    if alpha is None:
        choice = choose_alpha(model, count, spread=args.spread, **settings)
        alpha = choice.alpha
    return choice, localise(model, count, alpha=alpha, **settings)


def _cache(args: argparse.Namespace) -> str | None:
    if args.cache or not args.out:
        return args.cache
    return str(Path(args.out).with_suffix(".counts.jsonl"))


def _draw(
    args: argparse.Namespace, curves: LayerCurves, initial: Any, found: Localisation | None
) -> None:
    if args.figure:
        from safeopt.report.layers import layers_figure

        layers_figure(curves, args.figure, initial=initial, found=found)


def _mask(
    args: argparse.Namespace, model: Any, layers: Any, found: Localisation | None, *, digest: str
) -> SafetyMask:
    if found:
        return found.mask(model, freeze_norms=args.freeze_norms)
    mask = layer_mask(model, layers, freeze_norms=args.freeze_norms)
    if not args.start:
        mask.manifest["arguments"]["threshold"] = args.threshold
        mask.manifest["prompts"] = digest
    return mask
