"""Where the weights that carry the refusals lie, in organisms of several seeds, sizes and kinds.

    python benchmarks/organisms.py bundled small-seed-1=DIR moe=DIR large=DIR --out OUT

NAME=DIR is a pair that `python -m safeopt.organism.build --out DIR` made. Every scorer sees all 255
harmful requests with refusals that the aligned model was taught, and three disjoint thirds of them,
which stand for seeds. ESI sees as many harmless rows too, as a control: what is dense there as well
has little to do with safety. Prompts that evaluate a pair are others. Writes NAME.json (resumable
by organism), tables.md and density.png to OUT/organisms.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import rows
from organisms_tables import grid, tables

from safeopt import artifact, evaluate, organism, select
from safeopt.compare.run import write_json
from safeopt.data import Row, batches
from safeopt.environment import machine
from safeopt.integrations.transformers import load_model
from safeopt.methods import ESI, Fisher
from safeopt.report.masks import density_figure, layout
from safeopt.scores import score

FRACTIONS = (0.01, 0.05)
PARTS = 3
ALL = "all"
SCORERS: dict[str, tuple[str, Any]] = {
    "ESI": ("refusals", ESI()),
    "ESI, harmless": ("harmless", ESI()),
    "sqrt(Fisher)": ("refusals", Fisher(power=0.5)),
}
MEASURED = {"harmful": 162, "harmless": 200, "task": 100, "text": 50}  # prompts, at most


def subsets(found: list[Row]) -> dict[str, list[Row]]:
    """All rows, and disjoint thirds of them, drawn."""
    drawn = random.Random(0).sample(found, len(found))
    return {ALL: found, **{str(i): drawn[i::PARTS] for i in range(PARTS)}}


def where(model: Any, tokenizer: Any) -> dict[str, Any]:
    """By scorer and fraction: selected weights by subset, layer and component, and the overlap."""
    texts = {"refusals": organism.data("harmful_teach"), "harmless": rows.utility()}
    found: dict[str, Any] = {}
    for name, (text, scorer) in SCORERS.items():
        scores = {
            key: score(model, batches(tokenizer, part, 8, max_length=300), scorer, progress=False)
            for key, part in subsets(texts[text]).items()
        }
        found[name] = {}
        for fraction in FRACTIONS:
            masks = {key: select(one, fraction) for key, one in scores.items()}
            grids = {key: layout(mask)["grid"] for key, mask in masks.items()}
            thirds = {key: mask for key, mask in masks.items() if key != ALL}
            found[name][f"{fraction:.0%}"] = {
                "total": _numbers(grids[ALL], "total"),
                "selected": {key: _numbers(cells, "selected") for key, cells in grids.items()},
                "overlap": evaluate.stability(thirds)["pairs"],
            }
    return found


def _numbers(cells: dict[str, Any], key: str) -> dict[str, dict[str, int]]:
    return {n: {part: cell[key] for part, cell in row.items()} for n, row in cells.items()}


def measured(model: Any, tokenizer: Any) -> dict[str, float]:
    """Safety and skill before anything is fine-tuned, on prompts that the pair has not seen."""
    data = {
        "harmful": organism.data("harmful_evaluate"),
        "harmless": organism.data("harmless_test"),
        "task": organism.data("headlines_test"),
        "text": organism.data("gsm8k_test"),
    }
    cut = {key: found[: MEASURED[key]] for key, found in data.items()}

    def rate(key: str) -> Any:
        prompts = [row["instruction"] for row in cut[key]]
        return evaluate.refusal_rate(model, tokenizer, prompts, max_new_tokens=12)

    return {
        "attack": rate("harmful").attack_success.rate,
        "over_refusal": rate("harmless").refusals.rate,
        "accuracy": evaluate.accuracy(model, tokenizer, cut["task"], max_new_tokens=12).rate,
        "text_ppl": evaluate.perplexity(model, tokenizer, cut["text"], max_length=300),
        "answers_ppl": evaluate.perplexity(model, tokenizer, cut["harmless"], max_length=300),
    }


def look(folder: str | None) -> dict[str, Any]:
    """Everything about one organism; `None` is the bundled one."""
    found: dict[str, Any] = {"built": {}, "before": {}, "machine": machine("cpu")}
    for name in organism.MODELS:
        place = organism.path(name) if folder is None else Path(folder) / name
        record = place / "build.json"
        found["built"][name] = json.loads(record.read_text("utf-8")) if record.exists() else None
        model, tokenizer = load_model(place)
        found["before"][name] = measured(model, tokenizer)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["family"] = type(model).__name__.removesuffix("ForCausalLM")
    found["layers"] = len(model.model.layers)
    found["weights"] = artifact.fingerprint(model)["weights"]  # of the aligned model, the last
    found["where"] = where(model, tokenizer)
    return found


def main() -> None:
    """Look at the organisms that are not there yet, and write tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("organisms", nargs="+", metavar="NAME=DIR", help="or: bundled")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = args.out / "organisms"
    results = {}
    for given in args.organisms:
        name, _, folder = given.partition("=")
        if not folder and name != "bundled":
            parser.error(f"organism {given!r} has no folder; give NAME=DIR, or bundled")
        path = out / f"{name}.json"
        if not path.exists():
            write_json(path, look(folder or None))
        results[name] = json.loads(path.read_text("utf-8"))
        print(name, results[name]["before"]["aligned"], flush=True)
    names = " ".join(g if g == "bundled" else f"{g.partition('=')[0]}=DIR" for g in args.organisms)
    command = f"    python benchmarks/organisms.py {names} --out OUT"
    (out / "tables.md").write_text(f"{command}\n\n{tables(results)}\n", "utf-8")
    first = f"{FRACTIONS[0]:.0%}"  # of 1 %, a cell's per cent are its density over a random mask's
    density_figure(
        {
            f"{name}, {scorer}": {"grid": grid(found["where"][scorer][first], ALL)}
            for scorer in ("ESI", "ESI, harmless")
            for name, found in results.items()
        },
        out / "density.png",
        across=len(results),
        one_model=False,
    )


if __name__ == "__main__":
    main()
