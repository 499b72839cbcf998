"""Arms that freeze or train what SSAH, Safety Layers and attribution find, and compositions."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets, numbered
from conftest import make_llama
from test_compare_arms import random_scores, step

from safeopt import SafetyMask, select
from safeopt.compare import ARMS, Context, compare, parse_arms
from safeopt.compare.arms import parse_arm
from safeopt.compare.directions import Directions
from safeopt.compare.region_arms import REGION_ARMS
from safeopt.compare.regions import Regions
from safeopt.compare.run import run_file
from safeopt.methods import alignment_budget, attribute_groups, freeze_mask, set_difference
from safeopt.methods.ssah_groups import PRESETS
from safeopt.methods.unit_scaling import Scaling

VALUES = {"fraction": "0.2", "layers": "1-2"}
LAYERS = 4


def batch(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (6, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    texts = [f"prompt {seed} {i}" for i in range(len(ids))]
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "texts": texts}


@cache
def regions() -> Regions:
    return Regions(make_llama(num_hidden_layers=LAYERS), [batch(1)], [batch(2), batch(3)])


def context(seed: int = 3, **options: Any) -> Context:
    model = copy.deepcopy(regions().model)
    given = {"scores": random_scores(model), "lr": 1e-2, "weight_decay": 0.1, "regions": regions()}
    return Context(model=model, seed=seed, **{**given, **options})


def mask_of(text: str, seed: int = 3) -> SafetyMask:
    mask = parse_arm(text).plan(context(seed)).mask
    assert mask is not None
    return mask


def text_of(name: str) -> str:
    return f"{name}:{VALUES[ARMS[name].takes]}"


def counts(mask: SafetyMask) -> dict[str, int]:
    return {name: bits.count() for name, bits in mask.items()}


@pytest.mark.parametrize("name", REGION_ARMS)
def test_each_arm_moves_just_what_it_says(name: str) -> None:
    given = context()
    before = {key: value.clone() for key, value in given.model.named_parameters()}
    plan = parse_arm(text_of(name)).plan(given)
    step(given.model, plan.optimizer)
    assert plan.mask is not None and plan.mask.count() > 0
    freezes = not name.startswith("ssah-budget")
    for key, value in given.model.named_parameters():
        moved = value != before[key]
        chosen = plan.mask.to_bool(key) if key in plan.mask else torch.zeros_like(moved)
        still = chosen if freezes else ~chosen
        assert not moved[still].any(), key
        assert moved[~still].any() or not (~still).any(), key


@pytest.mark.parametrize("name", [name for name, kind in REGION_ARMS.items() if kind.control])
def test_controls_are_as_large_as_what_they_stand_for_and_elsewhere(name: str) -> None:
    base = name.rpartition("-")[0]
    found, control = mask_of(text_of(base)), mask_of(text_of(name))
    assert ARMS[name].control and not ARMS[base].control
    assert control.digest() != found.digest()
    if name.endswith("-shuffle"):  # v rows that are shared may be hit more or less often
        rest = {k: n for k, n in counts(found).items() if "v_proj" not in k}
        assert {k: n for k, n in counts(control).items() if k in rest} == rest
    elif name == "ssah-utility":  # as many units, not of one size
        down = {k: bits for k, bits in control.items() if "down_proj" in k or "o_proj" in k}
        assert sum(b.count_units() for b in down.values()) == sum(
            found[k].count_units() for k in down
        )
    else:
        assert control.count() == found.count()
    drawn = name.endswith(("-shuffle", "-random"))
    assert (mask_of(text_of(name), 4).digest() != control.digest()) == drawn


def test_the_masks_are_those_of_the_methods() -> None:
    units = regions().units
    safety, utility = (regions().scores("ssah", rows) for rows in ("safety", "utility"))
    ratios = PRESETS["llama-2-7b-chat"]
    groups = attribute_groups(units, safety, utility, ratios)
    paper = freeze_mask(groups, top_complex=0.2 - ratios["ESU"])
    assert counts(mask_of("ssah:0.2")) == counts(paper)
    assert mask_of("ssah:0.2").digest() == paper.digest()
    few = attribute_groups(units, safety, utility, {**ratios, "ESU": 0.01})
    assert mask_of("ssah:0.01").digest() == units.mask(few.selected("ESU")).digest()
    values = torch.cat(list(Scaling(units, utility, "zscore")(utility).values()))
    most = torch.zeros(len(values), dtype=torch.bool)
    most[values.topk(paper.manifest["counts"]["units"]["selected"]).indices] = True
    assert mask_of("ssah-utility:0.2").digest() == units.mask(units.split(most)).digest()
    budget = alignment_budget(units, utility, safety, share=0.2)
    assert mask_of("ssah-budget:0.2").digest() == budget.digest()
    for scorer in ("snip", "wanda"):
        s, u = (regions().scores(scorer, rows) for rows in ("safety", "utility"))
        assert mask_of(f"{scorer}:0.1").digest() == select(s, 0.1, scope="row").digest()
        assert mask_of(f"{scorer}-utility:0.1").digest() == select(u, 0.1, scope="row").digest()
        difference = set_difference(s, u, p=0.1, q=0.1)
        assert mask_of(f"{scorer}-difference:0.1").digest() == difference.digest()


def test_sppft_freezes_whole_layers_but_for_norms() -> None:
    mask = mask_of("sppft:1-2")
    assert {name.split(".")[2] for name in mask} == {"1", "2"}
    assert not any("norm" in name for name in mask)
    assert mask.density() == 1
    given = context()
    plan = parse_arm("sppft:1-2|spa:0.1").plan(given)
    asleep = {name for name, p in given.model.named_parameters() if not p.requires_grad}
    assert asleep == set(mask)  # no gradients are computed for them
    live, total = plan.optimizer.live_count()  # type: ignore[attr-defined]
    assert plan.mask is not None and total - live == plan.mask.count()
    with pytest.raises(ValueError, match="all layers"):
        mask_of(f"sppft-random:0-{LAYERS - 1}")
    with pytest.raises(ValueError, match="4"):
        mask_of("sppft:2-4")


def test_compositions_join_masks() -> None:
    spa, snip = mask_of("spa:0.2"), mask_of("snip:0.2")
    assert mask_of("spa:0.2|snip:0.2").digest() == (spa | snip).digest()
    assert mask_of("spa:0.2&snip:0.2").digest() == (spa & snip).digest()
    three = (spa | snip) | mask_of("sppft:0-0")
    assert mask_of("spa:0.2|snip:0.2|sppft:0-0").digest() == three.digest()
    assert run_file(Path("x"), parse_arm("spa:0.2&snip:0.2+l2:1"), 0).name == (
        "spa-0.2-and-snip-0.2-with-l2-1-seed0.json"
    )
    assert str(parse_arm("spa:0.20|sppft:1-2+l2:1")) == "spa:0.2|sppft:1-2+l2:1"


@pytest.mark.parametrize("drawing", ["l2:0.5", "anchor:0.5", "asft:0.5", "asft-all:0.5"])
def test_what_is_not_frozen_is_drawn(drawing: str) -> None:
    """Frozen weights are bit-exact, and the others move as the drawing arm alone moves them."""
    aligned = regions().model
    made = Directions(aligned, make_llama(num_hidden_layers=LAYERS, seed=1), 3, lambda: None)  # type: ignore[arg-type, return-value]
    joined, alone = context(directions=made), context(directions=made)
    plan = parse_arm(f"sppft:1-2+{drawing}").plan(joined)
    other = parse_arm(drawing).plan(alone)
    for model, optimizer in ((joined.model, plan.optimizer), (alone.model, other.optimizer)):
        for p in model.parameters():
            p.grad = torch.ones_like(p) * 1e-3
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        optimizer.step()
    frozen = mask_of("sppft:1-2")
    before = dict(aligned.named_parameters())
    for (name, p), q in zip(joined.model.named_parameters(), alone.model.parameters(), strict=True):
        if name in frozen:
            assert torch.equal(p, before[name] + 0.01), name
        else:
            assert torch.equal(p, q) and not torch.equal(p, before[name] + 0.01), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spa:0.1|snip:0.1&wanda:0.1", "both | and &"),
        ("spa:0.1|l2:1", "l2 freezes nothing; those that do: spa"),
        ("spa:0.1|set:0.1", "set freezes nothing"),
        ("spa:0.1+snip:0.1", "snip draws no weights to a place; those that do: l2"),
        ("spa:0.1+safe-lora:0.5", "safe-lora draws no weights"),
        ("spa:0.1|", "arm '' does not exist"),
        ("sppft:3", "needs the first and last layer, for example sppft:6-14"),
        ("sppft:2-", "needs the first and last layer"),
        ("sppft", "needs the first and last layer"),
    ],
)
def test_wrong_compositions_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parse_arm(text)


def test_masks_without_a_common_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="sppft:0-0&sppft:1-1 freezes nothing"):
        mask_of("sppft:0-0&sppft:1-1")


def test_a_comparison_of_regions(tiny_folder: Path, tmp_path: Path) -> None:
    arms = ["adamw", "ssah:0.2", "ssah-shuffle:0.2", "wanda-difference:0.3", "sppft:0-0"]
    arms += ["spa:0.2|ssah:0.2+l2:0.1"]
    sets = make_sets(utility=numbered("kindly", 5, "Sure, here it is."))
    results = compare(tiny_folder, sets, arms, [0], tmp_path, SMALL, progress=False)
    assert [run["settings"]["arm"] for run in results["runs"]] == arms
    trained = {r["settings"]["arm"]: r["trained"]["live"] for r in results["runs"]}
    assert trained["adamw"] > trained["ssah:0.2"] > trained["spa:0.2|ssah:0.2+l2:0.1"] > 0
    assert results["sets"]["utility"]["rows"] == 5
    with pytest.raises(ValueError, match=r"arm ssah:0.2 sets safety against utility"):
        compare(tiny_folder, make_sets(), arms, [0], tmp_path / "other", SMALL, progress=False)
    with pytest.raises(ValueError, match=r"'utility' \(identification\) and in 'test' \(eval"):
        make_sets(utility=numbered("test", 2, "x"))


def test_arms_are_parsed_once_each() -> None:
    with pytest.raises(ValueError, match="given 2 times"):
        parse_arms(["adamw", "spa:0.1|ssah:0.2", "spa:0.10|ssah:0.2"])
