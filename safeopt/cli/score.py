"""Score the weights of a model by what its refusals need, or its units (--method ssah)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from safeopt.cli.options import ROWS, WITH_RESPONSE, add_model, add_number
from safeopt.compare.scoring import METHODS, scoring_batches
from safeopt.compare.sets import load_rows
from safeopt.environment import pick_device
from safeopt.methods import SSAH
from safeopt.methods.linear_inputs import Tokens
from safeopt.scores import Scorer
from safeopt.units import UnitMap

UNITS = "ssah"
ATTENTION = ("channel", "head", "none")
WITH_TOKENS = (UNITS, "wanda")
EXAMPLE = "  safeopt score ./my-model --refusals refusals.jsonl@identify --out scores.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt score`."""
    add_model(parser)
    parser.add_argument(
        "--refusals",
        required=True,
        metavar="ROWS",
        help="harmful prompts with refusals, or, for the utility scores that safeopt select sets "
        f"against them, harmless instructions with their responses: {ROWS}",
    )
    parser.add_argument(
        "--method",
        choices=(*METHODS, UNITS),
        default="esi",
        help="esi (arXiv 2604.08297, default), snip or wanda (arXiv 2402.05162), for masks; fisher "
        "(arXiv 1612.00796) or its square root, for anchors; ssah (arXiv 2410.10862), for masks of "
        "units: MLP channels and attention channels or heads",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        help="with ssah: the units of attention (default channel; none: MLP channels only)",
    )
    parser.add_argument(
        "--tokens",
        choices=get_args(Tokens),
        help="with ssah and wanda: what counts, tokens of the response (default) or all of them",
    )
    parser.add_argument(
        "--objective",
        choices=("refusal_nll", "margin", "guard"),
        default="refusal_nll",
        help="what counts as safety: likelihood of the refusal (default), refusal minus compliance "
        "(field compliance, or 'Sure, here is how to ...'), or the verdict of the --judge",
    )
    parser.add_argument(
        "--judge", metavar="FOLDER", help="classifier or guard model, for --objective guard"
    )
    parser.add_argument(
        "--safe", default="safe", help="the judge's safe label or verdict word (default: safe)"
    )
    parser.add_argument(
        "--unsafe", default="unsafe", help="a guard's other verdict word (default: unsafe)"
    )
    add_number(parser, "batch-size", 8, "prompts at a time")
    add_number(parser, "max-length", 256, "tokens of prompt and response")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the scores (.safetensors)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score, save, and return the provenance."""
    from safeopt.integrations.transformers import load_model
    from safeopt.scores import score

    _check(args)
    rows = load_rows(args.refusals, ("instruction",) if args.judge else WITH_RESPONSE)
    model, tokenizer = load_model(args.model)
    model.to(pick_device(args.device))
    objective: Any = args.objective
    if args.judge:
        from safeopt.methods.guard import GuardObjective

        objective = GuardObjective.from_folder(
            args.judge, tokenizer, safe=args.safe, unsafe=args.unsafe
        )
    scorer = _scorer(args, objective, model)
    batches = scoring_batches(
        tokenizer, rows, args.objective, batch_size=args.batch_size, max_length=args.max_length
    )
    scores = score(model, batches, scorer)
    scores.save(args.out)
    return {
        "out": str(Path(args.out)),
        "tensors": len(scores),
        "units" if args.method == UNITS else "weights": scores.count(),
        **scores.provenance,
    }


def _check(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    if (args.objective == "guard") != (args.judge is not None):
        raise ValueError(
            f"--objective is {args.objective} and --judge is {args.judge}; guard needs --judge, "
            "the others take none"
        )
    if args.attention and args.method != UNITS:
        raise ValueError(
            f"--attention {args.attention} says which units {UNITS} scores, and --method is"
            f" {args.method}, which scores weights; leave --attention out"
        )
    if args.tokens and args.method not in WITH_TOKENS:
        raise ValueError(
            f"--tokens {args.tokens} is for {' and '.join(WITH_TOKENS)}, and --method is"
            f" {args.method}, which has no such choice; leave --tokens out"
        )
    if args.method == UNITS and args.objective != "refusal_nll":
        raise ValueError(
            f"method {UNITS} scores by the responses alone and objective is {args.objective!r};"
            " leave the objective out, or take esi or fisher"
        )


def _scorer(args: argparse.Namespace, objective: Any, model: Any) -> Scorer:
    if args.method == UNITS:
        units = UnitMap.of(model, attention=args.attention or "channel")
        return SSAH(units=units, tokens=args.tokens or "response")
    scorer: Any = METHODS[args.method](objective)
    return replace(scorer, tokens=args.tokens) if args.tokens else scorer


def text(result: dict[str, Any]) -> str:
    """What was scored and where it is."""
    kind, holders = ("units", "groups") if "weights" not in result else ("weights", "tensors")
    scored = f"{result[kind]:,} {kind} in {result['tensors']} {holders}"
    return f"{scored} scored on {result['n']} prompts: {result['out']}"
