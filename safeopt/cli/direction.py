"""Make an alignment direction from an aligned and an unaligned model, and show it per matrix."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.direction import AlignmentDirection
from safeopt.integrations.transformers import located

EXAMPLE = (
    "  safeopt direction --aligned ./chat --unaligned ./base --operator subspace --rank 32 "
    "--out direction.safetensors"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt direction`."""
    add_pair(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the direction (.safetensors)"
    )


def add_pair(parser: argparse.ArgumentParser) -> None:
    """--aligned, --unaligned, --operator and --rank: what a direction is made from."""
    folder = "model folder with safetensors, or organism:aligned, organism:unaligned"
    parser.add_argument("--aligned", metavar="MODEL", help=folder)
    parser.add_argument("--unaligned", metavar="MODEL", help="the model before alignment, likewise")
    parser.add_argument(
        "--operator",
        choices=("safelora", "subspace", "vector"),
        help="safelora: V V^T / ||V||_F, the published one (default); subspace: the top --rank "
        "left singular vectors of V; vector: V itself, for full weights only",
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="singular vectors to keep (default: all of them)"
    )


def between(args: argparse.Namespace) -> AlignmentDirection:
    """The direction that --aligned and its companions describe.

    Raises:
        ValueError: one of the two models is not given, or as `AlignmentDirection.between`.
    """
    if not (args.aligned and args.unaligned):
        raise ValueError(
            f"--aligned is {args.aligned} and --unaligned is {args.unaligned}; a direction is made"
            " from both"
        )
    return AlignmentDirection.between(
        located(args.aligned),
        located(args.unaligned),
        operator=args.operator or "safelora",
        rank=args.rank,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make, save, and return the report per matrix."""
    made = between(args)
    made.save(args.out)
    kind = {key: made.manifest[key] for key in ("operator", "rank")}
    return {"out": str(Path(args.out)), **kind, "matrices": made.report()}


def text(result: dict[str, Any]) -> str:
    """The report as a table."""
    width = max(map(len, result["matrices"]))
    lines = [f"{'matrix':{width}}    ||V||_F  largest    trace   rank  captured"]
    for name, row in result["matrices"].items():
        lines.append(
            f"{name:{width}}  {row['norm']:9.4g} {row['largest']:8.3g} {row['trace']:8.3g}"
            f" {row['rank']:6.0f} {row['captured']:9.3f}"
        )
    return "\n".join([*lines, "", f"written to {result['out']}"])
