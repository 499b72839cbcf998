"""AlignmentDirection in use: expert stacks, moving, files, random controls, `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_direction import UP, Q, delta, pair, same
from torch import nn

from safeopt import AlignmentDirection, SafetyMask


class Experts(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(0.1 * delta(torch.Size((3, 6, 4)), seed))


def test_expert_stacks_are_batched() -> None:
    """Each expert is what it would be as a matrix of its own, and has its own row in the report."""
    stacks = Experts(1), Experts(2)
    for options in ({}, {"rank": 2}, {"operator": "subspace", "rank": 2}, {"operator": "vector"}):
        direction = AlignmentDirection.between(*stacks, **options)
        change = delta(torch.Size((3, 6, 4)))
        assert list(direction.report()) == ["experts[0]", "experts[1]", "experts[2]"]
        total = 0.0
        for place in range(3):
            singles = [nn.Linear(4, 6, bias=False) for _ in range(2)]
            for single, stack in zip(singles, stacks, strict=True):
                single.weight = nn.Parameter(stack.experts[place].detach())
            one = AlignmentDirection.between(*singles, **options)
            along = one.apply("weight", change[place])
            torch.testing.assert_close(direction.apply("experts", change)[place], along)
            total += float(one.penalty("weight", change[place]))
            row = direction.report()[f"experts[{place}]"]
            assert row == pytest.approx(one.report()["weight"], rel=1e-5)
        assert float(direction.penalty("experts", change)) == pytest.approx(total, rel=1e-5)


def test_deltas_that_do_not_fit() -> None:
    direction = AlignmentDirection.between(*pair())
    with pytest.raises(ValueError, match=r"did you mean.*q_proj"):
        direction.apply("model.layers.0.self_attn.q.weight", torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"shape \(16, 32\) and the matrix has \(32, 32\)"):
        direction.penalty(Q, torch.zeros(16, 32))
    with pytest.raises(ValueError, match=r"on meta and the direction is on cpu.*direction\.to\("):
        direction.gradient(Q, torch.zeros(32, 32, device="meta"))
    for B, A in (((2, 32), (32, 2)), ((32, 3), (2, 32)), ((16, 2), (2, 32)), ((32, 2), (2, 16))):
        with pytest.raises(ValueError, match=r"do not multiply to"):
            direction.penalty_lora(Q, torch.zeros(B), torch.zeros(A))
    with pytest.raises(ValueError, match="at least one matrix"):
        AlignmentDirection({})


def test_moving_to_a_device() -> None:
    for options in ({}, {"rank": 2}):
        direction = AlignmentDirection.between(*pair(), **options)
        moved = direction.to("meta")
        change = torch.zeros(56, 32, device="meta")
        assert (
            moved.apply(UP, change).device.type == "meta" == moved.penalty(UP, change).device.type
        )
        assert moved.manifest == direction.manifest and direction[UP].basis.device.type == "cpu"


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 3, "seed": 4}, {"operator": "subspace", "rank": 3}, {"operator": "vector"}],
)
def test_save_and_load(tmp_path: Path, options: dict[str, Any]) -> None:
    direction = AlignmentDirection.between(*pair(), **options)
    direction.save(tmp_path / "d.safetensors")
    loaded = AlignmentDirection.load(tmp_path / "d.safetensors")
    assert same(direction, loaded)
    assert loaded.manifest.items() >= direction.manifest.items()
    assert loaded.manifest["operator"] == options.get("operator", "safelora")
    assert (loaded.manifest["rank"], loaded.manifest["seed"]) == (
        options.get("rank"), options.get("seed", 0)
    )  # fmt: skip
    loaded.check(make_llama(seed=1))
    drawn = loaded.random_like(7)
    assert drawn.manifest["random"] == 7 and not same(drawn, loaded)
    assert same(drawn, direction.random_like(7)) and drawn.report() == direction.report()
    drawn.save(tmp_path / "d.safetensors")
    assert same(AlignmentDirection.load(tmp_path / "d.safetensors"), drawn)


def test_random_directions_of_equal_shapes_differ() -> None:
    drawn = AlignmentDirection.between(*pair(), rank=3).random_like(0)
    assert not torch.equal(drawn[Q].basis, drawn[Q.replace("q_proj", "o_proj")].basis)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    SafetyMask.from_bool({Q: torch.ones(32, 32, dtype=torch.bool)}).save(file)
    with pytest.raises(ValueError, match="holds 'mask', and 'direction' was asked for"):
        AlignmentDirection.load(file)
    AlignmentDirection.between(*pair(), rank=2).save(file)
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(ValueError, match="was changed after it was written"):
        AlignmentDirection.load(file)


def test_check_knows_the_model_it_was_made_with() -> None:
    peft = pytest.importorskip("peft")
    aligned, unaligned = pair()
    direction = AlignmentDirection.between(aligned, unaligned)
    direction.check(aligned)
    direction.check(dict(aligned.named_parameters()))
    direction.check(peft.get_peft_model(make_llama(seed=1), peft.LoraConfig(r=2)))
    with pytest.raises(ValueError, match=r"is that of the unaligned model.* or exchange"):
        direction.check(unaligned)
    with pytest.raises(ValueError, match="not that of the aligned model"):
        direction.check(make_llama(seed=2))
    with torch.no_grad():
        aligned.get_parameter(UP)[0, 0] += 1e-3
    with pytest.raises(ValueError, match=UP):
        direction.check(aligned)
    with pytest.raises(ValueError, match="not made by between"):
        AlignmentDirection(dict(direction)).check(aligned)
    with pytest.raises(ValueError, match="match none of"):
        direction.check(make_llama(num_hidden_layers=1, seed=1))
