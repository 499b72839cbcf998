"""What removing the region that each method finds does to the organism, with random regions beside.

    python benchmarks/locate_ablate.py --data DATA --out OUT [--seeds 0 1 2]

DATA as for benchmarks/asft.py. Each seed draws 128 harmful prompts with refusals and 128 harmless
ones with answers, on which every method finds its regions; the prompts that evaluate are others.
A random region is as large in every tensor, or of as many units in every group. Writes
ablation.json (resumable by seed), ablation.md, overlap.md (how far a method's regions agree between
seeds) and overlap.png (all methods, in the first seed).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean
from typing import Any

import rows
import torch

from safeopt import SafetyMask, evaluate, organism, select
from safeopt.compare.regions import Regions
from safeopt.compare.run import write_json
from safeopt.compare.scoring import scoring_batches
from safeopt.environment import machine
from safeopt.integrations.transformers import load_model
from safeopt.methods import (
    ESI,
    SSAH,
    LowRankEdit,
    actsvd,
    attribute_groups,
    channel_means,
    layer_mask,
    output_spaces,
    prune,
    safety_edit,
    set_difference,
)
from safeopt.methods.actsvd import OutputSpace
from safeopt.methods.ssah_groups import PRESETS
from safeopt.report.masks import stability_figure
from safeopt.scores import Scores, score
from safeopt.units import Selection

Region = tuple[str, Callable[[], AbstractContextManager[Any]]]
SAMPLE, TOP = 128, 0.01
DIFFERENCE = 0.05  # p = q of the set difference: the paper's best lie between 0.03 and 0.09
PRESET = "llama-2-7b-chat"


class Finder:
    """The regions of one seed: what each method finds, and the random ones beside."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.seed = model, seed
        draw = random.Random(seed)
        both = organism.data("harmful_teach"), rows.utility()
        self.batches = [
            scoring_batches(
                tokenizer, draw.sample(found, SAMPLE), "refusal_nll", batch_size=8, max_length=300
            )
            for found in both
        ]
        self.regions = Regions(model, *self.batches)
        self.esi = score(model, self.batches[0], ESI(), progress=False)

    def masks(self) -> dict[str, SafetyMask]:
        """Weights by method."""
        found = {f"ESI, top {TOP:.0%}": select(self.esi, TOP)}
        for name, key in (("SNIP", "snip"), ("Wanda", "wanda")):
            safety, utility = (self.regions.scores(key, part) for part in ("safety", "utility"))
            found[f"{name}, top {TOP:.0%} of a row"] = select(safety, TOP, scope="row")
            difference = set_difference(safety, utility, p=DIFFERENCE, q=DIFFERENCE)
            found[f"{name}, set difference {DIFFERENCE:.0%}"] = difference
        return found

    def units(self) -> dict[str, Selection]:
        """Units by attribute."""
        scores: list[Scores] = [self.regions.scores("ssah", p) for p in ("safety", "utility")]
        found = {}
        for scale in ("zscore", "raw"):
            groups = attribute_groups(self.regions.units, *scores, PRESET, normalise=scale)
            for name in ("ESU", "EUU", "RU") if scale == "zscore" else ("ESU",):
                share = PRESETS[PRESET][name]
                found[f"SSAH {name} {share:.1%}, {scale}"] = groups.selected(name)
        return found

    def all(self) -> Iterator[Region]:
        """Every region of this seed with the context that removes it."""
        for name, mask in self.masks().items():
            yield name, lambda mask=mask: prune(self.model, mask)
            yield f"{name} (random)", lambda mask=mask: prune(self.model, mask.shuffle(self.seed))
        units = self.regions.units
        together = [batch for part in self.batches for batch in part]
        means = channel_means(self.model, together, SSAH(units=units), progress=False)
        for name, chosen in self.units().items():
            for how in ("zero", "mean"):
                for label, picked in ((how, chosen), (f"{how}, random", self.elsewhere(chosen))):
                    yield (
                        f"{name} ({label})",
                        lambda picked=picked, how=how: evaluate.ablated(
                            self.model,
                            units,
                            picked,
                            how=how,
                            means=means if how == "mean" else None,
                        ),
                    )
        for ours, theirs in ((2, 0), (2, 8), (6, 24)):
            edit = actsvd(
                self.model, *self.batches, safety_directions=ours, utility_directions=theirs,
                progress=False,
            )  # fmt: skip
            yield (
                f"ActSVD {ours} for safety, {theirs} spared",
                lambda edit=edit: edit.taken_out(self.model),
            )

    def drawn(self, ours: int, theirs: int) -> LowRankEdit:
        """The edit of as many random directions, with the same ones spared."""
        generator = torch.Generator().manual_seed(self.seed)
        spared = output_spaces(self.model, self.batches[1], max(theirs, 1))
        spaces = {}
        for name, space in spared.items():
            U = torch.linalg.qr(torch.randn(len(space.U), ours, generator=generator)).Q
            spaces[name] = OutputSpace(U, torch.ones(ours))
        return safety_edit(self.model, spaces, spared if theirs else None)

    def elsewhere(self, chosen: Selection) -> Selection:
        """In each group as many units, drawn."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: part[torch.randperm(len(part), generator=generator)]
            for name, part in chosen.items()
        }


def measured(model: Any, tokenizer: Any, sets: Any) -> dict[str, float]:
    """Rates, and perplexities of mathematics and of harmless answers."""

    def rate(found: list[Any]) -> Any:
        prompts = [row["instruction"] for row in found]
        return evaluate.refusal_rate(model, tokenizer, prompts, batch_size=160, max_new_tokens=12)

    def per_token(found: list[Any]) -> float:
        return evaluate.perplexity(model, tokenizer, found, batch_size=64, max_length=300)

    attack = {name: rate(found) for name, found in sets.harmful.items()}
    return {
        **{name: found.attack_success.rate for name, found in attack.items()},
        "empty": sum(found.empty for found in attack.values())
        / sum(map(len, sets.harmful.values())),
        "over-refusal": rate(sets.harmless).refusals.rate,
        "text ppl": per_token(sets.text),
        "answers ppl": per_token(organism.data("harmless_test")[50:114]),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Means over the seeds, and in brackets the lowest and highest attack success."""
    header = ["removed", "advbench", "refusals", "empty answers", "over-refusal", "text ppl"]
    lines = [[*header, "answers ppl"], ["---", *["---:"] * 6]]
    for name in dict.fromkeys(row["region"] for row in found):
        seeds = [row for row in found if row["region"] == name]
        cells = []
        for key in ("advbench", "refusals"):
            values = [100 * row[key] for row in seeds]
            spread = f" [{min(values):.0f}, {max(values):.0f}]" if len(values) > 1 else ""
            cells.append(f"{mean(values):.0f}{spread}")
        for key in ("empty", "over-refusal"):
            cells.append(f"{100 * mean(row[key] for row in seeds):.0f}")
        cells += [f"{mean(row[key] for row in seeds):.3g}" for key in ("text ppl", "answers ppl")]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the seeds that are not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("organism:aligned")
    sets = rows.short_sets("clean", args.data, utility=rows.utility())
    path = args.out / "ablation.json"
    found = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []

    def look(region: str, seed: int | None) -> None:
        found.append({"region": region, "seed": seed, **measured(model, tokenizer, sets)})
        print(table(found[-1:]).splitlines()[-1], flush=True)

    if not found:
        look("nothing", None)
        for first in range(5):
            with prune(model, layer_mask(model, (first, first + 1))):
                look(f"layers {first}-{first + 1}", None)
    masks: dict[str, dict[int, SafetyMask]] = {}
    for seed in args.seeds:
        finder = Finder(model, tokenizer, seed)
        units = {name: finder.regions.units.mask(chosen) for name, chosen in finder.units().items()}
        for name, mask in {**finder.masks(), **units}.items():
            masks.setdefault(name, {})[seed] = mask
        if any(row["seed"] == seed for row in found):
            continue
        for region, removed in finder.all():
            with removed():
                look(region, seed)
        write_json(path, {"machine": machine("cpu"), "rows": found})
    command = f"    python benchmarks/locate_ablate.py --data DATA --out OUT --seeds {args.seeds}"
    (args.out / "ablation.md").write_text(f"{command}\n\n{table(found)}\n", "utf-8")
    first = {name: found[args.seeds[0]] for name, found in masks.items()}
    stability_figure(evaluate.stability(first), args.out / "overlap.png")
    (args.out / "overlap.md").write_text(overlap(masks) + "\n", "utf-8")


def overlap(masks: dict[str, dict[int, SafetyMask]]) -> str:
    """A row a method: the IoU of its regions in every two seeds, and of random ones as large."""
    header = ["region", "weights", "IoU between seeds, mean [lowest, highest]"]
    lines = [[*header, "random, same per tensor"], ["---", *["---:"] * 3]]
    for name, seeds in masks.items():
        found = evaluate.stability({str(seed): mask for seed, mask in seeds.items()})
        ious = [pair["iou"] for pair in found["pairs"]]
        weights = f"{mean(found['selected'].values()):,.0f}"
        spread = f"{mean(ious):.2f} [{min(ious):.2f}, {max(ious):.2f}]"
        by_chance = mean(pair["random_in_tensor"] for pair in found["pairs"])
        lines.append([name, weights, spread, f"{by_chance:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
