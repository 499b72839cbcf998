"""Make a mask of the weights with the highest scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.mask import SafetyMask
from safeopt.scores import Scores
from safeopt.selection import select

EXAMPLE = "  safeopt select scores.safetensors --fraction 0.01 --out mask.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt select`."""
    parser.add_argument("scores", metavar="SCORES", help="file made by safeopt score")
    parser.add_argument(
        "--fraction", type=float, required=True, help="of the scored weights, in (0, 1)"
    )
    parser.add_argument(
        "--scope",
        choices=("model", "tensor", "row"),
        default="model",
        help="where to rank (default model)",
    )
    parser.add_argument(
        "--order",
        choices=("top", "bottom", "random"),
        default="top",
        help="which to take (default top)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --order random (default 0)")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the mask (.safetensors)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Select, save, and return the mask's summary."""
    mask = select(
        Scores.load(args.scores), args.fraction, scope=args.scope, order=args.order, seed=args.seed
    )
    mask.save(args.out)
    return {"out": str(Path(args.out)), "digest": mask.digest(), **mask.summary()}


def text(result: dict[str, Any]) -> str:
    """The summary as a table, per layer and component."""
    return f"{SafetyMask.load(result['out'])}\n\nwritten to {result['out']}"
