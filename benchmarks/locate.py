"""Freezing what each method finds, on the organism: equal budgets, with controls.

    python benchmarks/locate.py poison-10 --data DATA --out OUT [--arms ...] [--seeds 0 1 2]

DATA and the settings (clean, implicit, poison-10 ...) are those of benchmarks/asft.py; resumable.
Every arm that freezes weights or units freezes a fifth of those it ranks; SPPFT freezes two of the
six layers, each pair of layers the control of the others. What removing the regions does is
measured by benchmarks/locate_ablate.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows

from safeopt import report
from safeopt.compare import Settings, compare

ARMS = [
    "adamw", "spa:0.2", "spa-shuffle:0.2", "ssah:0.2", "ssah-shuffle:0.2", "snip:0.2",
    "snip-shuffle:0.2", "wanda:0.2", "sppft:0-1", "sppft:2-3", "sppft:4-5", "ssah-budget:0.2",
    "ssah-budget-shuffle:0.2",
]  # fmt: skip


def main() -> None:
    """Run one setting and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=rows.SCENARIOS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    settings = Settings(
        steps=args.steps, eval_every=50, lr=1e-3, weight_decay=0.0, batch_size=8, max_length=300,
        eval_batch_size=160, max_new_tokens=12,
    )  # fmt: skip
    out = args.out / args.setting
    results = compare(
        "organism:aligned",
        rows.short_sets(args.setting, args.data, utility=rows.utility()),
        args.arms,
        args.seeds,
        out,
        settings,
        command=f"python benchmarks/locate.py {args.setting} --data DATA --out OUT"
        f" --steps {args.steps} --seeds {' '.join(map(str, args.seeds))}"
        f" --arms {' '.join(args.arms)}",
    )
    report.write(results, out)
    print(report.verdict(results))


if __name__ == "__main__":
    main()
