"""A Trainer callback that proves that protection is active, stays so, and logs what it does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from safeopt.integrations.transformers.drift import Drift
from safeopt.integrations.transformers.protection import (
    require_loadable,
    require_plain_checkpoint,
    require_protection,
)
from safeopt.optim import AsFTAdamW, SafeAdamW
from safeopt.optim.frozen import checksums
from safeopt.optim.gradients import LiveGradients, live_gradient_norm
from safeopt.optim.gradients import live_gradients as hook_gradients

NAME = "safeopt/"


class SafeOptCallback(TrainerCallback, ExportableState):
    """Watches over a run: is anything protected, does it hold, what does it cost.

    When training begins: is the trainer's optimizer ours (or the model under our parametrization),
    does it protect anything, and are its parameters those of the model. Every `check_every` steps,
    and at the end: do the frozen elements have the bits they had at the start. At every save: do
    the checkpoint's safetensors load into a plain model. Each is a RuntimeError where it fails.

    With the loss it logs

        safeopt/frozen_share     share of the optimizer's elements that cannot move
        safeopt/live_grad_norm   norm of the gradients of live elements in the last step, after
                                 clipping, as the optimizer sees them
        safeopt/drift            ||w - w_start|| / ||w_start|| of the parameters that train, since
                                 training began or was resumed
        safeopt/penalty          AsFTAdamW: lam * sum ||(I - C) dW||_F^2
        safeopt/anchor_penalty   anchor=: strength * sum of s (w - a)^2

    as far as they apply. All of this reaches `state.log_history` and the console. What `report_to`
    names is told before the callbacks of a user are asked: with SafeOptTrainerMixin it gets the
    figures too, and with a plain trainer after `SafeOptCallback().attach(trainer)`.

    Args:
        check_every: steps between two checks; 0 checks at the end only. A check reads the frozen
            weights once, on their device, and keeps 8 bytes per parameter.
        live_gradients: zero the gradients of frozen elements in backward, so that Trainer clips,
            and logs as `grad_norm`, the norm of the live ones (`safeopt.optim.live_gradients`).
        drift: log it; costs a copy of the trained weights in CPU memory.

    Raises:
        ValueError: check_every is negative.
    """

    def __init__(
        self, check_every: int = 100, live_gradients: bool = False, drift: bool = False
    ) -> None:
        if check_every < 0:
            raise ValueError(f"check_every is {check_every}; give a number of steps, or 0")
        self.check_every = check_every
        self.live_gradients = live_gradients
        self.drift = drift
        self.checksums: dict[str, int] | None = None
        self._first = False
        self._optimizer: SafeAdamW | None = None
        self._hooks: LiveGradients | None = None
        self._norm: Tensor | None = None
        self._share = 0.0
        self._drift: Drift | None = None

    def attach(self, trainer: Any) -> SafeOptCallback:
        """Enter a trainer in front of its other callbacks, so that `report_to` gets the figures."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._first = True
        return self

    def state(self) -> dict[str, Any]:
        """Arguments and the checksums of the start, for trainer_state.json.

        Trainer gives them back where `restore_callback_states_from_checkpoint` is set; a resumed
        run is then held to the weights with which the first one started.
        """
        arguments = ("check_every", "live_gradients", "drift")
        return {
            "args": {key: getattr(self, key) for key in arguments},
            "attributes": {"checksums": None if self._sharded() else self.checksums},
        }

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Check that protection is active, and take the reference of later checks."""
        self._end()
        self._optimizer = ours = require_protection(optimizer, model)
        require_loadable(model)
        if ours is None:
            return
        start, self.checksums = self.checksums if state.global_step else None, checksums(ours)
        if start is not None and start != self.checksums:
            self.checksums, now = start, self.checksums
            self._moved(now, "the checkpoint was taken, or since")
        live, every = ours.live_count()
        self._share = 1 - live / every
        if self.live_gradients:
            self._hooks = hook_gradients(ours)
        if self.drift:
            self._drift = Drift(ours)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the gradients, where this step is to be logged."""
        self._norm = None
        if self._optimizer is not None and _logs(args, state.global_step + 1):
            self._norm = live_gradient_norm(self._optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the frozen elements, every `check_every` steps."""
        if self.check_every and state.global_step % self.check_every == 0:
            self._check(f"step {state.global_step}")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the figures to what is logged."""
        if logs is None or f"{NAME}frozen_share" in logs:
            return
        figures = self.add_figures(logs)
        if not figures:
            return
        if state.log_history:
            state.log_history[-1].update(figures)
        if not self._first and args.report_to:
            self._first = True  # warn once
            warnings.warn(
                f"{', '.join(args.report_to)} will not get the figures of SafeOptCallback, as it is"
                " asked after them: use SafeOptTrainerMixin, or SafeOptCallback().attach(trainer)",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that the checkpoint is one of a plain model."""
        if state.is_world_process_zero:
            require_plain_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the frozen elements once more, and take the hooks off."""
        self._check("the end of training")
        self._end()

    def add_figures(self, logs: dict[str, Any]) -> dict[str, float]:
        """Put the figures into a log that has a loss in it, and return them; all ranks call it."""
        if self._optimizer is None or "loss" not in logs:
            return {}
        figures = {f"{NAME}frozen_share": self._share}
        if self._norm is not None:
            figures[f"{NAME}live_grad_norm"] = float(self._norm)
        if self._drift is not None:
            figures[f"{NAME}drift"] = self._drift.now()
        if isinstance(self._optimizer, AsFTAdamW):
            figures[f"{NAME}penalty"] = float(self._optimizer.penalty())
        if any(group.get("anchor_strength") for group in self._optimizer.param_groups):
            figures[f"{NAME}anchor_penalty"] = float(self._optimizer.anchor_penalty())
        logs.update(figures)
        return figures

    def _check(self, when: str) -> None:
        if self._optimizer is None or self.checksums is None:
            return
        now = checksums(self._optimizer)
        if now != self.checksums:
            self._moved(now, when)

    def _moved(self, now: dict[str, int], when: str) -> None:
        start = self.checksums or {}
        wrong = [name for name in sorted(start | now) if start.get(name) != now.get(name)]
        raise RuntimeError(
            f"frozen elements of {len(wrong)} parameters are not what they were when training"
            f" began, found at {when}: {', '.join(wrong[:5])}. Something other than the optimizer"
            " writes into the weights (a callback, an averaging of weights, load_state_dict, an"
            " adapter that was merged), or the optimizer was replaced"
        )

    def _sharded(self) -> bool:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return any(hasattr(p, "device_mesh") for group in groups for p in group["params"])

    def _end(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._drift = self._norm = self._optimizer = None


def _logs(args: Any, step: int) -> bool:
    """Whether Trainer may log after this step. Other callbacks may ask for more; they miss out."""
    if getattr(args.logging_strategy, "value", args.logging_strategy) != "steps":
        return True
    return (step == 1 and args.logging_first_step) or step % args.logging_steps == 0
