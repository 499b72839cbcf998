"""A small training loop that resumes bit for bit; any other works, only the optimizer matters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from safeopt import checkpoint
from safeopt.controller import Controller
from safeopt.data import Row, collate, encode


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the course of training, next to model, rows and optimizer.

    steps, warmup_steps (linear, from lr / warmup_steps to lr) and save_every (0: at the end only)
    count optimizer steps; batch_size counts rows; max_length is in tokens; max_grad_norm clips the
    Euclidean norm (None: no clipping). Raises ValueError for values outside their range.
    """

    steps: int
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 1,
            "batch_size": 1,
            "max_length": 2,
            "warmup_steps": 0,
            "save_every": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; it must be positive, or None (off)"
            )


def order(n: int, config: TrainConfig) -> Iterator[list[int]]:
    """The rows of each step: shuffled epochs end to end, fixed by (n, seed, batch_size) alone."""
    position = 0
    waiting: list[int] = []
    for _ in range(config.steps):
        while len(waiting) < config.batch_size:
            shuffle = torch.Generator().manual_seed(_seed(config.seed, "epoch", position // n))
            waiting += torch.randperm(n, generator=shuffle).tolist()
            position += n
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]


def _seed(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    controller: Controller | None = None,
    made_with: Mapping[str, str] | None = None,
    progress: bool = True,
) -> list[float]:
    """Fine-tune a causal language model on responses; the loss of every step, in nats per token.

    Clipping is on live entries: an optimizer with mask_grads_() zeroes the gradients of its frozen
    elements first, so these neither count in the norm nor shrink the step of the others.
    on_step(step, loss) is called after each step; step counts from 1. Dropout and data order depend
    on (seed, step) alone. A controller acts inside the steps; checkpoints hold its state.

    checkpoint_dir keeps the newest checkpoint, made every save_every steps and at the end, written
    beside the old one and renamed. resume=True goes on from it (or starts, when there is none) and
    ends where an uninterrupted run ends, bit for bit
    (tests/test_train.py::test_killed_run_resumes_bit_for_bit); steps may then be raised.
    made_with, digests by name of what the state of the optimizer does not tell, as that of an input
    space, must be those of the checkpoint too.

    Raises ValueError for no rows, a row without response or with too long a prompt, other data or
    settings than the checkpoint's, checkpoints in the way when resume is False; FloatingPointError
    with the step when loss or gradient is not finite (the checkpoint before it stays).
    """
    _check(rows, config, checkpoint_dir, resume)
    plan = list(order(len(rows), config))
    used = sorted({i for indices in plan for i in indices})
    encoded = {i: encode(tokenizer, rows[i], config.max_length) for i in used}
    warmup = _warmup(optimizer, config.warmup_steps)
    identity = checkpoint.identity(rows, config, made_with)
    losses: list[float] = []
    control = controller or Controller()
    if checkpoint_dir is not None and resume:
        losses = checkpoint.restore(checkpoint_dir, identity, model, optimizer, warmup, control)
    with _training(model), _bar(config.steps, len(losses), progress) as bar:
        for step in range(len(losses) + 1, config.steps + 1):
            torch.manual_seed(_seed(config.seed, "step", step))
            batch = collate(tokenizer, [encoded[i] for i in plan[step - 1]])
            losses.append(_step(model, batch, optimizer, config.max_grad_norm, step, control))
            control.after(step, losses[-1])
            if warmup is not None:
                warmup.step()
            bar(losses[-1])
            due = step == config.steps or (config.save_every and step % config.save_every == 0)
            if checkpoint_dir is not None and due:
                checkpoint.save(checkpoint_dir, identity, losses, model, optimizer, warmup, control)
            if on_step is not None:
                on_step(step, losses[-1])
    return losses


@contextmanager
def _training(model: Any) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)


def _step(
    model: Any,
    batch: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    step: int,
    controller: Controller,
) -> float:
    loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss of step {step} is {value}; no step was made. Lower lr, or check the data"
        )
    model.zero_grad(set_to_none=True)
    controller.loss(step, batch, loss).backward()
    controller.gradients(step)
    mask_grads = getattr(optimizer, "mask_grads_", None)
    if mask_grads is not None:
        mask_grads()
    live = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(live, max_grad_norm or math.inf)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm of step {step} is {norm}; the step was not made. Lower lr, or "
            "check the data"
        )
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return value


def _check(
    rows: Sequence[Row], config: TrainConfig, checkpoint_dir: str | Path | None, resume: bool
) -> None:
    if not rows:
        raise ValueError("rows is empty: there is nothing to train on")
    for i, row in enumerate(rows):
        if "response" not in row:
            raise ValueError(f"rows[{i}] has no response to learn: {row['instruction'][:80]!r}")
    if checkpoint_dir is None:
        if resume or config.save_every:
            raise ValueError(
                f"resume={resume}, save_every={config.save_every} need a checkpoint_dir; give one"
            )
    elif not resume and checkpoint.newest(checkpoint_dir) is not None:
        raise ValueError(
            f"checkpoint_dir {checkpoint_dir} holds the checkpoints of an earlier run: pass "
            "resume=True to go on from it, or name another folder"
        )


def _warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    if warmup_steps == 0:
        return None
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / warmup_steps)
    )


@contextmanager
def _bar(steps: int, done: int, wanted: bool) -> Iterator[Callable[[float], None]]:
    """A tqdm bar that is told each loss; silence where tqdm is not installed."""
    if not wanted or find_spec("tqdm") is None:
        yield lambda loss: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, desc="train", unit="step", leave=False) as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield advance
