"""Show where masks lie, by layer and component, and how much several of them overlap."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from safeopt.evaluate import stability
from safeopt.mask import SafetyMask

EXAMPLE = (
    "  safeopt inspect seed0.safetensors seed1.safetensors --figure layers.png --overlap iou.png"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt inspect`."""
    parser.add_argument(
        "masks",
        nargs="+",
        metavar="MASK",
        help="FILE or NAME=FILE: masks of one model, made by safeopt select or SafetyMask.save",
    )
    parser.add_argument(
        "--figure", metavar="PNG", help="draw the selected share of each layer and component"
    )
    parser.add_argument(
        "--overlap", metavar="PNG", help="with several masks: draw the IoU of every two"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, count, draw, and return the counts."""
    from safeopt.report.masks import density_figure, layout, stability_figure

    if args.overlap and len(args.masks) < 2:
        raise ValueError(f"--overlap {args.overlap} compares masks; give at least two of them")
    files = _files(args.masks)
    masks = {name: SafetyMask.load(file) for name, file in files.items()}
    layouts = {name: layout(mask) for name, mask in masks.items()}
    found = stability(masks) if len(masks) > 1 else None
    if args.figure:
        density_figure(layouts, args.figure)
    if found and args.overlap:
        stability_figure(found, args.overlap)
    return {
        "masks": {
            name: {"file": file, "manifest": masks[name].manifest, "bits": _bits(masks[name])}
            | layouts[name]
            for name, file in files.items()
        },
        "stability": found,
        "figures": [path for path in (args.figure, args.overlap) if path],
    }


def text(result: dict[str, Any]) -> str:
    """What each mask is, its table, then the overlaps."""
    from safeopt.report.masks import density_table, stability_table

    parts = []
    for name, mask in result["masks"].items():
        total = mask["total"]
        bits = ", ".join(
            f"{row['selected']:,} of {row['total']:,} {kind}s in {row['parameters']} parameters"
            for kind, row in mask["bits"].items()
        )
        parts.append(
            f"{name}: {total['selected']:,} of {total['total']:,} elements selected"
            f" ({total['density']:.4%}); {bits}\n"
            f"made by: {made(mask['manifest'])}\n\n{density_table(mask)}"
        )
    if result["stability"]:
        parts.append(stability_table(result["stability"]))
    parts += [f"drawn: {path}" for path in result["figures"]]
    return "\n\n".join(parts)


def _files(words: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals or Path(word).exists():
            name, rest = Path(word).stem, word
        if name in files:
            raise ValueError(
                f"{files[name]} and {rest} would both be named {name!r}; name them:"
                f" one={files[name]} two={rest}"
            )
        files[name] = rest
    return files


def _bits(mask: SafetyMask) -> dict[str, dict[str, int]]:
    """Set and all bits by what one bit rules: weight, row, column or tensor."""
    rows: dict[str, Counter[str]] = {}
    for one in mask.values():
        row = rows.setdefault(one.granularity, Counter(selected=0))
        row.update(selected=one.count_units(), total=one.nbits, parameters=1)
    return {kind: dict(row) for kind, row in rows.items()}


def made(manifest: dict[str, Any]) -> str:
    """How a mask was made: method, arguments, model."""
    arguments = manifest.get("arguments", {})
    said = [f"{key} {value}" for key, value in arguments.items() if not _nested(value)]
    model = (manifest.get("model") or {}).get("weights")
    said += [f"model weights {model[:12]}"] if model else []
    return ", ".join([_method(manifest), *said])


def _nested(value: Any) -> bool:
    """Whether it is a table, such as the counts of a search: too long for a line."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_nested, value)))


def _method(manifest: dict[str, Any]) -> str:
    """The method, or for a combination of masks the formula: "(esi - ssah)"."""
    method, of = manifest.get("method", "unknown method"), manifest.get("of", [])
    inner = [_method(one) for one in of]
    if len(inner) == 1:
        return f"{method}({inner[0]})"
    return f"({f' {method} '.join(inner)})" if inner else method
