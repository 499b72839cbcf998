"""The soft mask: which weights are drawn to their starting values, and how strongly each."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from safeopt import artifact
from safeopt.mask import SafetyMask
from safeopt.names import require
from safeopt.optim.live import AllLive
from safeopt.optim.starting_values import Source, StartingValues
from safeopt.scores import Scores
from safeopt.sharding import add_up, box, cut, is_sharded, local

Shares: TypeAlias = Scores | SafetyMask | Literal["uniform"]
Mode: TypeAlias = Literal["coupled", "decoupled"]
MODES = get_args(Mode)
ALONE = (
    "was given without anchor; say what to draw to its start: anchor='uniform' for every weight"
    " alike, or scores from safeopt.score"
)


class Anchor:
    """Starting value and share s of every weight under the penalty lambda * sum s (p - a)^2.

    Shares have mean 1 over the weights the scores name; those of a mask are 1 where it selects and
    0 elsewhere; "uniform" is 1 for every weight. lambda is the group's `anchor_strength`.
    """

    def __init__(self, given: Shares, values: Source, options: dict[str, Any]) -> None:
        self.options = options
        self._given = given
        self._mean = 0.0  # until it is needed
        self._start = StartingValues(values)
        self._drawn: set[str] = set()
        self._shares: dict[Hashable, Tensor] = {}
        self._asleep: set[str] = set()
        self._all_live = AllLive()

    @classmethod
    def of(cls, anchor: Shares | None, strength: float, mode: str, values: Source) -> Anchor | None:
        """The anchor of an optimizer's arguments, or None without one."""
        options = {"anchor_strength": strength, "anchor_mode": mode}
        check_options(options)
        if anchor is None:
            if strength or values is not None:
                argument = "anchor_strength" if strength else "anchor_values"
                raise ValueError(f"{argument} {ALONE}")
            return None
        if isinstance(anchor, str) and anchor != "uniform":
            raise ValueError(f"anchor is {anchor!r}; give Scores, a SafetyMask, or 'uniform'")
        if not isinstance(anchor, (str, Scores, SafetyMask)):
            raise TypeError(
                f"anchor must be Scores, a SafetyMask or 'uniform', got {type(anchor).__name__};"
                " make one with safeopt.score(model, batches, scorer) or Scores({name: tensor})"
            )
        return cls(anchor, values, options)

    def __contains__(self, name: str) -> bool:
        return name in self._drawn

    def check_names(self, names: Iterable[str]) -> None:
        """Check that the anchor fits the parameters of an optimizer.

        Raises:
            ValueError: a name of the scores that matches none of them, with near misses; or all
                weights it names are frozen.
        """
        if not isinstance(self._given, str):
            require(self._given, list(names), "anchor")
        if self._asleep and not self._drawn:
            raise ValueError(
                f"anchor names {len(self._asleep)} of these parameters and all have"
                " requires_grad=False: nothing would be drawn. Build the optimizer after unfreezing"
            )

    def add(self, group: dict[str, Any], members: Iterable[tuple[str, Tensor, int]]) -> None:
        """Take the starting values of a group's live weights, and note in the group what they are.

        Nothing is taken for a group whose strength is 0.

        Raises:
            ValueError: a shape, scores that are all zero, values that do not fit, or a trainable
                LoRA adapter that the scores do not name.
            TypeError: complex parameters.
        """
        wanted: dict[str, Tensor] = {}
        asleep = set()
        for name, p, live in members:
            if not group["anchor_strength"] or not live or not self._covers(name, p):
                continue
            if p.requires_grad:
                wanted[name] = p
            else:
                asleep.add(name)
        if not group["anchor_strength"]:
            return
        self._mean = self._mean or self._measured()
        self._start.take(wanted)
        group["anchor_digest"] = self._digest(wanted)
        group["anchor_values_digest"] = self._start.digest(wanted)
        self._drawn |= wanted.keys()
        self._asleep |= asleep

    def pulls(self, name: str, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter of a group is drawn to its start in this step.

        Raises:
            RuntimeError: it should be, but its starting value was not taken.
        """
        if not group["anchor_strength"] or param.grad is None:
            return False
        if name in self._asleep or not group["anchor_digest"]:
            was = "it had requires_grad=False" if name in self._asleep else "anchor_strength was 0"
            raise RuntimeError(
                f"{name!r} is to be drawn to its starting value, but that was not taken: {was} when"
                " the optimizer was built. Build it with anchor_strength above 0, after unfreezing"
            )
        return name in self._drawn

    def rule(self, param: Tensor, live_bit: bool) -> tuple[Tensor, Tensor, int, int, int]:
        """(bits, starts, span, nbits, offset) of a wholly live parameter, as the op takes them."""
        return self._all_live.columns(param, live_bit)

    def columns(
        self, name: str, param: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(starting value, shares or None for 1 everywhere) of a parameter, as the op takes them.

        The starting value goes into the parameter's state, and so into checkpoints, if it cannot be
        had from elsewhere. Not before the first step: distributed checkpoints take a state that
        holds anything for a whole one.
        """
        value = self._start.of(name, param)
        if self._start.saved:
            state["anchor"] = value
        return value, self._share(name, param, value.device)

    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        """Put the starting value that a checkpoint holds in place of the one taken before."""
        if name in self._drawn and self._start.saved and "anchor" in state:
            state["anchor"] = self._start.restore(name, state["anchor"])

    def energy(self, name: str, param: Tensor, live: Tensor | None) -> Tensor:
        """Sum of s (p - a)^2 over a parameter, or over its elements where `live` is true: 0-d.

        Of a sharded parameter, over all ranks.
        """
        value = self._start.of(name, param)
        share = self._share(name, param, value.device)
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        squares = (local(param).detach().to(dtype) - value.to(param.device, dtype)).square_()
        if share is not None:
            squares.mul_(share.to(param.device))
        mine = (squares if live is None else squares.mul_(live.view(squares.shape))).sum()
        return add_up(mine, param)

    def _covers(self, name: str, param: Tensor) -> bool:
        if isinstance(self._given, str):
            covered = param.numel() > 0
        elif name in self._given:
            shape = self._given[name].shape
            if shape != param.shape:
                raise ValueError(
                    f"anchor for {name!r} has shape {tuple(shape)}, the parameter has"
                    f" {tuple(param.shape)}: the scores were made for another model"
                )
            given = self._given[name]
            covered = bool(given.any() if isinstance(given, Tensor) else given.count())
        else:
            covered = False
            if param.requires_grad and any(part.startswith("lora_") for part in name.split(".")):
                raise ValueError(
                    f"{name!r} is a trainable LoRA adapter that the anchor does not name: an"
                    " adapter moves its whole base weight, which scores of base weights cannot"
                    " draw back. Merge the adapters (merge_and_unload), or use anchor='uniform'"
                )
        if covered and param.is_complex():
            raise TypeError(f"anchor: {name!r} is {param.dtype}; anchors are for real parameters")
        return covered

    def _measured(self) -> float:
        """The mean of the scores, by which they are divided; 1 for what is 0 or 1 already."""
        mean = 1.0
        if isinstance(self._given, Scores):
            sums = (add_up(local(t).sum(dtype=torch.float64), t) for t in self._given.values())
            total = sum(map(float, sums))
            # Rounded, so that shares do not depend on the order in which a machine adds.
            mean = float(f"{total / max(1, self._given.count()):.7g}")
        if not mean or (isinstance(self._given, SafetyMask) and not self._given.count()):
            raise ValueError(
                "anchor draws nothing: its scores are all zero, or its mask selects no weight; look"
                " at the scores (were there prompts, and responses?), or use anchor='uniform'"
            )
        return mean

    def _share(self, name: str, param: Tensor, device: torch.device) -> Tensor | None:
        """Shares of (this rank's part of) a parameter, on the device of its starting value."""
        if isinstance(self._given, str):
            return None
        key = name, device, getattr(param, "placements", None)
        if key not in self._shares:
            given = self._given[name]
            if isinstance(given, Tensor):
                part = local(given) if is_sharded(given) else cut(given, param)
                self._shares[key] = (part / self._mean).to(device)
            else:
                mask = given.cut(box(param))
                bits = mask.to_bool(device) if mask else local(param).new_zeros(()).bool()
                self._shares[key] = bits.float().expand(local(param).shape)
        return self._shares[key]

    def _digest(self, names: Iterable[str]) -> str:
        """Hash of what draws these parameters: the scores as given, the same on every device."""
        if isinstance(self._given, str):
            return f"uniform {artifact.digest(sorted(names))}"
        if isinstance(self._given, SafetyMask):
            chosen = {name: self._given[name] for name in names}
            return SafetyMask(chosen).digest() if chosen else artifact.digest([])
        scores = {name: self._given[name] for name in names}
        return artifact.fingerprint(scores)["weights"]


def check_options(options: dict[str, Any]) -> None:
    """ValueError unless anchor_strength and anchor_mode, of the arguments or a group, are valid."""
    strength, mode = options["anchor_strength"], options["anchor_mode"]
    if isinstance(strength, Tensor) or not 0 <= strength < math.inf:
        raise ValueError(f"anchor_strength is {strength!r}; it must be a finite number, 0 or more")
    if mode not in MODES:
        raise ValueError(f"anchor_mode is {mode!r}; it must be one of {', '.join(MODES)}")
