"""Project a fine-tuned adapter or model back on the alignment direction (Safe LoRA)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.cli.direction import add_pair, between
from safeopt.direction import AlignmentDirection
from safeopt.integrations.transformers import located

EXAMPLE = (
    "  safeopt project ./my-adapter --aligned ./chat --unaligned ./base --layers 10 --out ./safe"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt project`."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a PEFT LoRA adapter, or of a fine-tuned model"
    )
    add_pair(parser)
    parser.add_argument(
        "--direction", metavar="FILE", help="made by safeopt direction, instead of two models"
    )
    parser.add_argument(
        "--anchor",
        metavar="MODEL",
        help="for a model: its state before fine-tuning (default: --aligned)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="C",
        help="project layers whose cosine is at most C, from 0 to 1 (default 0.5)",
    )
    parser.add_argument(
        "--layers", type=int, metavar="K", help="instead: project the K least similar layers"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write the projected folder"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Project, write the folder, and return the report per layer."""
    from safeopt.integrations import safe_lora

    rule = {"threshold": args.threshold, "layers": args.layers}
    adapter = safe_lora.is_adapter(args.model)
    if adapter and args.anchor:
        raise ValueError(
            f"--anchor {args.anchor} is for a fine-tuned model, and {args.model} is an adapter,"
            " which is a change already; leave --anchor out"
        )
    if not adapter and not (args.anchor or args.aligned):
        raise ValueError(
            f"{args.model} is no adapter folder, so it needs --anchor: the model before fine-tuning"
        )
    direction = _direction(args)
    if adapter:
        report = safe_lora.project_adapter_folder(args.model, args.out, direction, **rule)
    else:
        anchor = located(args.anchor or args.aligned)
        report = safe_lora.project_model_folder(
            located(args.model), args.out, direction, anchor, **rule
        )
    return {
        "out": str(Path(args.out)),
        "kind": "adapter" if adapter else "model",
        **{key: direction.manifest.get(key) for key in ("operator", "rank")},
        "projected": sum(bool(row["projected"]) for row in report.values()),
        "layers": report,
    }


def _direction(args: argparse.Namespace) -> AlignmentDirection:
    if not args.direction:
        return between(args)
    given = [k for k in ("aligned", "unaligned", "operator", "rank") if getattr(args, k)]
    if given:
        raise ValueError(
            f"--direction {args.direction} and --{given[0]} both say what the direction is; give"
            " one of them (and --anchor for the model before fine-tuning)"
        )
    return AlignmentDirection.load(args.direction)


def text(result: dict[str, Any]) -> str:
    """The layers as a table: cosine, whether projected, share of the update kept."""
    rows = result["layers"]
    width = max(map(len, rows))
    lines = [f"{'layer':{width}}  cosine  projected  kept"]
    for name, row in rows.items():
        cosine = "     -" if row["cosine"] is None else f"{row['cosine']:6.3f}"
        done = "yes" if row["projected"] else "no"
        lines.append(f"{name:{width}}  {cosine}  {done:>9}  {row['kept']:4.0%}")
    total = f"{result['projected']} of {len(rows)} layers projected"
    return "\n".join([*lines, "", f"{total}; written to {result['out']}"])
