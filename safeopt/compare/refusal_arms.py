"""Arms with a small refusal set at hand: mixed into the data, or a probe that steers the anchor."""

from __future__ import annotations

from typing import Any

import torch

from safeopt.compare.at_hand import AtHand
from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.compare.mask_arms import MASK_ARMS
from safeopt.controller import Controller

EVERY = 5  # steps from one look at the probe to the next


def at_hand(context: Context) -> AtHand:
    """The refusal set of the arm's context."""
    assert context.refusals_at_hand is not None  # compare refuses the arm otherwise
    return context.refusals_at_hand


def _mix(context: Context, count: float) -> Plan:
    refusals, plan = at_hand(context), MASK_ARMS["adamw"].make(context, 1.0)
    refusals.draw(int(count))
    return Plan(plan.optimizer, rows=lambda rows: refusals.mixed(rows, int(count)))


class AnchorProbe(Controller):
    """Raises ``anchor_strength`` as the refusal margin on a probe falls below where it began.

    The strength is LAMBDA (1 + fall), the fall in nats and 0 where the margin has not fallen; it is
    set anew every EVERY steps. ``log`` holds step, margin and strength of each look.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, refusals: AtHand, strength: float) -> None:
        self._optimizer, self._refusals, self._least = optimizer, refusals, strength
        self.log = [{"step": 0, "margin": refusals.margin(), "strength": strength}]

    def after(self, step: int, loss: float) -> None:
        """Measure the margin and set the strength, when it is time."""
        if step % EVERY:
            return
        margin = self._refusals.margin()
        strength = self._least * (1 + max(0.0, self.log[0]["margin"] - margin))
        for group in self._optimizer.param_groups:
            group["anchor_strength"] = strength
        self.log.append({"step": step, "margin": margin, "strength": strength})

    def state_dict(self) -> dict[str, Any]:
        """The log; the strength itself stands in the optimizer's groups."""
        return {"log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a log."""
        self.log = [dict(entry) for entry in state["log"]]


def _anchor_probe(context: Context, strength: float) -> Plan:
    plan = MASK_ARMS["anchor"].make(context, strength)
    controller = AnchorProbe(plan.optimizer, at_hand(context), strength)
    return Plan(plan.optimizer, plan.mask, controller=controller)


REFUSAL_ARMS: dict[str, Kind] = {
    "mix": Kind("AdamW, VALUE refusals mixed in, a stated share of all rows", _mix, "count",
                trains="both", at_hand=True),
    "anchor-probe": Kind("anchor, whose strength grows from VALUE as the refusal margin of a probe"
                         " falls", _anchor_probe, "strength", draws=True, at_hand=True),
}  # fmt: skip
