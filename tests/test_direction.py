"""AlignmentDirection.between: from two models to operators by name; warnings, memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeopt import AlignmentDirection, organism
from safeopt.weights import Weights

Q = "model.layers.0.self_attn.q_proj.weight"  # (32, 32)
K = "model.layers.0.self_attn.k_proj.weight"  # (16, 32)
UP = "model.layers.1.mlp.up_proj.weight"  # (56, 32)


def pair() -> tuple[Any, Any]:
    return make_llama(seed=1), make_llama(seed=0)


def delta(shape: torch.Size, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(left: AlignmentDirection, right: AlignmentDirection) -> bool:
    tensors = [
        {n: [t for t in (c.basis, c.gains) if t is not None] for n, c in one.items()}
        for one in (left, right)
    ]
    return list(left) == list(right) and all(
        (c.form, c.shape, c.complemented) == (right[n].form, right[n].shape, right[n].complemented)
        and c.stats == right[n].stats and all(map(torch.equal, tensors[0][n], tensors[1][n]))
        for n, c in left.items()
    )  # fmt: skip


def test_the_authors_formula_on_a_model() -> None:
    """Every matrix of a Llama, in float64 and d x d, in the words of arXiv 2506.08473's code."""
    aligned, unaligned = pair()
    direction = AlignmentDirection.between(aligned, unaligned)
    assert len(direction) == 14 and Q in direction and f"base_model.model.{Q}" in direction
    assert "lm_head.weight" not in direction and "model.embed_tokens.weight" not in direction
    for name in direction:
        V = (aligned.get_parameter(name) - unaligned.get_parameter(name)).detach().double()
        C = V @ V.T / V.norm()
        change = delta(V.shape)
        along = C @ change.double()
        torch.testing.assert_close(
            direction.apply(name, change).double(), along, rtol=1e-5, atol=1e-5
        )
        across = (torch.eye(len(C)) - C) @ change.double()
        value = direction.penalty(name, change).item()
        assert value == pytest.approx(across.square().sum().item(), rel=1e-5)
        gradient = direction.gradient(name, change)
        assert float((change * gradient).sum()) / 2 == pytest.approx(value, rel=1e-5)


def test_folders_shards_and_modules_give_one_direction(tmp_path: Path) -> None:
    aligned, unaligned = pair()
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="40KB")
    unaligned.save_pretrained(tmp_path / "unaligned")
    for options in ({}, {"operator": "subspace", "rank": 4}, {"operator": "vector"}):
        first = AlignmentDirection.between(aligned, unaligned, **options)
        for new in (aligned, tmp_path / "aligned"):
            for old in (unaligned, str(tmp_path / "unaligned")):
                assert same(first, AlignmentDirection.between(new, old, **options))
        # V and -V have one C: folders given in the wrong order do no harm but in `check`.
        swapped = AlignmentDirection.between(unaligned, aligned, **options)
        for name, operator in first.items():
            change = delta(operator.shape)
            torch.testing.assert_close(swapped.apply(name, change), first.apply(name, change))


def test_the_bundled_pair_is_a_direction() -> None:
    models = organism.path("aligned"), organism.path("unaligned")
    direction = AlignmentDirection.between(*models, operator="subspace", rank=8)
    assert len(direction) == 42
    assert all(0 < row["captured"] < 1 for row in direction.report().values())


def test_rank_is_of_the_factors_and_reported(tmp_path: Path) -> None:
    direction = AlignmentDirection.between(*pair(), rank=4)
    assert {c.form for c in direction.values()} == {"factors"}
    whole = AlignmentDirection.between(*pair())
    assert [whole[name].form for name in (Q, K, UP)] == ["dense", "dense", "gram"]
    for name, row in direction.report().items():
        assert row["rank"] == 4 and 0.1 < row["captured"] < 0.9
        assert row["norm"] == pytest.approx(whole.report()[name]["norm"])
        assert row["largest"] == pytest.approx(whole.report()[name]["largest"], rel=1e-5)
        assert row["trace"] < whole.report()[name]["trace"] == pytest.approx(row["norm"])
        assert whole.report()[name]["captured"] == 1


def test_operators_and_ranks_that_do_not_fit() -> None:
    def between(**options: Any) -> AlignmentDirection:
        return AlignmentDirection.between(*pair(), **options)

    with pytest.raises(ValueError, match=r"refused: the exact projector .* identity on square"):
        between(operator="exact")
    with pytest.raises(ValueError, match="'plain' is unknown; choose one of safelora, subspace"):
        between(operator="plain")
    with pytest.raises(ValueError, match="'subspace' needs rank="):
        between(operator="subspace")
    with pytest.raises(ValueError, match=r"rank=2 with operator='vector'"):
        between(operator="vector", rank=2)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="give a whole number of at least 1"):
            between(rank=rank)
    with pytest.raises(ValueError, match=rf"rank=17 is larger than '{K}' \(16 x 32\)"):
        between(rank=17)
    between(rank=16)
    with pytest.raises(ValueError, match=rf"rank=16 is all of '{K}' .*identity; give at most 15"):
        between(operator="subspace", rank=16)


def test_equal_models_have_no_direction() -> None:
    with pytest.raises(ValueError, match=r"aligned .* equals unaligned .* in all 14 matrices"):
        AlignmentDirection.between(make_llama(), make_llama())


def test_a_matrix_that_alignment_left_alone_is_named() -> None:
    aligned, unaligned = pair()
    with torch.no_grad():
        aligned.get_parameter(Q).copy_(unaligned.get_parameter(Q))
    with pytest.warns(UserWarning, match=rf"in 1 of 14 matrices .*: '{Q}'; leave them out"):
        direction = AlignmentDirection.between(aligned, unaligned)
    change = delta(direction[Q].shape)
    assert not direction.apply(Q, change).any()
    torch.testing.assert_close(direction.penalty(Q, change), change.square().sum())


def test_steep_operators_warn_once_and_by_name() -> None:
    """Above 2, (1 - c)^2 > 1: the penalty is larger along the direction than across it."""
    aligned, unaligned = pair()
    with torch.no_grad():
        for name in (Q, UP):
            aligned.get_parameter(name).mul_(1000)
    with pytest.warns(UserWarning, match=rf"exceeds 2 in 2 of 14 .*'{Q}', '{UP}'") as caught:
        direction = AlignmentDirection.between(aligned, unaligned)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert direction.report()[Q]["largest"] > 2
    AlignmentDirection.between(aligned, unaligned, operator="subspace", rank=4)  # and no warning


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_name_tensor_and_model(tmp_path: Path, bad: float) -> None:
    aligned, unaligned = pair()
    with torch.no_grad():
        unaligned.get_parameter(UP)[3, 5] = bad
    unaligned.save_pretrained(tmp_path)
    for broken in (unaligned, tmp_path):
        with pytest.raises(ValueError, match=rf"'{UP}' of unaligned .* holds 1 values that"):
            AlignmentDirection.between(aligned, broken)
        with pytest.raises(ValueError, match=rf"'{UP}' of aligned"):
            AlignmentDirection.between(broken, aligned)


def test_one_pair_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a pair is read, every tensor read before it is gone."""
    for model, name in zip(pair(), ("aligned", "unaligned"), strict=True):
        model.save_pretrained(tmp_path / name)
    alive: list[weakref.ref[Tensor]] = []
    most, read = 0, Weights.read

    def watched(self: Weights, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Weights, "read", watched)
    AlignmentDirection.between(tmp_path / "aligned", tmp_path / "unaligned")
    assert len(alive) == 28 and most == 2


PEAK = """
import sys
from pathlib import Path
from safeopt import AlignmentDirection

def between(parameters):
    AlignmentDirection.between(*sys.argv[1:3], operator="subspace", rank=2, parameters=parameters)
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

print(between(["m0.weight"]), between(None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_largest_matrix(tmp_path: Path) -> None:
    """32 matrices of 2 MiB in each model: all of them take much less more than their 128 MiB.

    Not nothing: pages of the mapped files count until the system takes them back.
    """
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        made = {f"m{n}.weight": delta(torch.Size((640, 800)), n + ord(place)) for n in range(32)}
        save_file(made, tmp_path / place / "model.safetensors")
    assert len(load_file(tmp_path / "a" / "model.safetensors")) == 32
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    one, all_of_them = map(float, done.stdout.split())
    assert one > 50 and all_of_them - one < 96, done.stdout
