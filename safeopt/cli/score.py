"""Score the weights of a model by what its refusals need (ESI, Fisher, SNIP or Wanda)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.cli.options import ROWS, WITH_RESPONSE, add_model, add_number
from safeopt.compare.scoring import METHODS, scoring_batches
from safeopt.compare.sets import load_rows
from safeopt.environment import pick_device

EXAMPLE = "  safeopt score ./my-model --refusals refusals.jsonl@identify --out scores.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt score`."""
    add_model(parser)
    parser.add_argument(
        "--refusals", required=True, metavar="ROWS", help=f"harmful prompts with refusals: {ROWS}"
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="esi",
        help="esi (arXiv 2604.08297, default), snip or wanda (arXiv 2402.05162), for masks; fisher "
        "(arXiv 1612.00796) or its square root, for anchors",
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

    if (args.objective == "guard") != (args.judge is not None):
        raise ValueError(
            f"--objective is {args.objective} and --judge is {args.judge}; guard needs --judge, "
            "the others take none"
        )
    rows = load_rows(args.refusals, ("instruction",) if args.judge else WITH_RESPONSE)
    model, tokenizer = load_model(args.model)
    model.to(pick_device(args.device))
    objective: Any = args.objective
    if args.judge:
        from safeopt.methods.guard import GuardObjective

        objective = GuardObjective.from_folder(
            args.judge, tokenizer, safe=args.safe, unsafe=args.unsafe
        )
    batches = scoring_batches(
        tokenizer, rows, args.objective, batch_size=args.batch_size, max_length=args.max_length
    )
    scores = score(model, batches, METHODS[args.method](objective))
    scores.save(args.out)
    return {
        "out": str(Path(args.out)),
        "tensors": len(scores),
        "weights": scores.count(),
        **scores.provenance,
    }


def text(result: dict[str, Any]) -> str:
    """What was scored and where it is."""
    weights = f"{result['weights']:,} weights in {result['tensors']} tensors"
    return f"{weights} scored on {result['n']} prompts: {result['out']}"
