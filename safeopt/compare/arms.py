"""The arms of a comparison: each name stands for an optimizer, and what it protects."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_
from typing import Any, TypeAlias

from safeopt.compare.direction_arms import DIRECTION_ARMS
from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.compare.mask_arms import MASK_ARMS, frozen
from safeopt.compare.refusal_arms import REFUSAL_ARMS
from safeopt.compare.region_arms import REGION_ARMS
from safeopt.compare.space_arms import SPACE_ARMS
from safeopt.mask import SafetyMask

ARMS: dict[str, Kind] = {
    **MASK_ARMS, **REGION_ARMS, **DIRECTION_ARMS, **SPACE_ARMS, **REFUSAL_ARMS
}  # fmt: skip
"""All arms by name; a later method adds its entry to one of the tables, or a new one."""


@dataclass(frozen=True)
class Arm:
    """One arm with its value, for example ``spa`` with 0.01; ``str(arm)`` is ``"spa:0.01"``."""

    name: str
    value: float | tuple[int, int] | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``"adamw"``, ``"spa:0.01"`` or ``"sppft:6-14"``.

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
        if takes == "layers":
            found = re.fullmatch(r"(\d+)-(\d+)", raw)
            if not found:
                raise ValueError(
                    f"arm {text!r} needs the first and last layer, for example {name}:6-14"
                )
            return cls(name, (int(found[1]), int(found[2])))
        try:
            value = float(raw)
        except ValueError:
            raise ValueError(
                f"arm {text!r} needs a number after the colon, for example {name}:0.01"
            ) from None
        if not 0 < value < (1 if takes == "fraction" else float("inf")):
            allowed = "a fraction in (0, 1)" if takes == "fraction" else f"a {takes} above 0"
            raise ValueError(f"arm {text!r}: the value must be {allowed}")
        if takes == "count" and value != int(value):
            raise ValueError(f"arm {text!r}: the value must be a whole number of 1 or more")
        return cls(name, value)

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        if isinstance(self.value, tuple):
            return f"{self.name}:{self.value[0]}-{self.value[1]}"
        return f"{self.name}:{self.value:.12g}"

    @property
    def kind(self) -> Kind:
        """The arm's entry in the table ``ARMS``."""
        return ARMS[self.name]

    def plan(self, context: Context) -> Plan:
        """Make the mask and the optimizer for ``context.model``."""
        return self.kind.make(context, 1.0 if self.value is None else self.value)


@dataclass(frozen=True)
class Joined:
    """Arms that freeze, as one: ``"spa:0.1|ssah:0.075"`` freezes what either does, with ``&`` both.

    After ``+`` comes an arm that draws weights: ``"spa:0.1+anchor:0.3"`` draws those that are not
    frozen.
    """

    freezing: tuple[Arm, ...]
    sign: str
    drawing: Arm | None

    @classmethod
    def parse(cls, text: str) -> Joined:
        """Read a composition.

        Raises:
            ValueError: ``|`` and ``&`` in one, an arm that does not freeze, or after ``+`` one that
                draws no weights; or as ``Arm.parse``.
        """
        first, plus, last = text.partition("+")
        if "|" in first and "&" in first:
            raise ValueError(f"arm {text!r} has both | and &, which could be read two ways")
        sign = "&" if "&" in first else "|"
        parts = tuple(Arm.parse(part) for part in first.split(sign))
        drawing = Arm.parse(last) if plus else None
        for part in parts:
            if part.kind.freezes is None:
                able = ", ".join(name for name, kind in ARMS.items() if kind.freezes)
                raise ValueError(
                    f"arm {text!r}: {part.name} freezes nothing; those that do: {able}"
                )
        if drawing and not drawing.kind.draws:
            able = ", ".join(name for name, kind in ARMS.items() if kind.draws)
            raise ValueError(
                f"arm {text!r}: {drawing.name} draws no weights to a place; those that do: {able}"
            )
        return cls(parts, sign, drawing)

    def __str__(self) -> str:
        return self.sign.join(map(str, self.freezing)) + (
            f"+{self.drawing}" if self.drawing else ""
        )

    @property
    def kind(self) -> Kind:
        """What the parts need, as one entry; it is nobody's control."""
        kinds = [arm.kind for arm in (*self.freezing, self.drawing) if arm]
        return Kind(
            str(self),
            lambda context, _: self.plan(context),
            directed=any(kind.directed for kind in kinds),
            located=any(kind.located for kind in kinds),
            at_hand=any(kind.at_hand for kind in kinds),
        )

    def plan(self, context: Context) -> Plan:
        """Make the masks, join them, and make the optimizer for ``context.model``.

        Raises:
            ValueError: the masks have no weight in common.
        """
        masks: list[Any] = [
            arm.kind.freezes(context, arm.value) for arm in self.freezing if arm.kind.freezes
        ]
        mask: SafetyMask = reduce(and_ if self.sign == "&" else or_, masks)
        if not mask.count():
            raise ValueError(f"arm {self} freezes nothing: the masks have no weight in common")
        if self.drawing is None:
            return frozen(context, mask)
        return self.drawing.plan(replace(context, freeze=mask))


@dataclass(frozen=True)
class Mixed:
    """Any arm, with refusals mixed into its rows: ``"anchor:0.3+mix:100"``."""

    arm: Arm | Joined
    mix: Arm

    def __str__(self) -> str:
        return f"{self.arm}+{self.mix}"

    @property
    def kind(self) -> Kind:
        """That of the arm, in the league of those with refusals at hand."""
        return replace(self.arm.kind, at_hand=True)

    def plan(self, context: Context) -> Plan:
        """The plan of the arm, with the rows of the mixture."""
        return replace(self.arm.plan(context), rows=self.mix.plan(context).rows)


AnyArm: TypeAlias = Arm | Joined | Mixed


def parse_arm(text: str) -> AnyArm:
    """Read one arm, or several joined by ``|``, ``&`` and ``+``."""
    first, plus, last = text.rpartition("+")
    if plus and last.partition(":")[0] == "mix":
        if re.search(r"(^|\+)mix:", first):
            raise ValueError(f"arm {text!r} mixes twice; give one mix, of all the refusals wanted")
        return Mixed(_parse_unmixed(first), Arm.parse(last))
    return _parse_unmixed(text)


def _parse_unmixed(text: str) -> Arm | Joined:
    return Joined.parse(text) if set(text) & set("|&+") else Arm.parse(text)


def parse_arms(texts: list[str]) -> list[AnyArm]:
    """Read the names of all arms of a comparison, in order.

    Raises:
        ValueError: as ``parse_arm``; an arm given twice; no ``adamw``, against which the others are
            read.
    """
    arms = [parse_arm(text) for text in texts]
    for arm in arms:
        if arms.count(arm) > 1:
            raise ValueError(f"arm {arm} is given {arms.count(arm)} times; give each arm once")
    if Arm("adamw", None) not in arms:
        raise ValueError(
            f"arms {' '.join(map(str, arms))} lack adamw, against which the others are read; add it"
        )
    return arms


def require_possible(
    arms: list[AnyArm],
    *,
    lora: bool,
    unaligned: bool,
    utility: bool,
    refusals: int = 0,
) -> None:
    """Check that every arm can run: on LoRA adapters or all weights, with what is at hand.

    Raises:
        ValueError: one cannot; which could, or what it needs, is said.
    """
    trained = "lora" if lora else "full"
    for arm in arms:
        if arm.kind.trains not in (trained, "both"):
            what = "LoRA adapters" if lora else "all weights"
            able = [name for name, kind in ARMS.items() if kind.trains in (trained, "both")]
            raise ValueError(
                f"arm {arm} is not defined where {what} are trained; there are {', '.join(able)}"
            )
        if arm.kind.directed and not unaligned:
            raise ValueError(
                f"arm {arm} reads a direction; give the unaligned model too (unaligned=,"
                " --unaligned)"
            )
        if arm.kind.located and not utility:
            raise ValueError(
                f"arm {arm} sets safety against utility; give harmless rows with answers too"
                " (Sets(utility=), --utility)"
            )
        wanted = _refusals_wanted(arm)
        if wanted > refusals:
            raise ValueError(
                f"arm {arm} has refusals at hand while it trains and needs {wanted:g} of them;"
                f" there are {refusals}: give harmful rows with refusals (Sets(refusals=),"
                " --refusals)"
            )


def _refusals_wanted(arm: AnyArm) -> float:
    counted = arm.mix if isinstance(arm, Mixed) else arm
    if isinstance(counted, Arm) and isinstance(counted.value, float) and counted.name == "mix":
        return counted.value
    return float(arm.kind.at_hand)
