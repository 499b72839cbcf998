"""Units: what computes a channel and what reads it, on real models of every known layout."""

from __future__ import annotations

import copy

import pytest
import torch
from unit_cases import KINDS, batch, make

from safeopt.units import Lines, UnitGroup, UnitMap

FOUND = [kind for kind in KINDS if kind != "neox"]


def closed(group: UnitGroup, first: int) -> torch.Tensor:
    """A unit and all that share a written line with it."""
    index = group.written[0].index
    return torch.isin(index, index[first]).any(1)


def logits_without(model, units, selected, which):
    """Logits with the selected lines of some parameters set to 0."""
    model = copy.deepcopy(model)
    mask = units.mask(selected, shared="all")
    with torch.no_grad():
        for name in which:
            model.get_parameter(name)[mask.to_bool(name)] = 0
        return model(input_ids=batch()["input_ids"]).logits


def check_meaning(model, units):
    """Cutting what computes a unit and cutting what reads it are the same, and do something."""
    whole = logits_without(model, units, {}, ())
    for name, group in units.items():
        for first in (1, group.size - 1):
            selected = {name: closed(group, first)}
            written = [lines.name for lines in group.written]
            dry = logits_without(model, units, selected, written)
            cut = logits_without(model, units, selected, [group.read.name])
            torch.testing.assert_close(dry, cut, rtol=1e-9, atol=1e-10)
            assert not torch.allclose(whole, cut, rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("attention", ["channel", "head"])
def test_a_unit_is_what_computes_it_and_what_reads_it(kind, attention):
    """For each unit: the lines before B cut it off just as the line of B does."""
    model = make(kind)
    units = UnitMap.of(model, attention=attention)
    check_meaning(model, units)
    kinds = {group.place for group in units.values()}
    assert {layer for layer, _ in kinds} == {0, 1} and (0, "attention") in kinds


def test_neox_is_refused_by_name_and_can_be_described_by_hand():
    """Its fused rows lie head by head; the message says how to go on, and that works."""
    model = make("neox")
    with pytest.raises(ValueError, match=r"gpt_neox\.layers\.0\.attention.*extra=\[.*ignore="):
        UnitMap.of(model)
    only = UnitMap.of(model, ignore=["layers.*.attention"])
    assert [group.kind for group in only.values()] == ["mlp", "mlp"]
    j = torch.arange(24)
    hand = []
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        v = j // 6 * 18 + 12 + j % 6
        written = [
            Lines(f"{prefix}.query_key_value.weight", "row", v),
            Lines(f"{prefix}.query_key_value.bias", "entry", v),
        ]
        read = Lines(f"{prefix}.dense.weight", "column", j)
        hand.append(UnitGroup(prefix, "attention", written, read))
    units = UnitMap.of(model, extra=hand)
    assert len(units) == 4
    check_meaning(model, units)


def test_grouped_query_rows_follow_any_or_all():
    """Channel h d + i reads kv head h // 2, dim i: 4 heads, 2 kv heads, d = 6."""
    units = UnitMap.of(make("llama"))
    name = "model.layers.1.self_attn"
    one, both = torch.zeros(24, dtype=torch.bool), torch.zeros(24, dtype=torch.bool)
    one[3 * 6 + 4] = both[3 * 6 + 4] = both[2 * 6 + 4] = True
    for selected, shared, rows in (
        (one, "any", [10]), (one, "all", []), (both, "any", [10]), (both, "all", [10])
    ):  # fmt: skip
        mask = units.mask({name: selected}, shared=shared)
        found = mask.to_bool(f"{name}.v_proj.weight").all(1).nonzero()[:, 0]
        assert found.tolist() == rows
        assert mask[f"{name}.v_proj.weight"].count_units() == len(rows)
        assert torch.equal(mask.to_bool(f"{name}.o_proj.weight").all(0), selected)
        assert mask.count() == 24 * (len(rows) + int(selected.sum()))
    assert mask[f"{name}.v_proj.weight"].granularity == "row"
    assert mask[f"{name}.o_proj.weight"].granularity == "column"


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("shared", ["any", "all"])
def test_counts_are_those_of_the_mask(kind, shared):
    """Parameters that several units share count once; shares are of units, of theirs, of all."""
    model = make(kind)
    units = UnitMap.of(model, attention="head")
    generator = torch.Generator().manual_seed(1)
    selected = {
        name: torch.rand(group.size, generator=generator) < 0.4 for name, group in units.items()
    }
    found, mask = units.counts(selected, shared=shared), units.mask(selected, shared=shared)
    every = {name: torch.ones(group.size, dtype=torch.bool) for name, group in units.items()}
    owned = units.mask(every).count()
    whole = sum(weight.numel() for weight in model.parameters())
    picked = sum(int(chosen.sum()) for chosen in selected.values())
    assert found["units"] == {
        "selected": picked, "total": units.units, "share": picked / units.units
    }  # fmt: skip
    assert found["parameters"] == {
        "selected": mask.count(), "total": owned,
        "share": mask.count() / owned, "share_of_model": mask.count() / whole,
    }  # fmt: skip
    assert 0 < mask.count() < owned < whole
    mask.check(model)


def test_a_unit_has_as_many_weights_as_published():
    """Multi-head: 2 d a channel, 4 d with q and k; grouped by two: 1.5 d; an MLP channel 3 d."""

    def size(kind, **options):
        units = UnitMap.of(make(kind), **options)
        every = {n: torch.ones(g.size, dtype=torch.bool) for n, g in units.items() if "attn" in n}
        return units.counts(every)["parameters"]["selected"] / (2 * 24 * 24)

    assert size("llama") == 1.5 and size("llama", queries=True) == 3
    assert (
        size("llama", attention="head") == 3
        and size("llama", attention="head", queries=False) == 1.5
    )
    units = UnitMap.of(make("llama"), attention="none")
    every = {name: torch.ones(group.size, dtype=torch.bool) for name, group in units.items()}
    assert units.units == 40 and units.counts(every)["parameters"]["selected"] == 3 * 24 * 40


def test_a_head_has_its_own_q_rows_and_the_k_and_v_rows_of_its_group():
    """Of Phi-3's fused q, k, v (24, 12, 12 rows; d = 6), head 3 reads kv head 1."""
    units = UnitMap.of(make("phi3"), attention="head")
    name = "model.layers.0.self_attn"
    mask = units.mask({name: torch.arange(4) == 3})
    rows = mask.to_bool(f"{name}.qkv_proj.weight").all(1).nonzero()[:, 0].tolist()
    assert rows == [*range(18, 24), *range(30, 36), *range(42, 48)]
    units = UnitMap.of(make("llama"), attention="head")
    mask = units.mask({name: torch.arange(4) == 3})
    for part, start in (("q", 18), ("k", 6), ("v", 6)):
        rows = mask.to_bool(f"{name}.{part}_proj.weight").all(1).nonzero()[:, 0].tolist()
        assert rows == list(range(start, start + 6))


@pytest.mark.parametrize(
    ("kind", "place", "name", "wanted"),
    [
        ("llama", "mlp", "gate_proj.weight", [5]),
        ("llama", "mlp", "up_proj.weight", [5]),
        ("llama", "mlp", "down_proj.weight", [5]),
        ("phi3", "mlp", "gate_up_proj.weight", [5, 25]),
        ("mixtral", "mlp.experts.1", "gate_up_proj", [45, 65]),
        ("mixtral", "mlp.experts.1", "down_proj", [25]),
        ("gpt-oss", "mlp.experts.2", "gate_up_proj", [90, 91]),
        ("gpt-oss", "mlp.experts.2", "gate_up_proj_bias", [90, 91]),
        ("gpt-oss", "mlp.experts.2", "down_proj", [45]),
    ],
)
def test_a_gated_channel_has_both_its_lines(kind, place, name, wanted):
    """Either one alone would cut it off, so what a cut does cannot tell: the lines are named."""
    units = UnitMap.of(make(kind))
    group = units[f"model.layers.1.{place}"]
    mask = units.mask({group.name: torch.arange(group.size) == 5})
    owner = group.name.removesuffix(place) + place.removesuffix(place[-2:] if "." in place else "")
    chosen = mask.to_bool(f"{owner}.{name}")
    if chosen.dim() == 2 and not name.endswith("bias"):
        chosen = chosen.all(1) if name != "down_proj.weight" else chosen.all(0)
    elif chosen.dim() == 3:
        chosen = chosen.all(2) if chosen.all(2).any() else chosen.all(1)
    assert chosen.reshape(-1).nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize("kind", FOUND)
def test_all_heads_and_channels_together_are_whole_matrices(kind):
    """Nothing of the projections is left over: every row, column and bias has its unit."""
    units = UnitMap.of(make(kind), attention="head")
    every = {name: torch.ones(group.size, dtype=torch.bool) for name, group in units.items()}
    mask = units.mask(every, shared="all")
    assert mask.density() == 1
    assert {lines.name for group in units.values() for lines in group.lines} == set(mask)


def test_biases_freeze_with_their_rows_and_the_readers_bias_does_not():
    units = UnitMap.of(make("gpt2"))
    name = "transformer.h.0.mlp"
    chosen = torch.arange(20) == 7
    mask = units.mask({name: chosen})
    assert mask.to_bool(f"{name}.c_fc.bias").nonzero().tolist() == [[7]]
    assert torch.equal(mask.to_bool(f"{name}.c_fc.weight").all(0), chosen)
    assert torch.equal(mask.to_bool(f"{name}.c_proj.weight").all(1), chosen)
    assert f"{name}.c_proj.bias" not in mask
    assert mask["transformer.h.1.mlp.c_fc.weight"].count() == 0


def test_bad_groups_and_selections_are_named():
    model = make("llama")
    units = UnitMap.of(model)
    group = units["model.layers.0.mlp"]
    down = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match="attention is 'heads'"):
        UnitMap.of(model, attention="heads")
    with pytest.raises(ValueError, match="shared is 'some'"):
        units.mask({}, shared="some")
    with pytest.raises(ValueError, match=r"'layers\.9' is not in this UnitMap"):
        units.mask({"layers.9": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"float32 of shape \(20,\); it must be bool"):
        units.counts({group.name: torch.ones(20)})
    with pytest.raises(ValueError, match="did you mean"):
        UnitMap(
            [
                UnitGroup(
                    "a",
                    "mlp",
                    [],
                    Lines("layers.0.mlp.down_proj.weight", "column", torch.arange(3)),
                )
            ],
            model,
        )
    with pytest.raises(ValueError, match=r"lists columns 0 to 20 of .*which has 20"):
        UnitMap([UnitGroup("a", "mlp", [], Lines(down, "column", torch.arange(21)))], model)
    with pytest.raises(ValueError, match=r"column 4 of .* is read by two units"):
        UnitMap([UnitGroup("a", "mlp", [], Lines(down, "column", torch.tensor([4, 4])))], model)
    with pytest.raises(ValueError, match="by rows and by columns"):
        rows = Lines(down, "row", torch.arange(20))
        UnitMap(
            [group, UnitGroup("b", "mlp", [rows], Lines(down, "column", torch.arange(20)))], model
        )
    with pytest.raises(ValueError, match="numbers of units"):
        UnitGroup(
            "a",
            "mlp",
            [Lines(down, "row", torch.arange(3))],
            Lines(down, "column", torch.arange(4)),
        )
    with pytest.raises(ValueError, match="axis of 'w' is 'rows'"):
        Lines("w", "rows", torch.arange(3))
    with pytest.raises(ValueError, match="no units"):
        UnitMap.of(torch.nn.Linear(3, 4))
