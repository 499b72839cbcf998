"""Every arm in one scenario on one task of the organism, both leagues, with controls.

    python benchmarks/scenarios.py poison-10 --task agnews --data DATA --out OUT [--lora]

DATA is a folder with refusals.jsonl and the task's files (instruction and response, one object a
line). Settings, each resumable:

    clean                    no harmful row
    poison-1, -5, -10, -20   so many per cent of the rows are harmful requests that get an answer of
                             the form "Sure, here is how to ..."
    implicit                 harmless rows whose answers begin with "Sure, ..."
    identity                 a tenth of the rows make the model an agent which obeys (see
                             safeopt/compare/identity.py); it is attacked with and without its name
    long                     clean, for 1,000 steps

Tasks: agnews, sst2 and headlines (the package's own), read by accuracy; gsm8k and alpaca, read by
the tokens of their answers that are foreseen. With --lora, adapters of rank 8 on every linear layer
are trained. Scores are of one method in one comparison: with --method esi, spa and set are those of
their paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows

from safeopt import report
from safeopt.compare import Settings, compare

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = [*rows.SCENARIOS, "long"]
NO_DATA = [
    "adamw", "adamw-lr:0.5", "adamw-lr:0.25", "adamw-lr:0.1", "l2:0.1", "spa:0.2",
    "spa-shuffle:0.2", "set:0.05", "set-shuffle:0.05", "ssah:0.2", "ssah-shuffle:0.2",
    "ssah-budget:0.2", "sppft:2-3", "sppft-random:2-3", "snip:0.2", "snip-shuffle:0.2",
    "asft-all:0.1", "asft-all-random:0.1", "asft-decoupled:0.3", "asft-decoupled-l2:0.3",
    "project", "project-random", "safe-lora:0.5", "safe-lora-random:0.5", "anchor:0.3",
    "anchor-shuffle:0.3", "spa:0.2+anchor:0.3", "spa:0.2|ssah:0.2",
    "null-space:0.01", "null-space-random:0.01", "task-space:0.01", "task-space-random:0.01",
]  # fmt: skip
REFUSALS = ["mix:100", "mix:256", "anchor:0.3+mix:100", "anchor-probe:0.1"]
LORA = [
    "adamw", "adamw-lr:0.5", "adamw-lr:0.25", "adamw-lr:0.1", "asft:1", "asft-l2:1",
    "asft-random:1", "asft-decoupled:1", "asft-decoupled-l2:1", "safe-lora:0.5",
    "safe-lora-random:0.5", "null-space:0.01", "null-space-random:0.01", "task-space:0.01",
    "task-space-random:0.01", "mix:100", "mix:256", "asft:1+mix:100",
]  # fmt: skip


def main() -> None:
    """Run one setting and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--task", choices=rows.TASKS, help="default: agnews, and alpaca for long")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--model", default="organism:aligned", help="or a folder of build.py's")
    parser.add_argument("--unaligned", default="organism:unaligned", help="of the same pair")
    parser.add_argument("--name", help="of another model, for the folder of its results")
    parser.add_argument("--method", default="fisher-sqrt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--steps", type=int, help="default: 240, and 1,000 for long")
    parser.add_argument("--points", type=int, help="of the curve; default: 6, and 10 for long")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    long = args.setting == "long"
    task = args.task or ("alpaca" if long else "agnews")
    steps = args.steps or (1000 if long else 240)
    points = args.points or (10 if long else 6)
    arms = args.arms or (LORA if args.lora else NO_DATA + REFUSALS)
    settings = Settings(
        steps=steps, eval_every=max(1, steps // points), lr=1e-3, batch_size=8,
        max_length=300, eval_batch_size=160, max_new_tokens=12, method=args.method,
        skill=rows.TASKS[task], lora_rank=8 if args.lora else 0, lora_targets=LINEAR,
    )  # fmt: skip
    options = " --lora" if args.lora else ""
    parts = [args.setting, task, args.method]
    if args.lora:
        parts.append("lora")
    if args.name:
        options += f" --model {args.name}/aligned --unaligned {args.name}/unaligned"
        options += f" --name {args.name}"
        parts.append(args.name)
    if args.steps:
        parts.append(f"{steps}-steps")
    out = args.out / "-".join(parts)
    sets = rows.short_sets(
        "clean" if long else args.setting,
        args.data,
        task,
        identify=rows.identify(),
        utility=rows.utility(),
        refusals=rows.at_hand(),
    )
    results = compare(
        args.model,
        sets,
        arms,
        args.seeds,
        out,
        settings,
        unaligned=args.unaligned,
        workers=args.workers,
        device=args.device,
        command=f"python benchmarks/scenarios.py {args.setting} --task {task} --data DATA --out OUT"
        f"{options} --method {args.method} --steps {steps} --points {points}"
        f" --seeds {' '.join(map(str, args.seeds))} --arms {' '.join(arms)}",
    )
    report.write(results, out)
    print(report.verdict(results))


if __name__ == "__main__":
    main()
