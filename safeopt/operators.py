"""C for one matrix: what of a change lies along the alignment direction, without d x d products.

V = W_aligned - W_unaligned, float32, of shape (out, in), or (experts, out, in): then every line
below holds for each expert by itself. C is symmetric and acts on the left, on the `out` side.

    safelora   C = V V^T / ||V||_F         AsFT's code and Safe LoRA (arXiv 2506.08473, 2405.16833)
    subspace   C = U_k U_k^T               U_k: top k left singular vectors of V; a true projector
    vector     C = v v^T on vec(delta)     v = vec(V) / ||V||_F; a true projector

The exact projector of AsFT's Eq. 3, V (V^T V)^-1 V^T, is none of them: see
`operator_checks.EXACT_IS_IDENTITY`.
Each has a complement, I - C.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from safeopt.sharding import add_up, box, is_sharded
from safeopt.singular import SMALL, leading

MARGIN = 1.05  # eigenvalues of C that the randomised SVD finds are at most 3 % too small


@dataclass(frozen=True, eq=False)
class Operator:
    """C of one matrix, or of each of a stack, in the form that needs least memory.

    form: what `basis` and `gains` are, float32, with the experts in front where there are any:
        "factors"  Q (out, k), orthonormal, and c (k,): C = Q diag(c) Q^T
        "gram"     V (out, in) and 1 / ||V||_F (1,): C = V V^T / ||V||_F
        "dense"    C itself (out, out), no gains; held where out <= in, so never larger than V
        "vector"   v (out, in) of norm 1, and 1 (1,)
    shape: of the weight.
    counted: `stats` of what is held, before any complement.
    complemented: C is I minus what is held. I is out x out, for "vector" as large as vec(delta).
    over: None, or the sharded weight of which this is one rank's part, see `part`.
    """

    form: str
    shape: torch.Size
    basis: Tensor
    gains: Tensor | None
    counted: dict[str, list[float]]
    complemented: bool = False
    over: Tensor | None = None

    @classmethod
    def of(cls, V: Tensor, kind: str, rank: int | None, seed: int) -> Operator:
        """C of a difference; kind: `operator_checks.KINDS`; rank: `AlignmentDirection.between`."""
        norm = torch.linalg.vector_norm(V, dim=(-2, -1))
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        if kind == "vector":
            one = (norm > 0).to(V.dtype)
            counted = (norm, one, one, one, torch.ones_like(norm))
            return cls._with("vector", V, V * inverse[..., None, None], one[..., None], *counted)
        if rank is None:
            largest = leading(V, 1, seed)[1][..., 0].square() * inverse
            most = norm.new_full(norm.shape, min(V.shape[-2:])) * (norm > 0)
            counted = (norm, largest, norm, most, torch.ones_like(norm))
            if V.shape[-2] <= V.shape[-1]:
                return cls._with("dense", V, V @ V.mT * inverse[..., None, None], None, *counted)
            return cls._with("gram", V, V.clone(), inverse[..., None], *counted)
        U, s = leading(V, rank, seed)
        # Singular values that are rounding only have no direction: any basis would do for them.
        real = s > s[..., :1] * torch.finfo(s.dtype).eps * max(V.shape[-2:])
        gains = s.square() * inverse[..., None] if kind == "safelora" else torch.ones_like(s)
        gains = gains * real
        captured = torch.where(norm > 0, s.square().sum(-1) * inverse.square(), 1.0).clamp(max=1)
        counted = (norm, gains.amax(-1), gains.sum(-1), real.sum(-1), captured)
        return cls._with("factors", V, U, gains, *counted)

    @classmethod
    def _with(
        cls, form: str, V: Tensor, basis: Tensor, gains: Tensor | None, *counted: Tensor
    ) -> Operator:
        keys = ("norm", "largest", "trace", "rank", "captured")
        counts = {
            key: value.reshape(-1).cpu().double().tolist()
            for key, value in zip(keys, counted, strict=True)
        }
        return cls(form, V.shape, basis, gains, counts)

    def complement(self) -> Operator:
        """I - C, of the same tensors; the complement of a complement is the operator itself."""
        return replace(self, complemented=not self.complemented)

    def zero(self) -> Operator:
        """C = 0 for the same weight, without factors: its penalty is ||delta||_F^2, plain L2."""
        basis = self.basis.new_empty((*self.shape[:-1], 0))
        counted = {key: [0.0] * len(values) for key, values in self.counted.items()}
        counted["norm"] = self.counted["norm"]
        gains = self.basis.new_empty((*self.shape[:-2], 0))
        return Operator("factors", self.shape, basis, gains, counted)

    @cached_property
    def stats(self) -> dict[str, list[float]]:
        """By name one number per expert, or one.

        norm: ||V||_F, also of a complement. Where V = 0, C = 0, and the complement is I.
        largest: eigenvalue of C; where V is wider than 512 and no rank was given, up to 3 % too
            small. For the complement of "dense" wider than 512 it is 1, the most it can be.
        trace: of C.
        rank: the most that the rank of C can be.
        captured: share of ||V||_F^2 that the factors hold, also of a complement.
        """
        if not self.complemented:
            return self.counted
        size = math.prod(self.shape[-2:]) if self.form == "vector" else self.shape[-2]
        # Of what is held: the smallest eigenvalue, or 0, and how many are 1, which become 0.
        smallest = ones = torch.zeros(len(self.counted["norm"]))
        if self.form == "dense" and size <= SMALL:
            smallest = torch.linalg.eigvalsh(self.basis.double())[..., 0].clamp(min=0)
        elif self.form in ("factors", "vector"):
            assert self.gains is not None
            ones = (self.gains == 1).sum(-1)
            if self.gains.shape[-1] == size:  # else there are dimensions without a factor
                smallest = self.gains.amin(-1)
        return {
            **self.counted,
            "largest": (1 - smallest.double()).reshape(-1).tolist(),
            "trace": [size - value for value in self.counted["trace"]],
            "rank": (size - ones.double()).reshape(-1).tolist(),
        }

    @property
    def mu(self) -> list[float]:
        """The largest eigenvalue of (I - C)^2 or 1, whichever is larger; per expert, or one.

        Take at most 1 / mu of (I - C)^2 delta off delta, and no part of delta changes sign. An
        eigenvalue that was only estimated is taken 5 % larger, but not beyond the trace.
        """
        estimated = self.form in ("dense", "gram") and min(self.shape[-2:]) > SMALL
        found = zip(self.counted["largest"], self.counted["norm"], strict=True)
        tops = [min(MARGIN * c, norm) if estimated else c for c, norm in found]
        return [max(1.0, (c if self.complemented else 1 - c) ** 2) for c in tops]

    def to(self, device: torch.device | str) -> Operator:
        """The same operator on a device."""
        gains = None if self.gains is None else self.gains.to(device)
        return replace(self, basis=self.basis.to(device), gains=gains)

    def part(self, weight: Tensor, *, factor: bool = False) -> Operator:
        """The operator on this rank's part of a sharded weight, itself for any other weight.

        Its arguments and results are parts, and its penalty is that of the whole. What ranks that
        hold other rows exchange is Q^T delta, (k, in) per matrix, for "vector" one number; for
        "gram" it is (in, in) and for "dense" (out, in).

        Args:
            weight: the parameter; its device plays no part.
            factor: it is the B (out, r) of an adapter, with fewer columns than the matrix.
        """
        if not is_sharded(weight):
            return self
        *stack, rows, columns = box(weight)
        if factor and columns != slice(0, weight.shape[-1]):
            raise NotImplementedError(
                f"the B of an adapter, of shape {tuple(weight.shape)}, is sharded along its rank:"
                f" placements {weight.placements}; shard B along dimension 0"  # type: ignore
            )
        if factor or self.form != "vector":
            columns = slice(None)
        basis = self.basis[tuple(stack)]
        basis = basis[..., rows] if self.form == "dense" else basis[..., rows, columns]
        experts = stack[0] if stack else slice(None)
        counted = {key: values[experts] for key, values in self.counted.items()}
        return replace(
            self,
            shape=torch.Size((*basis.shape[:-2], *self.shape[-2:])),
            basis=basis.contiguous(),
            gains=None if self.gains is None else self.gains[tuple(stack)],
            counted=counted,
            over=weight,
        )

    def apply(self, delta: Tensor) -> Tensor:
        """C delta; delta has the weight's shape, or another number of columns but for "vector"."""
        with _full_precision(delta.device):
            delta = _raised(delta)
            along = self._times(delta, self.gains)
            return delta - along if self.complemented else along

    def penalty(self, delta: Tensor) -> Tensor:
        """||(I - C) delta||_F^2, 0-d, summed over experts; differentiable in delta."""
        with _full_precision(delta.device):
            return self._sum(self._across(_raised(delta)).square().sum())

    def gradient(self, delta: Tensor) -> Tensor:
        """2 (I - C)^2 delta: of `penalty`, whose value is half the inner product with delta."""
        with _full_precision(delta.device):
            delta = _raised(delta)
            if self.form in ("factors", "vector"):
                # One pass: for an orthonormal basis (I - C)^2 = I - Q diag(2 c - c^2) Q^T, and
                # Q diag(c^2) Q^T of the complement.
                assert self.gains is not None
                squares = self.gains.square()
                if self.complemented:
                    return 2 * self._times(delta, squares)
                return 2 * (delta - self._times(delta, 2 * self.gains - squares))
            return 2 * self._across(self._across(delta))

    def penalty_lora(self, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """`penalty` of scale * B A, B (out, r) and A (r, in), without forming B A."""
        with _full_precision(B.device):
            B, A = _raised(B), _raised(A)
            if self.form != "vector":
                X = self._across(B)
                return scale**2 * (self._sum(X.mT @ X, -2) * (A @ A.mT)).sum()
            assert self.gains is not None
            along = (self._inner(B) * A.mT).sum((-2, -1))
            along = self.gains[..., 0] * along.square()
            if self.complemented:
                return scale**2 * along.sum()
            whole = (self._sum(B.mT @ B, -2) * (A @ A.mT)).sum((-2, -1))
            # A difference of squares: rounding must not make a penalty negative.
            return scale**2 * (whole - along).clamp(min=0).sum()

    def gradient_lora(self, B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The gradients of `penalty_lora` in B and in A, both float32, or float64 if they are."""
        with _full_precision(B.device):
            B, A = _raised(B), _raised(A)
            if self.form != "vector":
                toward = self.gradient(B)
                core = self._sum(B.mT @ toward, -2) * scale**2  # (r, r), symmetric
                return toward @ (A @ A.mT) * scale**2, core @ A
            assert self.gains is not None
            inner = self._inner(B)
            along = self.gains[..., None] * (inner * A.mT).sum((-2, -1), keepdim=True)
            toward_B, toward_A = self.basis.to(B.dtype) @ A.mT * along, inner.mT * along
            if not self.complemented:
                toward_B = B @ (A @ A.mT) - toward_B
                toward_A = self._sum(B.mT @ B, -2) @ A - toward_A
            return 2 * scale**2 * toward_B, 2 * scale**2 * toward_A

    def random_like(self, seed: int) -> Operator:
        """An operator with these eigenvalues and random eigenvectors (for "vector", random v).

        Of a complement: the complement of the random operator.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.basis.shape, generator=generator).to(self.basis)
        if self.form == "vector":
            norm = torch.linalg.vector_norm(drawn, dim=(-2, -1), keepdim=True)
            return replace(self, basis=drawn / norm)
        Q, R = torch.linalg.qr(drawn)
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # else Q would not be uniform
        if self.form == "dense":
            Q = Q @ self.basis @ Q.mT
        elif self.form == "gram":
            Q = Q @ torch.linalg.qr(self.basis).R
        return replace(self, basis=Q)

    def _across(self, x: Tensor) -> Tensor:
        along = self._times(x, self.gains)
        return along if self.complemented else x - along

    def _times(self, x: Tensor, gains: Tensor | None) -> Tensor:
        basis = self.basis.to(x.dtype)
        if gains is None:
            found = self._sum(basis @ x, -2)
            return found if self.over is None else found[..., box(self.over)[-2], :]
        if self.form == "vector":
            along = self._sum((basis * x).sum((-2, -1), keepdim=True), -2, -1)
            return basis * (along * gains[..., None])
        return basis @ (gains[..., None] * self._inner(x))

    def _inner(self, x: Tensor) -> Tensor:
        return self._sum(self.basis.to(x.dtype).mT @ x, -2)

    def _sum(self, value: Tensor, *dims: int) -> Tensor:
        """Over the ranks that hold other parts along these dimensions of the weight, or any."""
        if self.over is None:
            return value
        along = [dim % self.over.dim() for dim in dims] or None
        return add_up(value.contiguous(), self.over, along)


def mixed(seed: int, name: str) -> int:
    """A seed for one matrix: random directions of equal shapes must not be the same one."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _raised(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
