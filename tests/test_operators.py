"""C of one matrix against dense float64 formulas: value, gradient, LoRA form, spectrum, cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from safeopt.operators import Operator
from safeopt.singular import SMALL, leading

SHAPES = [(1, 7), (7, 1), (8, 9), (9, 8), (37, 53), (53, 37), (3, 5, 11), (3, 11, 5)]
CASES = [
    (kind, rank, shape)
    for shape in SHAPES
    for kind, rank in [("safelora", None), ("safelora", 1), ("subspace", 1), ("subspace", 4),
                       ("safelora", 4), ("vector", None)]
    if (rank or 0) <= min(shape[-2:]) and not (kind == "subspace" and rank == shape[-2])
]  # fmt: skip
cases = pytest.mark.parametrize(("kind", "rank", "shape"), CASES, ids=str)


def noise(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made * size


def dense(V: Tensor, kind: str, rank: int | None) -> Tensor:
    """The operator on vec(delta) (row by row) of one matrix, written out with nothing saved."""
    width = V.shape[1]
    length = (V**2).sum() ** 0.5
    if kind == "vector":
        v = V.reshape(-1, 1) / length
        return v @ v.T
    U, s, _ = torch.linalg.svd(V)
    U, s = U[:, : rank or len(s)], s[: rank or len(s)]
    if kind == "subspace":
        left = U @ U.T
    elif rank is None:
        left = V @ V.T / length
    else:
        left = U @ torch.diag(s**2) @ U.T / length
    return torch.kron(left, torch.eye(width, dtype=V.dtype))


def experts(tensor: Tensor) -> list[Tensor]:
    return list(tensor) if tensor.dim() == 3 else [tensor]


def naive_apply(V: Tensor, delta: Tensor, kind: str, rank: int | None) -> Tensor:
    pairs = zip(experts(V), experts(delta), strict=True)
    parts = [(dense(v, kind, rank) @ d.reshape(-1)).view(d.shape) for v, d in pairs]
    return torch.stack(parts).view(delta.shape)


@cases
def test_parity_with_the_dense_formula(kind, rank, shape):
    """float64 to the last digits; float32, which training uses, within its rounding."""
    V, delta = noise(*shape, size=0.3), noise(*shape, seed=1)
    along = naive_apply(V, delta, kind, rank)
    across = delta - along
    expected = (across**2).sum()
    gradient = 2 * (across - naive_apply(V, across, kind, rank))
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        made = Operator.of(V.to(dtype), kind, rank, 0)
        close = {"rtol": rtol, "atol": rtol * float(delta.norm()), "check_dtype": False}
        x = delta.to(dtype)
        torch.testing.assert_close(made.apply(x), along, **close)
        torch.testing.assert_close(made.penalty(x), expected, **close)
        torch.testing.assert_close(made.gradient(x), gradient, **close)
        assert made.apply(x).dtype == made.penalty(x).dtype == dtype


@cases
def test_gradient_is_that_of_autograd(kind, rank, shape):
    made = Operator.of(noise(*shape), kind, rank, 0)
    delta = noise(*shape, seed=1).requires_grad_()
    value = made.penalty(delta)
    (expected,) = torch.autograd.grad(value, delta)
    found = made.gradient(delta.detach())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((delta.detach() * found).sum() / 2, value.detach())


@cases
def test_lora_form_is_the_penalty_of_the_product(kind, rank, shape):
    """Value and both gradients, against the d x d way; scale enters squared."""
    made = Operator.of(noise(*shape, size=0.4), kind, rank, 0)
    B = noise(*shape[:-1], 3, seed=2).requires_grad_()
    A = noise(*shape[:-2], 3, shape[-1], seed=3).requires_grad_()
    for scale in (1.0, 2.5):
        value, expected = made.penalty_lora(B, A, scale), made.penalty(scale * (B @ A))
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
        found = torch.autograd.grad(value, (B, A))
        wanted = torch.autograd.grad(expected, (B, A))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@cases
def test_lora_starts_at_nothing(kind, rank, shape):
    """LoRA starts at B = 0: value and gradients are 0 and never NaN."""
    made = Operator.of(noise(*shape).float(), kind, rank, 0)
    B = torch.zeros(*shape[:-1], 3, requires_grad=True)
    A = noise(*shape[:-2], 3, shape[-1], seed=3).float().requires_grad_()
    value = made.penalty_lora(B, A, 1.0)
    value.backward()
    assert value == 0 and not B.grad.any() and not A.grad.any()


@pytest.mark.parametrize("shape", [(9, 8), (8, 9), (3, 5, 11)], ids=str)
def test_what_is_a_projector_and_what_is_not(shape):
    V, delta = noise(*shape, size=3.0), noise(*shape, seed=1)
    for kind, rank in (("subspace", 3), ("vector", None)):
        made, larger = Operator.of(V, kind, rank, 0), Operator.of(7 * V, kind, rank, 0)
        once = made.apply(delta)
        torch.testing.assert_close(made.apply(once), once)
        torch.testing.assert_close(larger.apply(delta), once)
        assert 0 < made.penalty(delta) < delta.square().sum()
    made, larger = Operator.of(V, "safelora", None, 0), Operator.of(7 * V, "safelora", None, 0)
    once = made.apply(delta)
    assert (made.apply(once) - once).norm() > 0.5 * once.norm()
    torch.testing.assert_close(larger.apply(delta), 7 * once)
    # The exact Eq. 3 projector of a wide matrix, which `between` refuses, sees nothing at all.
    if shape[-2] < shape[-1]:
        exact = V @ torch.linalg.pinv(V)
        assert (delta - exact @ delta).norm() < 1e-12


@cases
def test_stats_are_those_of_the_spectrum(kind, rank, shape):
    V = noise(*shape, size=0.3)
    stats = Operator.of(V, kind, rank, 0).stats
    for place, v in enumerate(experts(V)):
        C = dense(v, kind, rank)
        columns = 1 if kind == "vector" else v.shape[1]
        values = torch.linalg.eigvalsh(C).flip(0)
        assert stats["norm"][place] == pytest.approx(float(v.norm()))
        assert stats["largest"][place] == pytest.approx(float(values[0]))
        assert stats["trace"][place] == pytest.approx(float(values.sum()) / columns)
        assert stats["rank"][place] == int((values > 1e-9).sum()) / columns
        s = torch.linalg.svdvals(v) ** 2
        share = 1.0 if kind == "vector" else float(s[: rank or len(s)].sum() / s.sum())
        assert stats["captured"][place] == pytest.approx(share)


def test_an_expert_without_a_change_has_no_direction():
    """V = 0 is the limit C = 0, not 0 / 0; rounding-size singular values have no direction."""
    V, delta = noise(3, 6, 8), noise(3, 6, 8, seed=1)
    V[1] = 0
    for kind, rank in (("safelora", None), ("safelora", 2), ("subspace", 2), ("vector", None)):
        made = Operator.of(V, kind, rank, 0)
        for one in (made, made.random_like(3)):
            assert not one.apply(delta)[1].any() and one.apply(delta)[0].any()
        assert [made.stats[key][1] for key in ("norm", "largest", "trace", "rank")] == [0] * 4
    low = noise(20, 2) @ noise(2, 30, seed=1)
    made = Operator.of(low.float(), "subspace", 5, 0)
    assert made.stats["rank"] == [2] and made.stats["trace"] == [2]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (3, 40, 24)], ids=str)
def test_nothing_larger_than_the_matrix_is_held(shape):
    """And with few factors, nothing of d x d."""
    for kind, rank in (("safelora", None), ("safelora", 2), ("subspace", 2), ("vector", None)):
        made = Operator.of(noise(*shape), kind, rank, 0)
        held = made.basis.untyped_storage().nbytes() / made.basis.element_size()
        batch = shape[0] if len(shape) == 3 else 1
        assert held == made.basis.numel() <= batch * shape[-1] * shape[-2]
        assert rank is None or held == batch * shape[-2] * rank


def test_low_precision_is_raised_first():
    """bfloat16 deltas, and deltas under autocast, are penalised in float32."""
    for kind, rank, shape in (("safelora", None, (9, 8)), ("subspace", 3, (8, 9))):
        made = Operator.of(noise(*shape).float(), kind, rank, 0)
        delta = noise(*shape, seed=1).bfloat16()
        B, A = noise(shape[0], 3, seed=2).float(), noise(3, shape[1], seed=3).float()
        plain = made.penalty(delta.float()), made.penalty_lora(B, A, 1.0)
        assert torch.equal(made.penalty(delta), plain[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made.penalty(delta), plain[0])
            assert torch.equal(made.penalty_lora(B, A, 1.0), plain[1])
            assert made.apply(delta).dtype == made.gradient(delta).dtype == torch.float32


@cases
def test_random_like_has_the_same_spectrum_elsewhere(kind, rank, shape):
    made = Operator.of(noise(*shape), kind, rank, 0)
    drawn, again, other = made.random_like(5), made.random_like(5), made.random_like(6)
    assert drawn.basis.shape == made.basis.shape and torch.equal(drawn.basis, again.basis)
    if kind == "vector":
        norms = torch.linalg.vector_norm(drawn.basis, dim=(-2, -1))
        torch.testing.assert_close(norms, torch.ones_like(norms))
    else:
        eye = torch.eye(shape[-2], dtype=torch.float64).expand(*shape[:-2], -1, -1)
        spectra = [torch.linalg.eigvalsh(one.apply(eye)) for one in (made, drawn)]
        torch.testing.assert_close(*spectra)
    if shape[-2] > 1:
        delta = noise(*shape, seed=1)
        for one in (made, other):
            assert (one.apply(delta) - drawn.apply(delta)).norm() > 1e-3


def test_randomised_factors_depend_on_their_seed_only():
    """They agree with the whole SVD, and the global generator is neither read nor moved."""
    out, width = SMALL + 60, SMALL + 130
    U, V = (torch.linalg.qr(noise(n, 60, seed=n)).Q for n in (out, width))
    matrix = (U * 0.8 ** torch.arange(60.0)) @ V.T + noise(out, width, size=1e-5)
    before = torch.get_rng_state()
    left, s = leading(matrix, 5, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(leading(matrix, 5, 0)[0], left)
    assert not torch.equal(leading(matrix, 5, 1)[0], left)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, exact.S[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(left @ left.T, exact.U[:, :5] @ exact.U[:, :5].T, rtol=0, atol=1e-5)
    flat = noise(out, width).float()  # no gap anywhere: the hardest case for the largest value
    found, true = leading(flat, 1, 0)[1], torch.linalg.svdvals(flat)[:1]
    assert 0.985 * true < found <= true * 1.0001


def meta(kind: str, rank: int | None, shape: tuple[int, int]) -> Operator:
    """The operator in the form it has at this shape, without values."""
    small = Operator.of(noise(*(max(s // 128, 2) for s in shape)), kind, rank and 1, 0)
    sizes = {"dense": (shape[0], shape[0]), "factors": (shape[0], rank or 0)}
    basis = torch.empty(sizes.get(small.form, shape), device="meta")
    count = (rank or 1,)
    gains = None if small.gains is None else torch.empty(count, device="meta")
    return Operator(small.form, torch.Size(shape), basis, gains, {})


def flops(make) -> int:
    with FlopCounterMode(display=False) as counter:
        make().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "rank"), [("safelora", None), ("safelora", 64), ("subspace", 64), ("vector", None)]
)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)], ids=str)
def test_lora_costs_a_hundredth_of_the_authors_form(kind, rank, shape):
    """Forward and backward at Llama-2-7B's shapes, LoRA of rank 8, counted by torch."""
    out, width = shape
    made = meta(kind, rank, shape)
    B = torch.empty(out, 8, device="meta", requires_grad=True)
    A = torch.empty(8, width, device="meta", requires_grad=True)
    C = torch.empty(out, out, device="meta")

    def authors() -> Tensor:
        return ((torch.eye(out, device="meta") - C) @ (B @ A)).square().sum()

    factored = flops(lambda: made.penalty_lora(B, A, 1.0))
    assert flops(authors) >= 100 * factored > 0
