"""One run of a comparison: one arm, one seed, its whole curve, in one file."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safeopt import artifact, evaluate
from safeopt.compare.arms import AnyArm
from safeopt.compare.at_hand import AtHand
from safeopt.compare.curve import measure
from safeopt.compare.directions import Directions
from safeopt.compare.judged import Asked, described
from safeopt.compare.kinds import Context
from safeopt.compare.lora import as_measured, with_adapters
from safeopt.compare.memory import PeakMemory
from safeopt.compare.regions import Regions
from safeopt.compare.sets import Sets
from safeopt.compare.settings import Settings
from safeopt.compare.spaces import TASK_ROWS, Spaces
from safeopt.data import Batch, batches
from safeopt.mask import SafetyMask
from safeopt.scores import Scores
from safeopt.train import train

OnStep = Callable[[int, float], None]

FORMAT = 2  # of a run's file: goes up when a point of the curve gets another number
FILE_WORDS = {":": "-", "|": "-or-", "&": "-and-", "+": "-with-"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every run of a comparison starts from; the model is copied, never changed.

    ``fingerprint``: of the model (see artifact.fingerprint). ``critical``: the reference mask of
    the drift. ``first``: the curve's point at step 0, measured once. ``directions``: None without
    an unaligned model. ``judges``: those beside the phrase list.
    """

    model: torch.nn.Module
    tokenizer: Any
    fingerprint: dict[str, str]
    scores: Scores
    critical: SafetyMask
    sets: Sets
    settings: Settings
    first: dict[str, Any]
    directions: Directions | None = None
    regions: Regions | None = None
    spaces: Spaces | None = None
    judges: tuple[Asked, ...] = ()

    def task_batches(self, seed: int) -> list[Batch]:
        """Batches of the first rows that a run of this seed trains on."""
        return batches(
            self.tokenizer,
            self.sets.training(seed)[:TASK_ROWS],
            self.settings.batch_size,
            max_length=self.settings.max_length,
        )


def settings_of(start: Start, arm: AnyArm, seed: int) -> dict[str, Any]:
    """Everything that decides the numbers of a run."""
    sets, shared = start.sets.describe(), start.settings.for_run()
    if not arm.kind.at_hand:  # it never sees the refusals, so others change nothing
        sets.pop("refusals", None)
        del shared["refusal_share"]
    return {
        "format": FORMAT,
        "arm": str(arm),
        "seed": seed,
        "scenario": str(start.sets.scenario),
        "model": start.fingerprint,
        "sets": sets,
        "phrases": evaluate.phrases_hash(),
        **({} if start.directions is None else {"unaligned": start.directions.fingerprint}),
        **({"judges": described(start.judges)} if start.judges else {}),
        **shared,
    }


def settings_hash(settings: dict[str, Any]) -> str:
    """sha256 of the settings, by which a finished run is recognised."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def run_file(folder: Path, arm: AnyArm, seed: int) -> Path:
    """Where the run of an arm and seed is kept."""
    name = str(arm).translate({ord(sign): word for sign, word in FILE_WORDS.items()})
    return folder / f"{name}-seed{seed}.json"


def finished_run(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The run in the file if it was made with the wanted settings, else None.

    Raises:
        ValueError: the file is not a run.
    """
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text("utf-8"))
        return run if run["hash"] == settings_hash(wanted) else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a run of safeopt compare ({error}); delete it and start again"
        ) from error


def run_arm(
    start: Start, arm: AnyArm, seed: int, path: Path, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Train a copy of the start model with one arm, measure on the way, write the run to ``path``.

    Returns what the file holds: the settings, their hash, the arm's league, its budget, the mask,
    and ``curve``, one entry per measured step with the mean training loss since the last and the
    seconds trained so far (measuring excluded). The budget counts steps and rows of training, and
    apart from them the rows of the refusal set that were used, and what went through the model
    beside the training rows.

    Raises:
        ValueError: as the arm, the optimizer and ``train`` raise; nothing is written then.
    """
    settings = settings_of(start, arm, seed)
    memory = PeakMemory(next(start.model.parameters()).device)
    model = with_adapters(copy.deepcopy(start.model), start.settings, seed)
    context = _context(start, model, seed, arm.kind.at_hand)
    plan = arm.plan(context)
    rows = start.sets.training(seed)
    if plan.rows is not None:
        rows = plan.rows(rows)
    curve = [start.first | {"step": 0, "loss": None, "seconds": 0.0}]
    losses: list[float] = []
    clock = _Clock()

    def after_step(step: int, loss: float) -> None:
        losses.append(loss)
        if start.settings.measured_at(step):
            clock.pause()
            point = measure(
                as_measured(model, plan),
                start.tokenizer,
                start.sets,
                start.settings,
                start.model,
                start.critical,
                start.directions.of("safelora") if start.directions else None,
                start.judges,
            )
            mean = sum(losses) / len(losses)
            curve.append(point | {"step": step, "loss": mean, "seconds": clock.seconds})
            losses.clear()
            clock.go_on()
        if on_step is not None:
            on_step(step, loss)

    made = train(
        model,
        start.tokenizer,
        rows,
        plan.optimizer,
        start.settings.train_config(seed),
        on_step=after_step,
        controller=plan.controller,
        progress=False,
    )
    run = {
        "hash": settings_hash(settings),
        "settings": settings,
        "control": arm.kind.control,
        "league": arm.kind.league,
        "budget": _budget(start.settings, context.refusals_at_hand, len(made)),
        "controller": getattr(plan.controller, "log", None),
        "mask": _describe(plan.mask),
        "trained": _trained(plan.optimizer),
        "seconds": clock.seconds,
        "memory": memory.read() | {"optimizer_state_bytes": _state_bytes(plan.optimizer)},
        "curve": curve,
    }
    write_json(path, run)
    return run


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OSError: the folder cannot be written; an older file is untouched then.
    """
    with artifact.atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


def _context(start: Start, model: torch.nn.Module, seed: int, at_hand: bool) -> Context:
    settings = start.settings
    refusals = None
    if at_hand:
        refusals = AtHand(
            start.sets.refusals,
            model,
            start.tokenizer,
            seed=seed,
            share=settings.refusal_share,
            max_length=settings.max_length,
        )
    return Context(
        model=model,
        scores=start.scores,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        seed=seed,
        directions=start.directions,
        regions=start.regions,
        refusals_at_hand=refusals,
        spaces=start.spaces,
        task=lambda: start.task_batches(seed),
    )


def _budget(settings: Settings, refusals: AtHand | None, steps: int) -> dict[str, int]:
    return {
        "steps": steps,
        "rows": steps * settings.batch_size,
        "refusals_at_hand": len(refusals.used) if refusals else 0,
        "rows_beside": refusals.forwards if refusals else 0,
    }


class _Clock:
    """Seconds since it was made, less the pauses."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()


def _describe(mask: SafetyMask | None) -> dict[str, Any] | None:
    return (
        None
        if mask is None
        else {"selected": mask.count(), "density": mask.density(), "digest": mask.digest()}
    )


def _trained(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    given = [p for group in optimizer.param_groups for p in group["params"]]
    asleep = sum(p.numel() for p in given if not p.requires_grad)  # under LoRA, the base weights
    total = sum(p.numel() for p in given)
    live = optimizer.live_count()[0] if hasattr(optimizer, "live_count") else total - asleep
    return {"live": live, "total": total}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)
    )
