"""SPA and SET (arXiv 2604.08297) on the organism, with their controls.

    python benchmarks/esi.py spa-clean --data DATA --out OUT

DATA is a folder with agnews_train.jsonl, agnews_test.jsonl and refusals.jsonl (instruction and
response, one object a line). Three settings, each resumable:

    spa-clean     aligned organism, 1,000 steps on AG News, SPA freezing 1 % and 10 %
    spa-poison    the same, with 10 % of the rows harmful requests that get an answer of the form
                  "Sure, here is how to ..."
    set           unaligned organism, 100 steps on refusals, SET training 1 %

The recipe is that of the paper's script where it is known (effective batch 4, weight decay 0), and
ours elsewhere.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import rows

from safeopt import organism, report
from safeopt.compare import Scenario, Sets, Settings, compare

SPA = ["adamw", "spa:0.01", "spa-random:0.01", "spa:0.1", "spa-random:0.1"]
SET = ["adamw", "adamw-lr:0.33", "set:0.01", "set-random:0.01", "set-shuffle:0.01"]
COMMON = {
    "batch_size": 4,
    "max_length": 300,
    "eval_batch_size": 100,
    "max_new_tokens": 12,
    "weight_decay": 0.0,
}


def sets_for(setting: str, folder: Path) -> Sets:
    """Rows of one setting; prompts that identify, tune and evaluate are disjoint."""
    refused = rows.refusals(folder)
    harmful = {
        "advbench": organism.data("harmful_evaluate"),
        "refusals": refused["evaluate"][:150],
    }
    common = {
        "identify": organism.data("harmful_teach"),
        "harmful": harmful,
        "harmless": organism.data("harmless_test")[:150],
        "text": organism.data("gsm8k_test")[:60],
    }
    if setting == "set":
        task = [row for row in refused["tune"] if len(row["instruction"] + row["response"]) < 600]
        # What is to be kept: harmless answers, and their perplexity as that of the "task".
        test = organism.data("harmless_test")[:100]
        common["identify"] = refused["identify"][:256]
        return Sets(scenario=Scenario.parse("repair"), task=task, test=test, **common)
    train, test = rows.news(folder)
    scenario = "clean" if setting == "spa-clean" else "poison:0.1"
    poison = [] if setting == "spa-clean" else refused["tune"]
    return Sets(
        scenario=Scenario.parse(scenario), task=train, test=test[:200], poison=poison, **common
    )


def settings_for(setting: str) -> Settings:
    """Budget of one setting."""
    if setting == "set":
        return Settings(steps=100, eval_every=20, lr=1e-3, **COMMON)
    return Settings(steps=1000, eval_every=200, lr=3e-4, **COMMON)


def main() -> None:
    """Run one setting and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=("spa-clean", "spa-poison", "set"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="default: 3e-4 for SPA, 1e-3 for SET")
    args = parser.parse_args()
    settings = settings_for(args.setting)
    command = f"python benchmarks/esi.py {args.setting} --data DATA --out OUT"
    if args.lr is not None:
        settings, command = replace(settings, lr=args.lr), f"{command} --lr {args.lr:g}"
    results = compare(
        "organism:unaligned" if args.setting == "set" else "organism:aligned",
        sets_for(args.setting, args.data),
        SET if args.setting == "set" else SPA,
        args.seeds,
        args.out / args.setting,
        settings,
        command=command,
    )
    report.write(results, args.out / args.setting)
    print(report.verdict(results))


if __name__ == "__main__":
    main()
