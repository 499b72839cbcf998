"""Find the inputs that refusals leave free, for safeopt train --space, and show them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from safeopt.cli.options import ROWS, WITH_RESPONSE, add_model, add_number
from safeopt.compare.sets import load_rows
from safeopt.compare.spaces import TASK_ROWS
from safeopt.data import Row, batches, require_disjoint
from safeopt.environment import pick_device
from safeopt.methods import InputMoments, input_moments, null_space
from safeopt.methods.linear_inputs import Tokens
from safeopt.methods.null_space import require_leak

EXAMPLE = (
    "  safeopt space ./my-model --refusals refusals.jsonl --task task.jsonl --out space.safetensors"
)
SHARES = ("free", "leak", "task")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt space`."""
    add_model(parser)
    parser.add_argument(
        "--refusals",
        required=True,
        metavar="ROWS",
        help=f"harmful prompts with refusals, the answers that must stay: {ROWS}",
    )
    parser.add_argument(
        "--task",
        metavar="ROWS",
        help="rows that will be trained on: take the inputs that they have most of for what "
        "refusals have (default: those that refusals use least, arXiv 2103.07113)",
    )
    add_number(
        parser, "leak", 0.01, "share of the refusals' second moment that may lie in free inputs"
    )
    add_number(parser, "task-rows", TASK_ROWS, "with --task: its first rows, at most")
    parser.add_argument(
        "--tokens",
        choices=get_args(Tokens),
        default="all",
        help="whose inputs count: all tokens (default), or those of the response alone",
    )
    add_number(parser, "batch-size", 8, "prompts at a time")
    add_number(parser, "max-length", 256, "tokens of prompt and response")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the space (.safetensors)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at the inputs, save the space, and return its shares per component."""
    from safeopt.integrations.transformers import load_model

    refusals, task = _rows(args)
    model, tokenizer = load_model(args.model)
    model.to(pick_device(args.device))

    def moments(rows: list[Row]) -> InputMoments:
        made = batches(tokenizer, rows, args.batch_size, max_length=args.max_length)
        return input_moments(model, made, tokens=args.tokens)

    space = null_space(moments(refusals), moments(task) if task else None, leak=args.leak)
    space.save(args.out)
    return {
        "out": str(Path(args.out)),
        "digest": space.digest(),
        "most": args.leak,
        "tokens": args.tokens,
        "rows": {"refusals": len(refusals), "task": len(task)},
        **space.summary(),
    }


def _rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Refusals and the first task rows; ValueError before a model is loaded."""
    require_leak(args.leak)
    if args.task_rows < 1:
        raise ValueError(
            f"--task-rows is {args.task_rows}; it must be at least 1, or leave --task out"
        )
    refusals = load_rows(args.refusals, WITH_RESPONSE)
    if not args.task:
        return refusals, []
    task = load_rows(args.task, WITH_RESPONSE)
    require_disjoint({"identification": {args.refusals: refusals}, "training": {args.task: task}})
    return refusals, task[: args.task_rows]


def text(result: dict[str, Any]) -> str:
    """The shares as a table, means by component, and what the space is for."""
    shown = [share for share in SHARES if share in result["total"]]
    lines = [f"{'':12}{'matrices':>9}" + "".join(f"{share:>10}" for share in shown)]
    for name, row in {"total": result["total"], **result["components"]}.items():
        shares = "".join(f"{row[share]:10.2%}" for share in shown)
        lines.append(f"{name:12}{row['matrices']:>9,}{shares}")
    meaning = (
        "free: of the inputs, what may be answered differently; leak: of the refusals, what lies"
    )
    meaning += " in it" + ("; task: of the task" if "task" in shown else "")
    use = f"use: safeopt train --space {result['out']}, on the same model"
    return "\n\n".join(["\n".join(lines), meaning, use, f"written to {result['out']}"])
