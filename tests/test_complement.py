"""The complement of a direction, I - C, and the control without one, C = 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_direction import UP, Q, delta, pair, same
from test_operators import cases, dense, experts, flops, naive_apply, noise
from test_penalty import OPTIONS, adapted, direction
from torch import Tensor

from safeopt import AlignmentDirection, artifact, asft_penalty, operators
from safeopt.operators import SMALL, Operator

KINDS = [("safelora", None), ("safelora", 2), ("subspace", 2), ("vector", None)]
options = pytest.mark.parametrize("option", OPTIONS, ids=str)


@cases
def test_parity_with_the_dense_formula(kind, rank, shape):
    """||C delta||^2 and its gradient 2 C^2 delta, C written out dense; also for B A."""
    V, change = noise(*shape, size=0.3), noise(*shape, seed=1)
    along = naive_apply(V, change, kind, rank)
    gradient = 2 * naive_apply(V, along, kind, rank)
    B, A = noise(*shape[:-1], 3, seed=2), noise(*shape[:-2], 3, shape[-1], seed=3)
    product = naive_apply(V, B @ A, kind, rank)
    toward = 2 * 2.5**2 * naive_apply(V, product, kind, rank)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        made = Operator.of(V.to(dtype), kind, rank, 0).complement().to("cpu")
        close = {"rtol": rtol, "atol": rtol * float(change.norm()), "check_dtype": False}
        x = change.to(dtype)
        torch.testing.assert_close(made.apply(x), change - along, **close)
        torch.testing.assert_close(made.penalty(x), along.square().sum(), **close)
        torch.testing.assert_close(made.gradient(x), gradient, **close)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (B, A)]
        value = made.penalty_lora(*leaves, 2.5)
        close["atol"] *= 2.5**2 * float(B.norm() * A.norm())
        torch.testing.assert_close(value, 2.5**2 * product.square().sum(), **close)
        found = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(found[0], toward @ A.mT, **close)
        torch.testing.assert_close(found[1], B.mT @ toward, **close)


@cases
def test_stats_and_mu_are_those_of_the_spectrum(kind, rank, shape):
    """Where eigenvalues of C are small, and where they pass 2."""
    for size in (0.3, 5.0):
        V = noise(*shape, size=size)
        plain = Operator.of(V, kind, rank, 0)
        made = plain.complement()
        for place, v in enumerate(experts(V)):
            C = dense(v, kind, rank)
            columns = 1 if kind == "vector" else v.shape[1]
            values = torch.linalg.eigvalsh(torch.eye(len(C)) - C)
            stats = {key: values[place] for key, values in made.stats.items()}
            assert stats["largest"] == pytest.approx(float(values[-1]), abs=1e-9)
            assert stats["trace"] == pytest.approx(float(values.sum()) / columns)
            assert stats["rank"] == int((values.abs() > 1e-9).sum()) / columns
            assert stats["norm"] == pytest.approx(float(v.norm()))
            assert stats["captured"] == plain.stats["captured"][place]
            mu = float(values.abs().max()) ** 2, float((1 - values).abs().max()) ** 2
            assert plain.mu[place] == pytest.approx(max(1, mu[0]))
            assert made.mu[place] == pytest.approx(max(1, mu[1]))


def test_what_is_estimated_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """mu of a spectrum without a gap, which is hardest to find; and `largest`, when not looked for.

    Without the margin, mu of this matrix is too small.
    """
    V = noise(SMALL + 60, SMALL + 130, size=2.0).float()
    made = Operator.of(V, "safelora", None, 0)
    true = float(torch.linalg.svdvals(V.double())[0] ** 2 / V.double().norm())
    assert made.stats["largest"][0] < 0.999 * true
    assert true**2 < made.complement().mu[0] < 1.2 * true**2
    assert (true - 1) ** 2 < made.mu[0] < 1.2 * (true - 1) ** 2
    assert made.complement().stats["largest"] == [1.0]
    monkeypatch.setattr(operators, "SMALL", 1000)
    assert made.complement().stats["largest"][0] < 1


@cases
def test_twice_is_the_same_thing_and_random_comes_first(kind, rank, shape):
    made = Operator.of(noise(*shape), kind, rank, 0)
    other = made.complement()
    assert other.basis is made.basis and other.gains is made.gains and other.complemented
    again = other.complement()
    assert not again.complemented and again.stats == made.stats and again.mu == made.mu
    change = noise(*shape, seed=1)
    assert torch.equal(again.apply(change), made.apply(change))
    drawn = made.random_like(5)
    assert torch.equal(other.random_like(5).basis, drawn.basis)
    torch.testing.assert_close(
        other.random_like(5).apply(change), change - drawn.apply(change), rtol=1e-12, atol=1e-12
    )
    for key, values in other.random_like(5).stats.items():
        assert values == pytest.approx(other.stats[key], abs=1e-12)


def test_an_expert_without_a_change_is_free_and_low_precision_is_raised() -> None:
    for kind, rank in KINDS:
        V, change = noise(3, 6, 8).float(), noise(3, 6, 8, seed=1).float()
        V[1] = 0
        made = Operator.of(V, kind, rank, 0).complement()
        assert torch.equal(made.apply(change)[1], change[1])
        assert not made.gradient(change)[1].any() and made.gradient(change)[0].any()
        assert (made.stats["largest"][1], made.mu[1]) == (1, 1)
        assert made.stats["trace"][1] == made.stats["rank"][1] == (48 if kind == "vector" else 6)
        made = Operator.of(V[0], kind, rank, 0).complement()
        B, A, low = noise(6, 3).float(), noise(3, 8).float(), change[0].bfloat16()
        plain = made.penalty(low.float()), made.penalty_lora(B, A, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made.penalty(low), plain[0])
            assert torch.equal(made.penalty_lora(B, A, 1.0), plain[1])
            assert made.apply(low).dtype == made.gradient(low).dtype == torch.float32


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_a_complement_costs_no_more(kind: str, rank: int | None) -> None:
    for shape in ((24, 40), (40, 24)):
        made = Operator.of(noise(*shape), kind, rank, 0)
        B, A = noise(shape[0], 3).requires_grad_(), noise(3, shape[1]).requires_grad_()
        for compute in (
            lambda c, B=B, A=A: c.penalty_lora(B, A, 1.0),
            lambda c, B=B, A=A: c.penalty(B @ A),
        ):
            plain, other = (flops(lambda c=c: compute(c)) for c in (made, made.complement()))  # noqa: B023
            assert 0 < other <= plain


@options
@pytest.mark.parametrize("scale", [False, True])
def test_along_and_across_add_up(option: dict[str, Any], scale: bool) -> None:
    """Against B A dense; for a projector the two penalties share ||dW||^2 between them."""
    model, made = adapted(), direction(**option)
    with torch.autocast("cpu", torch.bfloat16):
        value = asft_penalty(model, made.complement(), 0.5, scale=scale)
    changes = {
        path.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default")
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    factor = 0.5 * (1 if scale else (3 / 7) ** 2)
    along = sum(made.apply(n, d.double()).square().sum() for n, d in changes.items()) * factor
    torch.testing.assert_close(value.double(), along, rtol=1e-5, atol=0)
    whole = sum(d.double().square().sum() for d in changes.values()) * factor
    l2 = asft_penalty(model, made.l2_like(), 0.5, scale=scale).double()
    torch.testing.assert_close(l2, whole, rtol=1e-5, atol=0)
    if option.get("operator"):
        across = asft_penalty(model, made, 0.5, scale=scale).double()
        torch.testing.assert_close(value.double() + across, whole, rtol=1e-5, atol=0)
    value.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


@options
def test_along_for_full_fine_tuning(option: dict[str, Any]) -> None:
    made, anchor, model = direction(**option), make_llama(seed=1), make_llama(seed=3)
    deltas = {n: (model.get_parameter(n) - anchor.get_parameter(n)).double() for n in made}
    for one, parts in (
        (made.complement(), {n: made.apply(n, d) for n, d in deltas.items()}),
        (made.l2_like(), deltas),
    ):
        value = asft_penalty(model, one, 2.0, anchor=anchor)
        expected = 2.0 * sum(part.square().sum() for part in parts.values())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@options
def test_files_digests_and_check(option: dict[str, Any], tmp_path: Path) -> None:
    aligned, unaligned = pair()
    made = AlignmentDirection.between(aligned, unaligned, **option)
    other, l2 = made.complement(), made.l2_like()
    file = tmp_path / "d.safetensors"
    for one in (other, l2, l2.complement(), other.random_like(3)):
        one.save(file)
        loaded = AlignmentDirection.load(file)
        assert same(loaded, one) and loaded.report() == one.report()
        assert loaded.manifest.items() >= one.manifest.items() and repr(loaded) == repr(one)
        assert loaded.digest() == one.digest()
        loaded.check(aligned)
        with pytest.raises(ValueError, match="is that of the unaligned model"):
            loaded.check(unaligned)
    assert other.manifest["complemented"] is True and "complemented" in repr(other)
    assert l2.manifest["l2"] is True and repr(l2).endswith("l2)")
    assert other.l2_like().manifest == l2.manifest and same(other.l2_like(), l2)
    again = other.complement()
    assert same(again, made) and again.manifest == made.manifest
    assert again.digest() == made.digest() and repr(again) == repr(made)
    assert len({one.digest() for one in (made, other, l2, l2.complement())}) == 4


@options
def test_directions_made_before_complements_load_and_keep_their_digest(
    option: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint of AsFTAdamW holds the digest: of basis and gains, by name."""
    made, file = AlignmentDirection.between(*pair(), **option), tmp_path / "d.safetensors"
    made.save(file)
    tensors, manifest = artifact.read(file, "direction")
    for layout in manifest["matrices"].values():
        assert layout.pop("complemented") is False
    artifact.write(file, tensors, "direction", manifest)
    assert same(AlignmentDirection.load(file), made)
    held = {name: c.basis for name, c in made.items()}
    held |= {f"{n}:gains": c.gains for n, c in made.items() if c.gains is not None}
    assert made.digest() == artifact.fingerprint(held)["weights"]
    assert made.to("cpu").digest() == made.digest()


@options
def test_l2_like_has_no_direction_and_no_memory(option: dict[str, Any]) -> None:
    made = AlignmentDirection.between(*pair(), **option).l2_like()
    assert sum(c.basis.numel() + c.gains.numel() for c in made.values() if c.gains is not None) == 0
    change: Tensor = delta(made[UP].shape).requires_grad_()
    assert not made.apply(UP, change).any()
    torch.testing.assert_close(made.penalty(UP, change), change.square().sum())
    torch.testing.assert_close(made.gradient(UP, change), 2 * change)
    (found,) = torch.autograd.grad(made.penalty(UP, change), change)
    torch.testing.assert_close(found, 2 * change)
    row = made.report()[UP]
    assert row["norm"] > 0
    assert [row[key] for key in ("largest", "trace", "rank", "captured")] == [0] * 4
    assert made[Q].mu == made.complement()[Q].mu == [1]
    assert same(made.random_like(1), made) and not made.complement().penalty(UP, change)
