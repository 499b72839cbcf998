"""The arms of a comparison: each name stands for an optimizer, and what it protects."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from safeopt.compare.direction_arms import DIRECTION_ARMS
from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.compare.mask_arms import MASK_ARMS

ARMS: dict[str, Kind] = {**MASK_ARMS, **DIRECTION_ARMS}
"""All arms by name; a later method adds its entry to one of the two tables, or a third."""


@dataclass(frozen=True)
class Arm:
    """One arm with its value, for example ``spa`` with 0.01; ``str(arm)`` is ``"spa:0.01"``."""

    name: str
    value: float | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``"adamw"`` or ``"spa:0.01"``.

        Raises:
            ValueError: unknown name (with near misses), or a value that is missing, superfluous or
                out of range.
        """
        name, colon, raw = text.partition(":")
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, 3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ARMS)}"
            raise ValueError(f"arm {text!r} does not exist; {hint}")
        takes = ARMS[name].takes
        if not takes:
            if colon:
                raise ValueError(f"arm {text!r}: {name} takes no value; write {name}")
            return cls(name, None)
        try:
            value = float(raw)
        except ValueError:
            raise ValueError(
                f"arm {text!r} needs a number after the colon, for example {name}:0.01"
            ) from None
        if not 0 < value < (1 if takes == "fraction" else float("inf")):
            allowed = "a fraction in (0, 1)" if takes == "fraction" else f"a {takes} above 0"
            raise ValueError(f"arm {text!r}: the value must be {allowed}")
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value:.12g}"

    @property
    def kind(self) -> Kind:
        """The arm's entry in the table ``ARMS``."""
        return ARMS[self.name]

    def plan(self, context: Context) -> Plan:
        """Make the mask and the optimizer for ``context.model``."""
        return self.kind.make(context, 1.0 if self.value is None else self.value)


def parse_arms(texts: list[str]) -> list[Arm]:
    """Read the names of all arms of a comparison, in order.

    Raises:
        ValueError: as ``Arm.parse``; an arm given twice; no ``adamw``, against which the others are
            read.
    """
    arms = [Arm.parse(text) for text in texts]
    for arm in arms:
        if arms.count(arm) > 1:
            raise ValueError(f"arm {arm} is given {arms.count(arm)} times; give each arm once")
    if Arm("adamw", None) not in arms:
        raise ValueError(
            f"arms {' '.join(map(str, arms))} lack adamw, against which the others are read; add it"
        )
    return arms


def require_possible(arms: list[Arm], lora: bool, unaligned: bool) -> None:
    """Check that every arm can run: on LoRA adapters or all weights, with or without a direction.

    Raises:
        ValueError: one cannot; which could is said.
    """
    trained = "lora" if lora else "full"
    able = [name for name, kind in ARMS.items() if kind.trains in (trained, "both")]
    for arm in arms:
        if arm.name not in able:
            what = "LoRA adapters" if lora else "all weights"
            raise ValueError(
                f"arm {arm} is not defined where {what} are trained; there are {', '.join(able)}"
            )
        if arm.kind.directed and not unaligned:
            raise ValueError(
                f"arm {arm} reads a direction; give the unaligned model too (unaligned=,"
                " --unaligned)"
            )
