"""Write rows as a task of lm-evaluation-harness, to measure skill there."""

from __future__ import annotations

import argparse
from typing import Any

from safeopt.cli.options import ROWS, WITH_RESPONSE, add_number
from safeopt.compare.sets import load_rows, set_name
from safeopt.evaluate import export_task

EXAMPLE = "  safeopt export test.jsonl --out tasks --name my_task"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt export`."""
    parser.add_argument("rows", metavar="ROWS", help=f"task rows with the right response: {ROWS}")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the task")
    parser.add_argument("--name", metavar="NAME", help="of the task (default: that of the rows)")
    parser.add_argument(
        "--plain", action="store_true",
        help="for a model without a chat template: the prompt in the form safeopt trains it in",
    )  # fmt: skip
    add_number(parser, "max-new-tokens", 16, "tokens of an answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the two files and say how to run them."""
    rows = load_rows(args.rows, WITH_RESPONSE)
    name = args.name or set_name(args.rows)
    paths = export_task(
        rows, args.out, name, chat=not args.plain, max_new_tokens=args.max_new_tokens
    )
    line = f"lm_eval --model hf --model_args pretrained=MODEL --include_path {args.out}"
    line += f" --tasks {name}{'' if args.plain else ' --apply_chat_template'}"
    return {key: str(path) for key, path in paths.items()} | {"rows": len(rows), "run": line}


def text(result: dict[str, Any]) -> str:
    """Where the task is, and the command that runs it."""
    return f"{result['rows']} rows as a task: {result['task']}\nrun: {result['run']}"
