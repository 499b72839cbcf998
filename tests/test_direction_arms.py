"""The arms that read an alignment direction: what each holds, on all weights and on adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import SMALL, make_sets
from conftest import make_llama
from test_compare_arms import random_scores, step

from safeopt import AlignmentDirection, SafeAdamW, evaluate
from safeopt.compare import ARMS, Arm, Context, compare, parse_arms
from safeopt.compare.arms import require_possible
from safeopt.compare.directions import Directions
from safeopt.compare.lora import as_measured, with_adapters
from safeopt.scores import Scores

peft = pytest.importorskip("peft")

RANK = 3
LORA = replace(SMALL, lora_rank=2, lora_targets=("q_proj", "down_proj"), direction_rank=RANK)


def pair() -> tuple[Any, Any]:
    """An aligned and an unaligned model; V is large enough for C to count."""
    aligned, unaligned = make_llama(), make_llama()
    with torch.no_grad():
        for name, p in unaligned.named_parameters():
            if p.dim() == 2:
                seed = sum(map(ord, name))
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return aligned, unaligned


def never() -> AlignmentDirection:
    raise AssertionError("nothing asked for the harmful direction")


def directions(tune: Any = never) -> Directions:
    return Directions(*pair(), RANK, tune)


def context(model: Any, made: Directions, seed: int = 3, weight_decay: float = 0.0) -> Context:
    scores = random_scores(make_llama())
    return Context(
        model=model, scores=scores, lr=1e-2, weight_decay=weight_decay, seed=seed, directions=made
    )


def trained(
    arm: str, made: Directions, seed: int = 3, lora: bool = False, steps: int = 5
) -> tuple[Any, Any]:
    """(model after the steps, plan)."""
    model = with_adapters(copy.deepcopy(made.aligned), LORA if lora else SMALL, seed)
    plan = Arm.parse(arm).plan(context(model, made, seed))
    step(model, plan.optimizer, steps)
    return model, plan


def share(model: Any, made: Directions, direction: AlignmentDirection, part: str) -> float:
    return float(evaluate.drift(model, made.aligned, direction=direction)[part]["share"])


def test_the_l2_control_is_the_anchor_on_the_same_matrices() -> None:
    made = directions()
    ours, _ = trained("asft-l2:0.5", made)
    matrices = list(made.of("safelora"))
    theirs = copy.deepcopy(made.aligned)
    ones = {n: torch.ones_like(p) for n, p in theirs.named_parameters() if n in matrices}
    step(
        theirs,
        SafeAdamW(
            theirs.named_parameters(), 1e-2, weight_decay=0.0,
            anchor=Scores(ones), anchor_strength=0.5,
        ),
    )  # fmt: skip
    before = dict(made.aligned.named_parameters())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, before[name])


def test_asft_on_all_weights_is_l2_where_the_direction_is_nothing() -> None:
    """And where it is something, only the matrices of the direction differ from L2 on all."""
    made = directions()
    l2, _ = trained("l2:0.5", made)
    zero = Directions(made.aligned, made.unaligned, RANK, never)
    zero.of = lambda name: made.of(name).l2_like()
    none, _ = trained("asft-all:0.5", zero)
    for p, q in zip(none.parameters(), l2.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    first, second = copy.deepcopy(made.aligned), copy.deepcopy(made.aligned)
    for model, arm in ((first, "l2:0.5"), (second, "asft-all-subspace:0.5")):
        plan = Arm.parse(arm).plan(context(model, made))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        plan.optimizer.step()
    before = dict(made.aligned.named_parameters())
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert not torch.equal(p, before[name] + 0.01), name
        assert torch.equal(p, q) == (name not in made.of("subspace")), name


@pytest.mark.parametrize("lora", [False, True])
def test_a_pull_across_leaves_more_of_the_drift_along_and_its_contrary_less(lora: bool) -> None:
    made = directions()
    subspace = made.of("subspace")
    merged = {
        arm: as_measured(*trained(arm, made, lora=lora, steps=20))
        for arm in ("adamw", "asft-subspace:30", "asft-along:30", "asft-subspace-random:30")
    }
    along = {arm: share(model, made, subspace, "along") for arm, model in merged.items()}
    assert along["asft-along:30"] < 0.4 * along["adamw"]
    assert along["asft-subspace:30"] > 1.3 * along["adamw"]
    assert along["asft-subspace-random:30"] < 0.8 * along["asft-subspace:30"]


def test_random_controls_are_drawn_anew_for_each_seed_and_keep_the_spectrum() -> None:
    made = directions()
    for base in ("asft", "asft-subspace", "asft-all", "project", "safe-lora"):
        assert ARMS[f"{base}-random"].control and not ARMS[base].control
    value = ":30"
    first, again, other = (
        trained(f"asft-random{value}", made, seed)[0].state_dict() for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], trained(f"asft{value}", made, 1)[0].state_dict()[name])


def test_projected_updates_stay_on_their_subspace_and_random_ones_on_another() -> None:
    made = directions()
    subspace = made.of("subspace")
    assert share(trained("project", made)[0], made, subspace, "across") < 1e-3
    assert share(trained("adamw", made)[0], made, subspace, "across") > 0.5
    random = trained("project-random", made, 5)[0]
    assert share(random, made, subspace, "across") > 0.5
    assert share(random, made, subspace.random_like(5), "across") < 1e-3


@pytest.mark.parametrize("lora", [False, True])
def test_safe_lora_mends_a_copy_and_training_goes_on_as_without_it(lora: bool) -> None:
    made = directions()
    C = made.of("safelora")
    plain, _ = trained("adamw", made, lora=lora)
    model, plan = trained("safe-lora:0.999", made, lora=lora)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    mended = dict(as_measured(model, plan).named_parameters())
    start = dict(made.aligned.named_parameters())
    merged = plain.merge_and_unload() if lora else plain
    moved = 0
    for name, p in merged.named_parameters():
        if name in C:
            delta = p - start[name]
            moved += bool(delta.any())
            torch.testing.assert_close(
                mended[name], start[name] + C.apply(name, delta), rtol=1e-4, atol=1e-5
            )
        else:
            assert torch.equal(mended[name], p)
    assert moved == (4 if lora else len(C))


def test_the_alternative_holds_the_direction_of_a_harmful_fine_tune() -> None:
    aligned, unaligned = pair()
    asked = []

    def tune() -> AlignmentDirection:
        asked.append(1)
        moved = copy.deepcopy(aligned)
        optimizer = torch.optim.AdamW(moved.parameters(), 1e-2, weight_decay=0.0)
        step(moved, optimizer)
        return AlignmentDirection.between(aligned, moved, operator="subspace", rank=RANK)

    made = Directions(aligned, unaligned, RANK, tune)
    held, _ = trained("asft-alt:30", made)
    free, _ = trained("adamw", made)
    harmful = made.of("harmful")
    assert share(held, made, harmful, "along") < 0.6 * share(free, made, harmful, "along")
    assert len(asked) == 1


def test_every_seed_has_its_own_adapters_and_every_arm_of_a_seed_the_same() -> None:
    def start(seed: int) -> torch.Tensor:
        model = with_adapters(make_llama(), LORA, seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(0)
    first = start(1)
    torch.manual_seed(1)
    assert torch.equal(first, start(1))
    assert not torch.equal(first, start(2))


def test_an_arm_that_cannot_run_is_refused_before_anything_is_computed() -> None:
    def check(*arms: str, lora: bool = False, unaligned: bool = False) -> None:
        parsed = parse_arms(["adamw", *arms])
        require_possible(parsed, lora=lora, unaligned=unaligned, utility=False)

    with pytest.raises(ValueError, match=r"arm spa:0.1 is not defined where LoRA adapters.*asft"):
        check("spa:0.1", lora=True, unaligned=True)
    check("spa:0.1")
    with pytest.raises(ValueError, match="arm project is not defined where LoRA"):
        check("project", lora=True, unaligned=True)
    with pytest.raises(ValueError, match=r"arm asft:1 reads a direction; give the unaligned model"):
        check("asft:1")
    with pytest.raises(
        ValueError, match=r"arm ssah:0.1 sets safety against utility; give harmless"
    ):
        check("ssah:0.1", unaligned=True)


@pytest.mark.parametrize("wrong", [{"lora_rank": -1}, {"lora_rank": 2, "lora_alpha": 0.0}])
def test_settings_refuse_impossible_adapters(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora_rank is"):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("settings", [replace(SMALL, direction_rank=RANK), LORA], ids=str)
def test_a_comparison_with_directions(
    settings: Any, tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    unaligned = tmp_path / "unaligned"
    other = make_llama(vocab_size=len(tiny_tokenizer), seed=1)
    other.save_pretrained(unaligned)
    tiny_tokenizer.save_pretrained(unaligned)
    arms = ["adamw", "asft:1", "asft-l2:1", "asft-alt:1", "safe-lora:0.9"]
    arms += [] if settings.lora_rank else ["project", "spa:0.1"]

    def run() -> dict[str, Any]:
        return compare(
            tiny_folder, make_sets(), arms, [0], tmp_path / "out", settings,
            unaligned=unaligned, progress=False,
        )  # fmt: skip

    results = run()
    assert all(row["norm"] > 0 for row in results["direction"]["matrices"].values())
    for found in results["runs"]:
        drift = found["curve"][-1]["drift"]
        assert drift["all"]["moved"] > 0
        assert drift["across"]["share"] > 0
        assert drift["along"]["share"] > 0
        live, total = found["trained"]["live"], found["trained"]["total"]
        assert live < 0.1 * total if settings.lora_rank else live > 0.5 * total
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(times) == len(arms)
    assert run()["runs"] == results["runs"]
    assert times == {path: path.stat().st_mtime_ns for path in times}
    make_llama(vocab_size=len(tiny_tokenizer), seed=2).save_pretrained(unaligned)
    run()
    assert not any(t == path.stat().st_mtime_ns for path, t in times.items())
