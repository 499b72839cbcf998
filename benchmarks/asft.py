"""Anchors and alignment directions on the organism, with plain L2 and random directions beside.

    python benchmarks/asft.py poison-10 --data DATA --out OUT [--lora] [--arms ...] [--seeds 0 1 2]

DATA is a folder with agnews_train.jsonl, agnews_test.jsonl and refusals.jsonl (instruction and
response, one object a line). Settings, each resumable, the aligned organism on short AG News:

    clean                    no harmful row
    poison-5, -10, -20       so many per cent of the rows are harmful requests that get an answer of
                             the form "Sure, here is how to ..."
    implicit                 harmless rows whose answers begin with "Sure, ..."

With --lora, adapters of rank 8 on every linear layer are trained instead of all weights. With
--stretch C the unaligned model is moved away until V is C times as long, and with it the published
operator V V^T / ||V||_F, which is not free of scale. Read it at equal skill, along the whole curve:
any pull looks safe while it keeps a model from learning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows
import torch

from safeopt import report
from safeopt.compare import Settings, compare
from safeopt.integrations.transformers import load_model, save_model

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The grid at poison-10; elsewhere one strength of each.
GRID = [
    "adamw", "l2:0.1", "asft-all:0.1", "anchor:0.3", "anchor:0.1", "asft:0.3", "asft-l2:0.3",
    "asft-random:0.3", "asft-all-random:0.1", "anchor-shuffle:0.3", "l2:0.3", "asft-all:0.3",
    "asft-all-subspace:0.1", "asft-all-subspace-random:0.1", "project", "project-random",
]  # fmt: skip
SOME = ["adamw", "l2:0.1", "asft-all:0.1", "anchor:0.3"]
LORA = [
    "adamw", "asft:1", "asft-l2:1", "asft-random:1", "asft-subspace:1", "safe-lora:0.5",
]  # fmt: skip


def stretched(factor: float, folder: Path) -> Path:
    """A folder with an unaligned model so far from the aligned one that V is factor times V."""
    aligned, tokenizer = load_model("organism:aligned")
    unaligned, _ = load_model("organism:unaligned")
    with torch.no_grad():
        for p, start in zip(unaligned.parameters(), aligned.parameters(), strict=True):
            p.copy_(start + factor * (p - start))
    save_model(unaligned, tokenizer, folder)
    return folder


def main() -> None:
    """Run one setting and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=rows.SCENARIOS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    arms = args.arms or (LORA if args.lora else GRID if args.setting == "poison-10" else SOME)
    settings = Settings(
        steps=args.steps, eval_every=40, lr=args.lr, weight_decay=0.0, batch_size=8, max_length=300,
        eval_batch_size=160, max_new_tokens=12, method="fisher-sqrt",
        lora_rank=8 if args.lora else 0, lora_targets=LINEAR,
    )  # fmt: skip
    options = " --lora" if args.lora else ""
    options += f" --stretch {args.stretch:g}" if args.stretch != 1 else ""
    out = args.out / (args.setting + options.replace(" --", "-").replace(" ", "-"))
    unaligned: str | Path = "organism:unaligned"
    if args.stretch != 1:
        unaligned = out / "unaligned"
        if not unaligned.exists():
            stretched(args.stretch, unaligned)
    results = compare(
        "organism:aligned",
        rows.short_sets(args.setting, args.data),
        arms,
        args.seeds,
        out,
        settings,
        unaligned=unaligned,
        command=f"python benchmarks/asft.py {args.setting} --data DATA --out OUT{options}"
        f" --lr {args.lr:g} --steps {args.steps}"
        f" --seeds {' '.join(map(str, args.seeds))} --arms {' '.join(arms)}",
    )
    report.write(results, out)
    print(report.verdict(results))


if __name__ == "__main__":
    main()
