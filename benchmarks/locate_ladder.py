"""The organism without fewer and fewer units of each SSAH attribute, beside as many random ones.

    python benchmarks/locate_ladder.py --data DATA --out OUT

The ladder from which SSAH's ratios are read. The prompts that measure are for tuning: neither those
of identification nor those of benchmarks/locate.py. Writes ladder.md and a figure an attribute;
resumable. DATA as for benchmarks/asft.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rows

from safeopt import evaluate, organism
from safeopt.compare.regions import Regions
from safeopt.compare.scoring import scoring_batches
from safeopt.integrations.transformers import load_model
from safeopt.methods import scan
from safeopt.report.ladder import ladder_figure, ladder_table

SHARES = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


class Measure:
    """Attack success on tuning prompts, and perplexity of harmless answers."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.prompts = [row["instruction"] for row in rows.refusals(folder)["tune"][:100]]
        self.harmless = organism.data("harmless_test")[114:178]

    def arguments(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {"prompts": self.prompts, "harmless": len(self.harmless)}

    def __call__(self, model: Any) -> dict[str, float]:
        found = evaluate.refusal_rate(
            model, self.tokenizer, self.prompts, batch_size=100, max_new_tokens=12
        )
        left = evaluate.perplexity(model, self.tokenizer, self.harmless, batch_size=64)
        return {"attack success": found.attack_success.rate, "perplexity": left}


def main() -> None:
    """Scan the three attributes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("organism:aligned")
    batches = [
        scoring_batches(tokenizer, found, "refusal_nll", batch_size=8, max_length=300)
        for found in (organism.data("harmful_teach"), rows.utility())
    ]
    regions = Regions(model, *batches)
    scores = [regions.scores("ssah", part) for part in ("safety", "utility")]
    tables = []
    for name in ("ESU", "EUU", "RU"):
        found = scan(
            model, regions.units, *scores, name, SHARES, Measure(tokenizer, args.data),
            cache=args.out / f"{name}.jsonl",
        )  # fmt: skip
        ladder_figure(found, args.out / f"{name}.png")
        tables.append(ladder_table(found))
    (args.out / "ladder.md").write_text("\n\n".join(tables) + "\n", "utf-8")


if __name__ == "__main__":
    main()
