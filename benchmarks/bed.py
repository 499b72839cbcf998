"""The weights that the step cases share, and masks over them.

Parameters, gradients and moments exist once. Every optimizer works on the same memory, one at a
time, so that 30 cases fit where one does, and none finds its data nearer than another does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import BitMask, SafetyMask

LAYERS = 32
MOMENTS = ("exp_avg", "exp_avg_sq")
LINE = 64  # bytes that move together


def shapes(weights: int) -> dict[str, tuple[int, int]]:
    """About `weights` weights in 32 layers of two matrices each, as in a language model."""
    side = max(8, 8 * round((weights / LAYERS / 5) ** 0.5 / 8))
    pair = {"attention.weight": (side, side), "mlp.weight": (4 * side, side)}
    return {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in pair.items()}


class Bed:
    """Parameters with gradients, and moments for whichever optimizer steps.

    Args:
        weights: how many, about.
        device, dtype: of everything.
        shared: False leaves every optimizer its own moments.
    """

    def __init__(
        self, weights: int, device: str, dtype: torch.dtype = torch.float32, shared: bool = True
    ) -> None:
        def filled(low: float) -> dict[str, Tensor]:
            made = {n: torch.empty(s, device=device, dtype=dtype) for n, s in self.shapes.items()}
            return {n: tensor.uniform_(low, 1.0) for n, tensor in made.items()}

        self.shapes, self.device, self.dtype = shapes(weights), device, dtype
        self.parameters = {n: nn.Parameter(tensor) for n, tensor in filled(-1.0).items()}
        for name, gradient in filled(-1.0).items():
            self.parameters[name].grad = gradient
        self.weights = sum(p.numel() for p in self.parameters.values())
        # Not zero: the moments of one optimizer meet another's gradients, and must stay normal.
        self.moments = {key: filled(0.5) for key in MOMENTS} if shared else {}
        self.mask = functools.cache(self._mask)
        self.frozen = functools.cache(self._frozen)

    def adopt(self, optimizer: Any) -> int:
        """Take a first step, lay the optimizer's moments into the shared ones; their own bytes.

        Parameter by parameter, so that no second set of moments exists even for a moment.
        """
        gradients = {name: p.grad for name, p in self.parameters.items()}
        total = 0
        for p in self.parameters.values():
            p.grad = None
        for name, p in self.parameters.items():
            p.grad = gradients[name]
            optimizer.step()
            p.grad = None
            state = optimizer.state.get(p, {})
            total += sum(tensor.nbytes for tensor in state.values())
            for key in self.moments:
                if key in state and state[key].dtype == self.dtype:
                    place = self.moments[key][name].view(-1)[: state[key].numel()]
                    state[key] = place.view(state[key].shape)
        for name, p in self.parameters.items():
            p.grad = gradients[name]
        return total

    def _mask(self, density: float, granularity: str) -> SafetyMask:
        """About `density` of the weights, selected at random by weight or row, or whole tensors."""
        if granularity == "layer":
            chosen = self._whole_tensors(density)
            return SafetyMask({n: BitMask.whole(s, n in chosen) for n, s in self._sizes()})
        chance = torch.Generator(self.device).manual_seed(round(1000 * density))

        def drawn(*shape: int) -> Tensor:
            return torch.rand(shape, device=self.device, generator=chance) < density

        if granularity == "row":
            rows = {n: BitMask.from_rows(drawn(s[0]), s) for n, s in self._sizes()}
            return SafetyMask(rows)
        return SafetyMask({n: BitMask.from_bool(drawn(*s)) for n, s in self._sizes()})

    def layers(self, count: int) -> SafetyMask:
        """All weights of `count` layers in the middle."""
        first = (LAYERS - count) // 2
        wanted = [f"layers.{i}" for i in range(first, first + count)]
        return SafetyMask.from_tensors(wanted, self.parameters)

    def _frozen(self, density: float) -> list[tuple[Tensor, Tensor]]:
        mask = self.mask(density, "weight")
        return [(p, mask[name].to_bool()) for name, p in self.parameters.items()]

    def _whole_tensors(self, density: float) -> set[str]:
        """The first tensors that come nearest to `density`; beyond a half, all but those."""
        few, chosen, share = min(density, 1 - density), set(), 0.0
        for name, shape in self._sizes():
            with_it = share + shape.numel() / self.weights
            if abs(with_it - few) < abs(share - few):
                chosen.add(name)
                share = with_it
        return chosen if few == density else set(self.shapes) - chosen

    def _sizes(self) -> list[tuple[str, torch.Size]]:
        return [(name, torch.Size(shape)) for name, shape in self.shapes.items()]


def least_bytes(mask: SafetyMask | None, live_bit: bool, bed: Bed) -> tuple[float, float]:
    """(bytes a step must move at least, share of live weights), of all weights of a bed.

    A live weight costs 7 numbers: read p, g, m, v; write p, m, v. Of p and g whole cache lines
    move, so that a lone live weight costs three lines of them; the moments of live weights lie
    packed. A partly live tensor costs the bits of its mask too.
    """
    size, moved, alive = bed.dtype.itemsize, 0, 0
    for name, p in bed.parameters.items():
        bits = mask.get(name) if mask is not None else None
        if bits is None:
            live = p.numel() if mask is None or not live_bit else 0
        else:
            live = bits.count() if live_bit else p.numel() - bits.count()
        alive += live
        if bits is None or live in (0, p.numel()):
            moved += 7 * size * live
            continue
        per_line = LINE // size
        moves = (bits if live_bit else ~bits).to_bool().view(-1)
        lines = torch.nn.functional.pad(moves, (0, -moves.numel() % per_line)).view(-1, per_line)
        touched = int(lines.any(1).sum()) * per_line
        moved += 3 * size * min(touched, p.numel()) + 4 * size * live + bits.bits.numel()
    return moved, alive / bed.weights
