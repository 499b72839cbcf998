"""Which units change their attribute in fine-tuning (SSAH's attribute transfer), on the organism.

    python benchmarks/locate_transfer.py --data DATA --out OUT [--steps 200]

The aligned organism is trained with AdamW on harmless news, on which it loses its safety, and its
units are labelled before and after with the cut-offs of before. Writes transfer.png and prints the
shares of all units as a table. DATA as for benchmarks/asft.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows
import torch

from safeopt import organism
from safeopt.compare.scoring import scoring_batches
from safeopt.integrations.transformers import load_model
from safeopt.methods import SSAH, attribute_groups, transitions
from safeopt.report.transitions import transition_figure
from safeopt.scores import score
from safeopt.train import TrainConfig, train
from safeopt.units import UnitMap


def main() -> None:
    """Score, train, score again, and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("organism:aligned")
    scorer = SSAH(units=UnitMap.of(model))
    batches = [
        scoring_batches(tokenizer, found, "refusal_nll", batch_size=8, max_length=300)
        for found in (organism.data("harmful_teach"), rows.utility())
    ]
    before = attribute_groups(
        scorer.units, *(score(model, part, scorer) for part in batches), "llama-2-7b-chat"
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    news = rows.short_news(args.data)[0]
    train(
        model, tokenizer, news, optimizer,
        TrainConfig(steps=args.steps, batch_size=8, max_length=300, seed=0),
    )  # fmt: skip
    found = transitions(before, before.relabel(*(score(model, part, scorer) for part in batches)))
    transition_figure(found, args.out / "transfer.png")
    names = found["attributes"]
    print(f"| before, after | {' | '.join(names)} | all |\n| --- |{' ---: |' * (len(names) + 1)}")
    sums = [sum(column) for column in zip(*found["shares"], strict=True)]
    for name, row in zip([*names, "all"], [*found["shares"], sums], strict=True):
        cells = [f"{100 * value:.2f}" for value in [*row, sum(row)]]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
