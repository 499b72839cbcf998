"""The settings every arm of a comparison shares."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safeopt.compare.scoring import METHODS
from safeopt.train import TrainConfig

OBJECTIVES = ("refusal_nll", "margin")
SKILLS = ("accuracy", "tokens")
READING = ("equal_skill", "skill")  # how finished curves are read


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Budget, recipe and evaluation of every arm; lengths are in tokens.

    ``steps`` optimizer steps of ``batch_size`` rows; evaluation at step 0, every ``eval_every``
    steps and at the end. ``weight_decay`` is 0 as in the ESI recipe. ``fraction`` of the scored
    weights is the reference mask, by which drift is split into critical and other weights in every
    arm alike. ``equal_skill`` is the share of plain AdamW's final skill at which the arms are read
    beside each other; ``skill`` says what that is, higher = better: "accuracy", the share of test
    rows whose greedy answer is right (labels; of GSM8K the final number), or "tokens", the share of
    the test answers' tokens that the model finds likeliest, the right answer so far given (texts).
    The scores are of ``method`` (see METHODS in scoring.py) and
    ``objective``, refusal_nll or margin. ``lora_rank`` above 0 trains LoRA adapters on the layers
    named in ``lora_targets`` instead of all weights, scaled by ``lora_alpha`` / ``lora_rank``.
    ``direction_rank`` is that of the arms that hold or leave free a subspace. ``refusal_share`` of
    the training rows are refusals in the arms that mix them in.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 300
    eval_every: int = 50
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 8
    max_length: int = 256
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    max_new_tokens: int = 24
    eval_batch_size: int = 64
    method: str = "esi"
    objective: Literal["refusal_nll", "margin"] = "refusal_nll"
    fraction: float = 0.01
    equal_skill: float = 0.95
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    direction_rank: int = 32
    skill: Literal["accuracy", "tokens"] = "accuracy"
    refusal_share: float = 0.1

    def __post_init__(self) -> None:
        self.train_config(seed=0)
        for name in ("eval_every", "max_new_tokens", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; it must be a finite number, 0 or more"
            )
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}; it must be in (0, 1)")
        if not 0 < self.equal_skill <= 1:
            raise ValueError(f"equal_skill is {self.equal_skill}; it must be in (0, 1]")
        if self.lora_rank < 0 or not self.lora_alpha > 0:
            raise ValueError(
                f"lora_rank is {self.lora_rank} and lora_alpha {self.lora_alpha}; give a rank of 0"
                " (all weights are trained) or more, and an alpha above 0"
            )
        if not 0 < self.refusal_share < 1:
            raise ValueError(f"refusal_share is {self.refusal_share}; it must be in (0, 1)")
        known = {"method": METHODS, "objective": OBJECTIVES, "skill": SKILLS}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        METHODS[self.method](self.objective)

    def measured_at(self, step: int) -> bool:
        """Whether the curve has a point after this step."""
        return step % self.eval_every == 0 or step == self.steps

    def for_run(self) -> dict[str, Any]:
        """The settings that decide a run's numbers; another reading of them needs no new run."""
        given = {name: value for name, value in asdict(self).items() if name not in READING}
        return given | {"lora_targets": list(self.lora_targets)}  # as JSON will have it

    def train_config(self, seed: int) -> TrainConfig:
        """What the training loop needs of these settings."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            max_grad_norm=self.max_grad_norm,
            warmup_steps=self.warmup_steps,
        )
