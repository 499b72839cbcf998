"""Compare arms: equal budgets, several seeds, safety and skill along the training curve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.cli.judging import add_judges, load_judges
from safeopt.cli.options import ROWS, WITH_RESPONSE, add_model, add_number, harmful_sets
from safeopt.cli.recommend import advice_of
from safeopt.compare import ARMS, Scenario, Sets, Settings, compare, load_rows
from safeopt.environment import pick_device

EXAMPLE = """\
  safeopt compare organism:aligned --unaligned organism:unaligned --scenario poison:0.1 \\
      --arms adamw spa:0.01 spa-random:0.01 asft:1 asft-l2:1 asft-random:1 \\
      --steps 300 --seeds 0 1 2 --identify organism:harmful_teach \\
      --task organism:headlines_train --poison organism:harmful_poison \\
      --test organism:headlines_test --harmful organism:harmful_evaluate \\
      --harmless organism:harmless_test --out results"""
RESUME = "run the same command again: finished runs in OUT/runs are kept and not run again"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt compare`."""
    arms = "; ".join(
        f"{name}{':VALUE' if kind.takes else ''}: {kind.summary}" for name, kind in ARMS.items()
    )
    arms += ". Those that freeze can be joined: 'spa:0.1|ssah:0.075' freezes what either does,"
    arms += " '&' what both do; 'spa:0.1+anchor:0.3' draws what is not frozen;"
    arms += " any arm with '+mix:100' after it has refusals mixed in"
    add_model(parser)
    parser.add_argument(
        "--scenario",
        default="clean",
        help="clean (default), poison:SHARE, implicit, identity, identity:SHARE, or repair",
    )
    parser.add_argument("--arms", nargs="+", required=True, metavar="ARM", help=arms)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run per arm and seed"
    )
    for name, (needed, text) in _ROWS.items():
        parser.add_argument(f"--{name}", required=needed, metavar="ROWS", help=text)
    parser.add_argument(
        "--harmful", nargs="+", required=True, metavar="ROWS",
        help="NAME=FILE or FILE: attack success",
    )  # fmt: skip
    default = Settings()
    parser.add_argument(
        "--method",
        default=default.method,
        help="of the scores: esi (default), fisher, fisher-sqrt, snip or wanda",
    )
    parser.add_argument(
        "--objective",
        default=default.objective,
        help="of the scores: refusal_nll (default) or margin",
    )
    parser.add_argument(
        "--skill",
        default=default.skill,
        help="what is read as skill: accuracy (default) of whole answers, for labels and numbers,"
        " or tokens, the share of the test answers' tokens that are foreseen, for texts",
    )
    parser.add_argument(
        "--unaligned",
        metavar="MODEL",
        help="the model before alignment, for the arms that read a direction, and their drift",
    )
    parser.add_argument(
        "--lora-targets",
        nargs="+",
        default=list(default.lora_targets),
        metavar="NAME",
        help="layers that get adapters with --lora-rank (default q_proj v_proj)",
    )
    for name, text in _NUMBERS.items():
        add_number(parser, name, getattr(default, name.replace("-", "_")), text)
    add_judges(parser, margin=True)
    add_number(parser, "workers", 1, "processes that share the runs; each loads the model")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="gets runs/, results.json, table.md and figures"
    )


# whether they must be given, and what they are
_ROWS = {
    "identify": (True, f"harmful prompts with refusals: {ROWS}"),
    "task": (True, "rows to learn (refusals, when repairing)"),
    "harmless": (True, "harmless prompts, for over-refusal"),
    "test": (True, "task rows for accuracy and perplexity"),
    "poison": (False, "harmful prompts for the scenario poison"),
    "text": (False, "general rows, for perplexity"),
    "utility": (False, "harmless rows with answers, for arms that set safety against utility"),
    "refusals": (
        False,
        "harmful prompts with refusals, at most 256, for the arms that have them at hand",
    ),
}
_NUMBERS = {
    "steps": "optimizer steps of every arm",
    "eval-every": "steps between points of the curve",
    "lr": "learning rate",
    "weight-decay": "decoupled weight decay",
    "batch-size": "rows per step",
    "max-length": "tokens of prompt and response",
    "max-grad-norm": "clip the gradient of the live weights to this norm",
    "warmup-steps": "steps of linear warm-up",
    "max-new-tokens": "tokens of an answer",
    "eval-batch-size": "prompts at a time in evaluation",
    "fraction": "of the scored weights that count as critical in the drift",
    "lora-rank": "train LoRA adapters of this rank; 0 trains all weights",
    "lora-alpha": "adapters are scaled by this over their rank",
    "direction-rank": "singular vectors of the arms that hold or free a subspace",
    "refusal-share": "share of the training rows that are refusals, where they are mixed in",
    "equal-skill": "share of adamw's final skill at which arms are read beside each other",
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is not there yet, write the report, and return where it is and what it says."""
    settings = Settings(
        method=args.method,
        objective=args.objective,
        skill=args.skill,
        lora_targets=tuple(args.lora_targets),
        **{name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _NUMBERS},
    )
    sets = Sets(
        scenario=Scenario.parse(args.scenario),
        identify=load_rows(args.identify, WITH_RESPONSE),
        task=load_rows(args.task, WITH_RESPONSE),
        poison=load_rows(args.poison) if args.poison else [],
        harmful=harmful_sets(args.harmful),
        harmless=load_rows(args.harmless),
        test=load_rows(args.test, WITH_RESPONSE),
        text=load_rows(args.text, WITH_RESPONSE) if args.text else [],
        utility=load_rows(args.utility, WITH_RESPONSE) if args.utility else [],
        refusals=load_rows(args.refusals, WITH_RESPONSE) if args.refusals else [],
    )
    device = pick_device(args.device)
    results = compare(
        args.model,
        sets,
        args.arms,
        args.seeds,
        args.out,
        settings,
        unaligned=args.unaligned,
        judges=load_judges(args),
        workers=args.workers,
        device=device,
        command=args.line,
    )
    return report_of(results, args.out)


def report_of(results: dict[str, Any], out: str | Path) -> dict[str, Any]:
    """Write the report, and return its files, its numbers, its verdict and recommendations."""
    from safeopt import report
    from safeopt.report.tables import judges

    files = report.write(results, out)
    return {
        "files": [str(path) for path in files],
        "summary": report.summarise(results),
        "verdict": report.verdict(results),
        "judged": "\n".join(judges(results)).rstrip(),
        **advice_of([results]),
    }


def text(result: dict[str, Any]) -> str:
    """Both tables, the files, the verdict and the recommendations."""
    from safeopt.report.tables import equal_skill, equal_steps

    summary = result["summary"]
    return "\n\n".join(
        [
            f"At equal skill, {summary['skill']} {100 * summary['level']:.1f} %:\n"
            + equal_skill(summary),
            *([result["judged"]] if result["judged"] else []),
            "At equal steps, whatever skill each arm has there:\n" + equal_steps(summary),
            "\n".join(result["files"]),
            result["verdict"],
            *result["advice"],
        ]
    )
