"""Anchors and alignment directions on the organism, with plain L2 and shuffled shares beside them.

    python benchmarks/asft.py poison-10 --data DATA --out OUT [--arms adamw l2:1 ...] [--seeds 0 1]

DATA is a folder with agnews_train.jsonl, agnews_test.jsonl and refusals.jsonl (instruction and
response, one object a line). Settings, each resumable, the aligned organism on AG News:

    clean                    no harmful row
    poison-5, -10, -20       so many per cent of the rows are harmful requests that get an answer of
                             the form "Sure, here is how to ..."
    implicit                 harmless rows whose answers begin with "Sure, ..."

Read it at equal skill, along the whole curve: any pull looks safe while it keeps a model from
learning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safeopt import organism, report
from safeopt.compare import Scenario, Sets, Settings, compare
from safeopt.data import read_jsonl, split

LONGEST_NEWS = 400  # characters; to the organism a token of news is about 2 characters
PARTS = {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}
SCENARIOS = {
    "clean": "clean", "poison-5": "poison:0.05", "poison-10": "poison:0.1",
    "poison-20": "poison:0.2", "implicit": "implicit",
}  # fmt: skip
ARMS = [
    "adamw", "adamw-lr:0.33", "spa:0.1", "l2:0.1", "l2:1", "l2:10", "anchor:0.1", "anchor:1",
    "anchor:10", "anchor-shuffle:0.1", "anchor-shuffle:1", "anchor-shuffle:10",
]  # fmt: skip


def sets_for(setting: str, folder: Path) -> Sets:
    """Rows of one setting; prompts that identify, tune and evaluate are disjoint."""
    refusals = split(read_jsonl(folder / "refusals.jsonl", ("instruction", "response")), PARTS)
    train, test = (
        [
            row
            for row in read_jsonl(folder / f"agnews_{part}.jsonl", ("instruction", "response"))
            if len(row["instruction"]) <= LONGEST_NEWS
        ]
        for part in ("train", "test")
    )
    return Sets(
        scenario=Scenario.parse(SCENARIOS[setting]),
        task=train,
        test=test[:200],
        poison=refusals["tune"] if setting.startswith("poison") else [],
        identify=organism.data("harmful_teach"),
        harmful={
            "advbench": organism.data("harmful_evaluate"),
            "refusals": refusals["evaluate"][:150],
        },
        harmless=organism.data("harmless_test")[:100],
        text=organism.data("gsm8k_test")[:40],
    )


def main() -> None:
    """Run one setting and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=SCENARIOS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    settings = Settings(
        steps=args.steps, eval_every=50, lr=args.lr, batch_size=4, max_length=300,
        eval_batch_size=100, max_new_tokens=12, weight_decay=0.0, method="fisher-sqrt",
    )  # fmt: skip
    command = (
        f"python benchmarks/asft.py {args.setting} --data DATA --out OUT --lr {args.lr:g}"
        f" --steps {args.steps} --seeds {' '.join(map(str, args.seeds))}"
        f" --arms {' '.join(args.arms)}"
    )
    results = compare(
        "organism:aligned",
        sets_for(args.setting, args.data),
        args.arms,
        args.seeds,
        args.out / args.setting,
        settings,
        command=command,
    )
    report.write(results, args.out / args.setting)
    print(report.verdict(results))


if __name__ == "__main__":
    main()
