"""What may be done inside a training step, and after it, beside what the optimizer does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from safeopt.data import Batch


class Controller:
    """Hooks of `safeopt.train.train`, in the order of a step; here each of them does nothing.

    A step is: the task's loss, `loss`, backward, `gradients`, masking and clipping of gradients,
    the optimizer's step, `after`. A controller holds what it needs: the model, the optimizer (whose
    groups it may change, as `group["anchor_strength"]`), rows of its own. What it does must depend
    on the step, the weights and its state alone, or a resumed run ends elsewhere.
    """

    def loss(self, step: int, batch: Batch, loss: Tensor) -> Tensor:
        """The loss to descend, from that of the task, a scalar: with a term added, for example.

        The losses that `train` returns, and its check that they are finite, are of the task's.
        """
        return loss

    def gradients(self, step: int) -> None:
        """May change `p.grad` in place; frozen elements are masked and the norm clipped later."""

    def after(self, step: int, loss: float) -> None:
        """May change the optimizer's groups or the weights; loss is the task's, nats per token."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of it: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
