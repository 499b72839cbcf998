"""SSAH's groups, masks and transitions against a naive reading of their rules."""

from __future__ import annotations

import pytest
import torch
from unit_cases import batch, make, safety_and_utility

from safeopt.methods.ssah import SSAH
from safeopt.methods.ssah_groups import ATTRIBUTES, PRESETS, attribute_groups, transitions
from safeopt.methods.ssah_masks import alignment_budget, freeze_mask
from safeopt.methods.unit_scaling import Scaling
from safeopt.optim import SafeAdamW
from safeopt.scores import Scores, score
from safeopt.units import UnitMap

RATIOS = {"SCU": 0.1, "UCU": 0.2, "RU": 0.25}


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def units(model):
    return UnitMap.of(model)


@pytest.fixture(scope="module")
def scored(model, units):
    """Safety and utility scores of a real model, on different rows."""
    return safety_and_utility(model, units)


def normalised(units, scores, how):
    """By (group, unit), in loops."""
    found = {}
    for name, group in units.items():
        pool = [v for n, g in units.items() if g.place == group.place for v in scores[n].tolist()]
        mean = sum(pool) / len(pool)
        deviation = (sum((v - mean) ** 2 for v in pool) / len(pool)) ** 0.5
        for j, value in enumerate(scores[name].tolist()):
            below = sum(v < value for v in pool) + 0.5 * sum(v == value for v in pool)
            ways = {"raw": value, "zscore": (value - mean) / deviation, "rank": below / len(pool)}
            found[name, j] = ways[how]
    return found


def naive(units, safety, utility, ratios, how, scope):
    """Labels by (group, unit): largest difference, smallest difference, smallest sum, the rest."""
    s, u = normalised(units, safety, how), normalised(units, utility, how)
    labels = {}
    places = {units[name].place for name, _ in s}
    for place in places if scope == "layer" else [None]:
        keys = [key for key in s if place in (None, units[key[0]].place)]
        esu, euu, ru = (round(ratios[name] * len(keys)) for name in ("ESU", "EUU", "RU"))
        for key in sorted(keys, key=lambda key: u[key] - s[key])[:esu]:  # sorted() is stable
            labels[key] = "ESU"
        rest = [key for key in keys if key not in labels]
        for key in sorted(rest, key=lambda key: s[key] - u[key])[:euu]:
            labels[key] = "EUU"
        rest = sorted((k for k in keys if k not in labels), key=lambda key: s[key] + u[key])
        for i, key in enumerate(rest):
            labels[key] = "RU" if i < ru else "CU"
    return labels


@pytest.mark.parametrize("how", ["zscore", "raw", "rank"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_groups_are_their_definition(units, scored, how, scope):
    """Disjoint, exact in number, over the model or in each layer and kind."""
    found = attribute_groups(units, *scored, RATIOS, normalise=how, scope=scope)
    plain = {"ESU": 0.1, "EUU": 0.2, "RU": 0.25}
    wanted = naive(units, *scored, plain, how, scope)
    for (name, j), label in wanted.items():
        assert ATTRIBUTES[found.labels[name][j]] == label, (name, j)
    together = sum(torch.cat(list(found.selected(a).values())).int() for a in ATTRIBUTES)
    assert torch.equal(together, torch.ones_like(together))
    assert all(torch.equal(found.selected("SCU")[n], found.selected("ESU")[n]) for n in units)
    if scope == "model":
        assert found.shares()["ESU"]["units"]["selected"] == round(0.1 * units.units)


def test_collisions_are_counted(units, scored):
    found = attribute_groups(units, *scored, RATIOS)
    s, u = (normalised(units, scores, "zscore") for scores in scored)
    least = sorted(s, key=lambda key: s[key] + u[key])[: round(0.25 * units.units)]
    wanted = sum(ATTRIBUTES[found.labels[name][j]] in ("ESU", "EUU") for name, j in least)
    assert found.manifest["collisions"] == wanted > 0


def test_units_that_only_one_set_excites_are_found(units):
    """Planted: a channel that varies on safety rows alone is ESU, and the other way round EUU."""
    names = list(units)
    safety = {name: torch.ones(group.size) for name, group in units.items()}
    utility = {name: torch.ones(group.size) for name, group in units.items()}
    safety[names[1]][3] = utility[names[2]][5] = 9.0
    safety[names[0]][7] = utility[names[0]][7] = 0.0
    one = 1 / units.units
    ratios = {"ESU": one, "EUU": one, "RU": one}
    found = attribute_groups(units, Scores(safety), Scores(utility), ratios)
    for attribute, place in (("ESU", (1, 3)), ("EUU", (2, 5)), ("RU", (0, 7))):
        chosen = found.selected(attribute)
        hits = [(i, j) for i, n in enumerate(names) for j in chosen[n].nonzero()[:, 0].tolist()]
        assert hits == [place]


def test_presets_are_the_published_ratios(units, scored):
    assert PRESETS["llama-2-7b-chat"] == {"ESU": 0.013, "EUU": 0.133, "RU": 0.148}
    found = attribute_groups(units, *scored, "llama-2-7b-chat")
    shares = {name: found.shares()[name]["units"]["selected"] for name in ATTRIBUTES}
    n = units.units
    assert shares["ESU"] == round(0.013 * n) and shares["EUU"] == round(0.133 * n)
    assert shares["RU"] == round(0.148 * n) and sum(shares.values()) == n


@pytest.mark.parametrize("how", ["zscore", "rank"])
def test_the_experts_of_a_layer_are_put_on_one_scale(how):
    """Not each on its own: an expert that hardly works stays below the others."""
    units = UnitMap.of(make("mixtral"))
    generator = torch.Generator().manual_seed(4)
    scores = {
        name: torch.rand(group.size, generator=generator) * (1 + place)
        for place, (name, group) in enumerate(units.items())
    }
    found = Scaling(units, scores, how)(scores)
    for (name, j), wanted in normalised(units, scores, how).items():
        assert float(found[name][j]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_a_flat_layer_is_only_centred(units):
    flat = {name: torch.full((group.size,), 2.0) for name, group in units.items()}
    assert all(not values.any() for values in Scaling(units, flat, "zscore")(flat).values())
    assert all((v == 0.5).all() for v in Scaling(units, flat, "rank")(flat).values())


@pytest.mark.parametrize("top", [0.0, 0.06, 0.3, "all"])
def test_the_freeze_mask_is_esu_and_the_top_of_cu(model, units, scored, top):
    """As a share of all units, by safety score within CU."""
    found = attribute_groups(units, *scored, RATIOS)
    mask = freeze_mask(found, top_complex=top)
    s = normalised(units, scored[0], "zscore")
    ranked = sorted(s, key=s.get, reverse=True)
    ranked = [key for key in ranked if ATTRIBUTES[found.labels[key[0]][key[1]]] == "CU"]
    extra = set(ranked[: len(ranked) if top == "all" else round(top * units.units)])
    wanted = {
        name: torch.tensor([
            ATTRIBUTES[found.labels[name][j]] == "ESU" or (name, j) in extra
            for j in range(group.size)
        ])
        for name, group in units.items()
    }  # fmt: skip
    assert mask == units.mask(wanted)
    assert mask.manifest["use"] == "freeze" and mask.manifest["counts"] == units.counts(wanted)
    mask.check(model)


def test_frozen_units_stay_bit_for_bit(units, scored, tmp_path):
    """Through save, load and SafeAdamW with decay; the others move."""
    model = make("llama")
    freeze_mask(attribute_groups(units, *scored, RATIOS)).save(tmp_path / "m.safetensors")
    from safeopt import SafetyMask

    mask = SafetyMask.load(tmp_path / "m.safetensors")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, freeze=mask)
    for seed in range(3):
        part = batch(seed=seed)
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        if name in mask:
            assert torch.equal(weight == before[name], mask.to_bool(name))


def test_the_alignment_budget_is_what_fits(units, scored):
    """By rising I_U: one more unit would exceed the share; shared rows move only together."""
    for by, key in (("parameters", "share_of_model"), ("units", "share")):
        mask = alignment_budget(units, scored[1], share=0.2, by=by)
        u = normalised(units, scored[1], "zscore")
        ranked, chosen = (
            sorted(u, key=u.get),
            {n: torch.zeros(g.size).bool() for n, g in units.items()},
        )
        count = mask.manifest["counts"]["units"]["selected"]
        for name, j in ranked[:count]:
            chosen[name][j] = True
        assert mask == units.mask(chosen, shared="all")
        assert mask.manifest["counts"][by][key] <= 0.2
        name, j = ranked[count]
        chosen[name][j] = True
        assert units.counts(chosen, shared="all")[by][key] > 0.2
        assert mask.manifest["use"] == "train"
    both = alignment_budget(units, scored[1], scored[0])
    assert both != alignment_budget(units, scored[1]) and both.manifest["safety"]


@pytest.mark.parametrize("how", ["zscore", "raw", "rank"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_nothing_moves_between_equal_checkpoints(units, scored, how, scope):
    """Not even where ranks tie at a cut-off."""
    before = attribute_groups(units, *scored, RATIOS, normalise=how, scope=scope)
    same = transitions(before, before.relabel(*scored))
    assert all(c == 0 for i, row in enumerate(same["counts"]) for j, c in enumerate(row) if i != j)
    assert sum(map(sum, same["counts"])) == units.units and same["counts"][0][0] > 0


def test_transitions_hold_the_cutoffs_of_the_first(units, scored):
    """As a loop over the units says."""
    before = attribute_groups(units, *scored, RATIOS)
    grown = [Scores({n: t * 1.7 + 0.1 for n, t in s.items()}, s.provenance) for s in scored]
    after = before.relabel(*grown)
    found = transitions(before, after)
    wanted = [[0] * 4 for _ in ATTRIBUTES]
    cut = before.cutoffs["model"]
    fit = {}
    for which, scores in zip("su", scored, strict=True):
        for name, group in units.items():
            pool = torch.cat(
                [scores[n].double() for n, g in units.items() if g.place == group.place]
            )
            fit[which, name] = (pool.mean(), pool.std(correction=0))
    for name, group in units.items():
        for j in range(group.size):
            s, u = (
                float((new[name][j].double() - fit[which, name][0]) / fit[which, name][1])
                for which, new in zip("su", grown, strict=True)
            )
            label = "RU" if s + u <= cut["RU"] else "CU"
            label = "EUU" if s - u <= cut["EUU"] else label
            label = "ESU" if s - u >= cut["ESU"] else label
            wanted[before.labels[name][j]][ATTRIBUTES.index(label)] += 1
    assert found["counts"] == wanted
    assert sum(map(sum, wanted)) == units.units
    assert sum(wanted[i][i] for i in range(4)) < units.units
    assert found["shares"][3][3] == wanted[3][3] / units.units


def test_scores_that_do_not_belong_together_are_named(model, units, scored):
    safety, utility = scored
    with pytest.raises(ValueError, match="come from the same prompts"):
        attribute_groups(units, safety, safety, RATIOS)
    with pytest.raises(ValueError, match="come from the same prompts"):
        alignment_budget(units, safety, safety)
    full = score(model, [batch(seed=2)], SSAH(units=units, tokens="all"), progress=False)
    with pytest.raises(ValueError, match="differ in 'arguments'"):
        attribute_groups(units, safety, full, RATIOS)
    with pytest.raises(ValueError, match="differ in 'arguments'"):
        alignment_budget(units, full, safety)
    other = Scores(dict(utility), {**utility.provenance, "model": {"weights": "0"}})
    with pytest.raises(ValueError, match="differ in 'model'"):
        attribute_groups(units, safety, other, RATIOS)
    with pytest.raises(ValueError, match="differ in 'model'"):
        alignment_budget(units, other, safety)
    heads = UnitMap.of(model, attention="head")
    with pytest.raises(ValueError, match="is not of the units"):
        attribute_groups(heads, safety, utility, RATIOS)
    less = Scores(dict(list(utility.items())[1:]))
    with pytest.raises(ValueError, match="is not of the units"):
        attribute_groups(units, safety, less, RATIOS)
    with pytest.raises(ValueError, match="is not of the units"):
        alignment_budget(units, less)
    grouped = attribute_groups(units, safety, utility, RATIOS)
    rows = score(model, [batch(seed=9)], SSAH(units=units), progress=False)
    with pytest.raises(ValueError, match=r"utility scores differ .* in 'prompts'"):
        grouped.relabel(safety, rows)
    with pytest.raises(ValueError, match=r"relabel\(safety, utility\)"):
        transitions(grouped, attribute_groups(units, safety, utility, {"ESU": 0.2}))


def test_bad_settings_are_named(units, scored):
    grouped = attribute_groups(units, *scored, RATIOS)
    for ratios, message in (
        ("llama", "presets are"),
        ({"CU": 0.5}, "it may name each of ESU, EUU, RU once"),
        ({"ESU": 0.1, "SCU": 0.1}, "once"),
        ({"ESU": 0.7, "RU": 0.4}, "sum to at most 1"),
        ({"ESU": -0.1, "RU": 0.4}, "0 or more"),
        ({"ESU": 1e-4}, "less than one of the 88 units"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute_groups(units, *scored, ratios)
    with pytest.raises(ValueError, match="normalise is 'log'"):
        attribute_groups(units, *scored, RATIOS, normalise="log")
    with pytest.raises(ValueError, match="scope is 'row'"):
        attribute_groups(units, *scored, RATIOS, scope="row")
    with pytest.raises(ValueError, match="attribute is 'XU'"):
        grouped.selected("XU")
    with pytest.raises(ValueError, match=r"top_complex is 0\.9, 79 units; there are 39"):
        freeze_mask(grouped, top_complex=0.9)
    with pytest.raises(ValueError, match="nothing to freeze"):
        freeze_mask(attribute_groups(units, *scored, {"RU": 0.1}), top_complex=0)
    for share, by, message in (
        (0.0, "units", "share must be above 0"), (0.2, "rows", "by 'parameters' or"),
        (1e-4, "parameters", "less than one unit"), (0.99, "parameters", "more than all"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            alignment_budget(units, scored[1], share=share, by=by)
