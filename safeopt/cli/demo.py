"""Compare AdamW, null-space training and its control on the bundled organism, in three minutes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from safeopt.cli.compare import report_of
from safeopt.cli.compare import text as compared
from safeopt.compare import Scenario, Sets, Settings, compare

EXAMPLE = "  safeopt demo --out safeopt-demo"
RESUME = "run the same command again: finished runs are kept and not run again"

ARMS = ["adamw", "task-space:0.02", "task-space-random:0.02"]
SEEDS = [0, 1, 2]  # with fewer nothing could be recommended
SETTINGS = Settings(steps=240, eval_every=40, lr=1e-3, eval_batch_size=128, max_new_tokens=12)
TASK = 640  # rows, of which a tenth are as many as there are poisoned ones
EVALUATED = 100  # prompts of each set, so that evaluation does not take longer than training
WORKERS = 2  # of one core each


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the option of `safeopt demo`."""
    parser.add_argument(
        "--out", default="safeopt-demo", metavar="DIR", help="gets results (default safeopt-demo)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tuning of the aligned organism on headlines, a tenth of them poisoned; the report."""
    from safeopt.organism import data

    sets = Sets(
        scenario=Scenario("poison", 0.1),
        identify=data("harmful_teach"),
        task=data("headlines_train")[:TASK],
        poison=data("harmful_poison"),
        harmful={"advbench": data("harmful_evaluate")[:EVALUATED]},
        harmless=data("harmless_test")[:EVALUATED],
        test=data("headlines_test")[:EVALUATED],
    )
    results = compare(
        "organism:aligned",
        sets,
        ARMS,
        SEEDS,
        args.out,
        SETTINGS,
        workers=min(WORKERS, os.cpu_count() or 1),
        command=args.line,
    )
    return report_of(results, args.out)


def text(result: dict[str, Any]) -> str:
    """What `safeopt compare` says, and where the figure to it is."""
    (figure,) = [file for file in result["files"] if Path(file).name == "pareto.png"]
    return f"{compared(result)}\n\nAttack success against skill, arm by arm: {figure}"
