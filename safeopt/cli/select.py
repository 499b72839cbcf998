"""Make a mask: of the weights or units that scores pick, or of a range of layers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safeopt.cli.options import MODEL, USES, layer_range
from safeopt.cli.select_kinds import kind_of, require_fitting
from safeopt.cli.select_units import budget, units
from safeopt.mask import SafetyMask
from safeopt.methods import layer_mask, set_difference
from safeopt.methods.unit_scaling import NORMALISE
from safeopt.scores import Scores
from safeopt.selection import select

EXAMPLE = "  safeopt select scores.safetensors --fraction 0.01 --out mask.safetensors"
RATIOS = "llama-2-7b-chat"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt select`."""
    parser.add_argument(
        "scores", nargs="?", metavar="SCORES", help="safety scores, made by safeopt score"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write the mask (.safetensors)"
    )
    parser.add_argument(
        "--utility",
        metavar="FILE",
        help="scores of the same model on harmless rows: the mask is what safety needs and utility "
        "does not",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help=f"for units and layers, the model they are of: {MODEL}"
    )
    _add_weights(parser.add_argument_group("weights: SCORES --fraction, perhaps --utility"))
    _add_units(
        parser.add_argument_group(
            "units: SCORES by ssah, --model --utility; or [SCORES] --model --utility --budget"
        )
    )
    layers = parser.add_argument_group("layers: --layers --model, no SCORES")
    layers.add_argument(
        "--layers", metavar="I-J", help="whole layers, from 0 and both ends in, such as 6-14"
    )
    layers.add_argument("--freeze-norms", action="store_true", help="with their norms")


def _add_weights(group: Any) -> None:
    group.add_argument("--fraction", type=float, help="of the scored weights, in (0, 1)")
    group.add_argument(
        "--scope",
        choices=("model", "tensor", "row"),
        help="where to rank (default model; with --utility row, and never model)",
    )
    group.add_argument(
        "--order", choices=("top", "bottom", "random"), help="which to take (default top)"
    )
    group.add_argument("--seed", type=int, help="for --order random (default 0)")
    group.add_argument(
        "--spare",
        type=float,
        metavar="P",
        help="with --utility: the top share for utility that is left out (default: --fraction)",
    )


def _add_units(group: Any) -> None:
    group.add_argument(
        "--ratios",
        metavar="R",
        help="shares of units, ESU=0.013,EUU=0.133,RU=0.148, or a published preset (default "
        f"{RATIOS})",
    )
    group.add_argument(
        "--top-complex",
        metavar="SHARE",
        help="also freeze this share of the complex units, of all units, or all (default 0.06)",
    )
    group.add_argument(
        "--normalise", choices=NORMALISE, help="scores within layer and kind (default zscore)"
    )
    group.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="of the model's parameters, in the units of lowest --utility (and SCORES), which alone"
        " may move while a model is aligned; the paper's is 0.2",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Select, save, and return the mask's summary."""
    scores = Scores.load(args.scores) if args.scores else None
    kind = kind_of(args, scores)
    require_fitting(args, kind)
    mask = MAKERS[kind](args, scores)
    mask.save(args.out)
    return {
        "out": str(Path(args.out)),
        "digest": mask.digest(),
        "kind": kind,
        "use": mask.manifest.get("use") or ("freeze" if kind in FROZEN else None),
        "units": mask.manifest.get("counts"),
        **mask.summary(),
    }


def text(result: dict[str, Any]) -> str:
    """The summary as a table, per layer and component, and what the mask is for."""
    parts = [str(SafetyMask.load(result["out"]))]
    if result["units"]:
        of_units, weights = result["units"]["units"], result["units"]["parameters"]
        parts.append(
            f"{of_units['selected']:,} of {of_units['total']:,} units ({of_units['share']:.2%}),"
            f" {weights['share_of_model']:.2%} of the model's parameters"
        )
    parts += [USES[result["use"]].format(out=result["out"]), f"written to {result['out']}"]
    return "\n\n".join(parts)


def _weights(args: argparse.Namespace, scores: Scores) -> SafetyMask:
    return select(
        scores,
        args.fraction,
        scope=args.scope or "model",
        order=args.order or "top",
        seed=args.seed or 0,
    )


def _difference(args: argparse.Namespace, scores: Scores) -> SafetyMask:
    if args.scope == "model":
        raise ValueError(
            "--scope is model, and with --utility it must be row or tensor: the two rankings are"
            " compared matrix by matrix (arXiv 2402.05162), as scores of different matrices are not"
            " on one scale; leave --scope out for row"
        )
    return set_difference(
        scores,
        Scores.load(args.utility),
        q=args.fraction,
        p=args.fraction if args.spare is None else args.spare,
        scope=args.scope or "row",
    )


def _units(args: argparse.Namespace, scores: Scores) -> SafetyMask:
    return units(
        args.model,
        scores,
        Scores.load(args.utility),
        ratios=RATIOS if args.ratios is None else args.ratios,
        top_complex="0.06" if args.top_complex is None else args.top_complex,
        normalise=args.normalise or "zscore",
    )


def _budget(args: argparse.Namespace, scores: Scores | None) -> SafetyMask:
    return budget(
        args.model,
        Scores.load(args.utility),
        scores,
        share=args.budget,
        normalise=args.normalise or "zscore",
    )


def _layers(args: argparse.Namespace, scores: None) -> SafetyMask:
    from safeopt.integrations.transformers import load_model

    layers = layer_range("--layers", args.layers)
    return layer_mask(load_model(args.model)[0], layers, freeze_norms=args.freeze_norms)


MAKERS: dict[str, Any] = {
    "weights": _weights,
    "difference": _difference,
    "units": _units,
    "budget": _budget,
    "layers": _layers,
}
FROZEN = ("difference", "layers")
