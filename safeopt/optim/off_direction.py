"""What the AsFT penalty ||(I - C) dW||_F^2 asks of each weight, of matrices and LoRA pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from safeopt.direction import AlignmentDirection
from safeopt.names import require
from safeopt.operators import Operator
from safeopt.optim.live import named
from safeopt.optim.pairing import Pair, Scale, pairs_of, require_numbers
from safeopt.optim.starting_values import Source, StartingValues
from safeopt.ranks import whole
from safeopt.sharding import add_up, box, cut, is_sharded, local

Members: TypeAlias = Iterable[tuple[str, Tensor, int]]
STATE = "asft_anchor"  # key of a starting value in a parameter's state


class Pull(NamedTuple):
    """What moves one parameter: `gradient` of ||(I - C) dW||_F^2 (decoupled: 2 (I - C)^2 of the
    parameter itself), the operator it came by, and the group that says how strongly.
    """

    gradient: Tensor
    operator: Operator
    group: dict[str, Any]


class OffDirection:
    """The matrices and adapters of an optimizer that a direction covers, and their penalty.

    Parameters are met by name, each time anew, because sharding and loading swap the tensors.
    """

    def __init__(self, direction: AlignmentDirection, values: Source, scale: Scale) -> None:
        if not isinstance(direction, AlignmentDirection):
            raise TypeError(
                f"direction must be an AlignmentDirection, got {type(direction).__name__}; make one"
                " with AlignmentDirection.between(aligned, unaligned)"
            )
        require_numbers(scale)
        self._direction, self._scale = direction, scale
        self._start = StartingValues(values)
        self._whole: set[str] = set()
        self._asleep: set[str] = set()
        self._pairs: list[Pair] = []
        self._near: dict[Hashable, Operator] = {}
        self._pulls: dict[str, Pull] = {}
        self._sums: dict[str, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_near": {}, "_pulls": {}, "_sums": None}

    def bind(self, groups: list[dict[str, Any]], members: Callable[[dict], Members]) -> None:
        """Pair the parameters with the direction, and take the starting values of new ones.

        Raises:
            ValueError: see `AsFTAdamW`.
        """
        rows = [(group, *row) for group in groups for row in members(group)]
        known = {name: p for _, name, p, _ in rows}
        pairs = pairs_of(known, self._direction, self._scale)
        adapted = {pair.base for pair in pairs}
        wanted: dict[str, Tensor] = {}
        asleep = set()
        for group, name, p, live in rows:
            if name not in self._direction or not live:
                continue
            if not p.requires_grad:
                asleep.add(name)
                continue
            self._check(name, p, adapted)
            if group["lam"] and name not in self._whole:
                wanted[name] = p
        if not pairs:
            require(self._direction, known, "direction")
            if not any(p.requires_grad for name, p in known.items() if name in self._direction):
                raise ValueError(
                    "every matrix of the direction has requires_grad=False, and there are no LoRA"
                    " adapters: nothing would be penalised. Build the optimizer after unfreezing"
                )
        for group in groups:
            if group["mode"] == "decoupled":
                self._check_decoupled(pairs, {n for n, _ in named(group, "direction")})
        self._start.take(wanted)
        self._whole |= wanted.keys()
        self._pairs, self._asleep = pairs, asleep
        for group in groups:
            own = [name for name, _ in named(group, "direction")]
            if group["lam"] and not group["direction_digest"]:
                group["direction_digest"] = self._direction.digest()
                whole = [name for name in own if name in self._whole]
                group["asft_values_digest"] = self._start.digest(whole) if whole else ""

    def begin(self, groups: list[dict[str, Any]], log: bool) -> None:
        """Start a step: everything about adapters, which may lie in different groups."""
        self._sums = {"penalty": [], "across": [], "drift": []} if log else None
        self._pulls = {}
        where = {name: (p, g) for g in groups for name, p in named(g, "direction")}
        for pair in self._pairs:
            (B, group), (A, _) = where[pair.B], where[pair.A]
            if group["lam"] and (B.grad is not None or A.grad is not None):
                self._pull_pair(pair, B, A, group)

    def pull(self, name: str, p: Tensor, group: dict[str, Any]) -> Pull | None:
        """What moves a parameter of this group now, or None. Call once per step, after `begin`.

        Raises:
            RuntimeError: it should be pulled, but its starting value was not taken.
        """
        if name in self._pulls:
            return self._pulls.pop(name)
        if name not in self._direction or not group["lam"]:
            return None
        if name not in self._whole:
            was = "it had requires_grad=False" if name in self._asleep else "lam was 0"
            raise RuntimeError(
                f"{name!r} is to be penalised by its change, but its starting value was not taken:"
                f" {was} when the optimizer was built. Build it with lam above 0, after unfreezing"
            )
        operator = self._operator(name, p)
        drift = self._drift(name, p)
        gradient = operator.gradient(drift)
        if self._sums is not None:
            across = add_up((drift * gradient).sum() / 2, p)
            self._note(group, across, add_up(drift.square().sum(), p))
        return Pull(gradient, operator, group)

    def keep(self, name: str, p: Tensor, state: dict[str, Any]) -> None:
        """Put a starting value into a parameter's state if it can be had from nowhere else."""
        if name in self._whole and self._start.saved:
            state[STATE] = self._start.of(name, p)

    def restore(self, name: str, state: dict[str, Any]) -> None:
        """Put the starting value that a checkpoint holds in place of the one taken before."""
        if name in self._whole and self._start.saved and STATE in state:
            state[STATE] = self._start.restore(name, state[STATE])

    def logged(self) -> tuple[Tensor, Tensor] | None:
        """(penalty, share across) of the step, 0-d; None where it was not asked for."""
        if self._sums is None or not self._sums["drift"]:
            return None
        penalty, across, drift = (total(self._sums[k]) for k in ("penalty", "across", "drift"))
        return penalty, across / drift.clamp(min=torch.finfo(drift.dtype).tiny)

    def penalty(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """Of each matrix and pair now: lam * ||(I - C) dW||_F^2."""
        where = {name: (p, g) for g in groups for name, p in named(g, "direction")}
        found = []
        for name in self._whole:
            p, group = where[name]
            found.append(group["lam"] * self._operator(name, p).penalty(self._drift(name, p)))
        for pair in self._pairs:
            (B, group), (A, _) = where[pair.B], where[pair.A]
            operator = self._operator(pair.base, B, factor=True)
            found.append(group["lam"] * operator.penalty_lora(*_whole(B, A), pair.scale))
        return found

    def _pull_pair(self, pair: Pair, B: Tensor, A: Tensor, group: dict[str, Any]) -> None:
        """Note what moves the two, of sharded ones this rank's parts; A is small, and gathered."""
        operator = self._operator(pair.base, B, factor=True)
        B_here, A_whole = _whole(B, A)
        wide = torch.float64 if B.dtype == torch.float64 else torch.float32
        B_here, A_whole = B_here.to(wide), A_whole.to(wide)
        coupled = group["mode"] == "coupled"
        if coupled or self._sums is not None:
            toward_B, toward_A = operator.gradient_lora(B_here, A_whole, pair.scale)
        if self._sums is not None:
            # The penalty is quadratic in A: half the inner product with its gradient.
            across, outer = (A_whole * toward_A).sum() / 2, add_up(B_here.mT @ B_here, B)
            drift = (outer * (A_whole @ A_whole.mT)).sum() * pair.scale**2
            self._note(group, across, drift)
        if coupled:
            self._pulls[pair.A] = Pull(cut(toward_A, A), operator, group)
        else:
            toward_B = operator.gradient(B_here)
        self._pulls[pair.B] = Pull(toward_B, operator, group)

    def _note(self, group: dict[str, Any], across: Tensor, drift: Tensor) -> None:
        assert self._sums is not None
        self._sums["penalty"].append(group["lam"] * across.detach())
        self._sums["across"].append(across.detach())
        self._sums["drift"].append(drift.detach())

    def _drift(self, name: str, p: Tensor) -> Tensor:
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        return local(p).to(wide) - self._start.of(name, p).to(p.device, wide)

    def _operator(self, name: str, p: Tensor, *, factor: bool = False) -> Operator:
        key = (name, p.device, getattr(p, "placements", None))
        if key not in self._near:
            operator = self._direction[name]
            if not factor:
                require_factors(name, operator, p)
            self._near[key] = operator.part(p, factor=factor).to(p.device)
        return self._near[key]

    def _check(self, name: str, p: Tensor, adapted: set[str]) -> None:
        if name in adapted:
            raise ValueError(
                f"{name!r} is trained and has a trainable LoRA adapter: its change is both; freeze"
                " one of them (requires_grad_(False))"
            )
        shape = self._direction[name].shape
        if shape != p.shape:
            raise ValueError(
                f"direction for {name!r} has shape {tuple(shape)}, the parameter has"
                f" {tuple(p.shape)}: the direction was made with another model"
            )
        if not p.is_floating_point():
            raise TypeError(f"direction: {name!r} is {p.dtype}; only real weights are penalised")

    def _check_decoupled(self, pairs: list[Pair], names: set[str]) -> None:
        for pair in pairs:
            if pair.B in names and self._direction[pair.base].form == "vector":
                raise ValueError(
                    f"mode='decoupled' with operator 'vector' on the adapter of {pair.base!r}: what"
                    " lies across one flattened direction, or along it, cannot be taken off B A by"
                    " changing B. Use mode='coupled', or a direction with operator 'subspace' or"
                    " 'safelora'"
                )


def _whole(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B, of a sharded one the rows of this rank, and A (r, in), which all ranks need whole."""
    return local(B), whole(A.detach())


def require_factors(name: str, operator: Operator, p: Tensor) -> None:
    """NotImplementedError where ranks would have to exchange as much as the weight itself."""
    if is_sharded(p) and operator.form in ("dense", "gram") and box(p)[-2] != slice(0, p.shape[-2]):
        raise NotImplementedError(
            f"the rows of {name!r} are sharded, and its operator 'safelora' without rank is"
            f" {p.shape[-2]} x {p.shape[-2]}: each step would send as much as the weight. Make the"
            " direction with rank=, such as 32: then it is 32 numbers per column"
        )


def rate(pull: Pull, lr: float | Tensor) -> float | Tensor:
    """How much of (I - C)^2 dW a decoupled step takes off: 2 lr lam, within what is stable.

    That is at most 1 / mu, see `Operator.mu`: none of dW's components changes sign. For a projector
    and its complement mu is 1. One number per expert of a stack, (n, 1, 1).
    """
    bounds = [1 / mu for mu in pull.operator.mu]
    wanted = 2 * lr * pull.group["lam"]
    if isinstance(wanted, Tensor):
        wanted = wanted.to(pull.gradient.device, pull.gradient.dtype)
        return torch.minimum(wanted, wanted.new_tensor(bounds).view(-1, 1, 1).squeeze(0))
    shares = [min(wanted, bound) for bound in bounds]
    return shares[0] if len(shares) == 1 else pull.gradient.new_tensor(shares).view(-1, 1, 1)


def total(values: list[Tensor]) -> Tensor:
    """The sum of 0-d tensors, on the first one's device."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def require_options(group: Mapping[str, Any]) -> None:
    """ValueError unless lam and mode, of the arguments or a group, are valid."""
    lam, mode = group["lam"], group["mode"]
    if isinstance(lam, Tensor) or not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam={lam!r}; give a finite number of at least 0 (the authors use 1)")
    if mode not in ("coupled", "decoupled"):
        raise ValueError(f"mode={mode!r}; it must be one of coupled, decoupled")


def require_same(own: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError unless a loaded group was drawn by this direction to these starting values."""
    if not new.get("direction_digest"):  # a run without a direction goes on with this one
        new.update({key: own[key] for key in (*OPTIONS, *DIGESTS)})
        return
    for key, what in zip(DIGESTS, ("direction", "anchor_values"), strict=True):
        if new[key] != own[key]:
            raise ValueError(
                f"the loaded state belongs to a run with another {what} ({new[key][:12] or 'none'},"
                f" here {own[key][:12] or 'none'}): build the optimizer with the {what} of the"
                " saved run and lam above 0, or start afresh"
            )


OPTIONS = ("lam", "mode")
DIGESTS = ("direction_digest", "asft_values_digest")
