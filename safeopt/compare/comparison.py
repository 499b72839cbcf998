"""The comparison: scores once, then every arm and seed that is not there yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeopt import artifact
from safeopt.compare.arms import AnyArm, parse_arms, require_possible
from safeopt.compare.curve import measure
from safeopt.compare.directions import Directions, harmful_direction
from safeopt.compare.judged import Asked, described, require_judges
from safeopt.compare.regions import Regions
from safeopt.compare.run import OnStep, Start, finished_run, run_arm, run_file, settings_of
from safeopt.compare.scoring import cached_scores
from safeopt.compare.sets import Sets
from safeopt.compare.settings import Settings
from safeopt.compare.spaces import Spaces
from safeopt.compare.workers import run_apart
from safeopt.data import batches
from safeopt.environment import machine, versions
from safeopt.evaluate.refusal import NOTE, PHRASES_VERSION, phrases_hash
from safeopt.integrations.transformers import load_model, located
from safeopt.selection import select


def compare(
    model: str | Path,
    sets: Sets,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    settings: Settings | None = None,
    *,
    unaligned: str | Path | None = None,
    judges: Sequence[Asked] = (),
    workers: int = 1,
    device: str = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Run every arm with every seed from one start model and return all results as plain data.

    Keeps ``out/scores.safetensors`` and one file per run under ``out/runs``; a run whose file is
    there with the same settings is not run again, so an interrupted comparison goes on where it
    stopped. ``out/results.json`` holds what is returned; ``safeopt.report.write`` makes tables and
    figures of it.

    Args:
        model: a Hugging Face causal-LM folder, or ``organism:aligned`` or ``organism:unaligned``.
        sets: the rows that identify, train and evaluate.
        arms: names from ``compare.ARMS``, for example ``["adamw", "spa:0.01", "spa-random:0.01"]``.
        seeds: one run of each arm per seed; the seed orders the data and draws random masks.
        out: a folder, made when missing.
        settings: budget and recipe; the defaults when None.
        unaligned: the model before alignment, likewise; needed by the arms that read a direction.
            With it the drift of every arm is split along and across the direction.
        judges: who rates the answers to the harmful prompts beside the phrase list: judges of
            ``safeopt.evaluate``, and ``"margin"``, the first-token refusal margin of the model at
            each point. Other judges are other runs, as answers are not kept.
        workers: processes that share the runs; each loads the model and has its share of the
            threads. A run gives the numbers that one process with as many threads gives.
        device: where to train, ``"cpu"`` or ``"cuda"``.
        command: how this was called, for the report.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: an unknown arm, one that needs an unaligned model where there is none or that
            cannot train what the settings train, seeds that are empty or repeated, judges of one
            name, less than one worker, or bad settings, rows or models.
        OSError: ``out`` cannot be written, or a worker was killed, as where memory runs out.
    """
    settings = settings or Settings()
    chosen = parse_arms(list(arms))
    require_possible(
        chosen,
        lora=bool(settings.lora_rank),
        unaligned=unaligned is not None,
        utility=bool(sets.utility),
        refusals=len(sets.refusals),
    )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give at least one, and each once")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1, the number of processes")
    out = Path(out)
    prepare = partial(_start, model, unaligned, sets, settings, out, device, require_judges(judges))
    start = prepare(progress=progress)
    again = partial(prepare, first=start.first)
    runs = _run_all(start, chosen, seeds, out / "runs", progress, workers, again)
    require_equal_budgets(runs)
    return {
        "command": command,
        "machine": machine(device),
        "versions": versions(),
        "model": {"folder": str(model), **start.fingerprint},
        "scenario": str(sets.scenario),
        "sets": sets.describe(),
        "seeds": list(seeds),
        "arms": [str(arm) for arm in chosen],
        "leagues": {str(arm): arm.kind.league for arm in chosen},
        "equal_skill": settings.equal_skill,
        "skill": settings.skill,
        "settings": settings.for_run(),
        "scores": start.scores.provenance,
        "direction": start.directions
        and {"unaligned": str(unaligned), "matrices": start.directions.of("safelora").report()},
        "phrases": {"version": PHRASES_VERSION, "sha256": phrases_hash(), "note": NOTE},
        **({"judges": described(start.judges)} if start.judges else {}),
        "runs": runs,
    }


def _start(
    model: str | Path,
    unaligned: str | Path | None,
    sets: Sets,
    settings: Settings,
    out: Path,
    device: str,
    judges: tuple[Asked, ...],
    *,
    progress: bool = False,
    first: dict[str, Any] | None = None,
) -> Start:
    """What all runs start from; ``first`` is the point at step 0 where it is known already."""
    loaded, tokenizer = load_model(model)
    loaded.to(device)
    fingerprint = artifact.fingerprint(loaded)
    scores = cached_scores(
        out / "scores.safetensors",
        loaded,
        tokenizer,
        sets.identify,
        fingerprint=fingerprint,
        objective=settings.objective,
        method=settings.method,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        progress=progress,
    )
    critical = select(scores, settings.fraction)
    directions = seen = None
    if unaligned is not None:
        before: str | Path | torch.nn.Module = located(unaligned)
        if any(p.dim() == 3 for p in loaded.parameters()):
            before = load_model(unaligned)[0]  # experts are stacked when loaded, not in the file
        tune = partial(harmful_direction, loaded, tokenizer, sets, settings)
        directions = Directions(loaded, before, settings.direction_rank, tune)
        seen = directions.of("safelora")
    sized = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    safety = batches(tokenizer, sets.identify, **sized)
    regions = None
    if sets.utility:
        utility = batches(tokenizer, sets.utility, **sized)
        regions = Regions(loaded, safety, utility, progress=progress)
    return Start(
        model=loaded,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        scores=scores,
        critical=critical,
        sets=sets,
        settings=settings,
        first=first or measure(loaded, tokenizer, sets, settings, loaded, critical, seen, judges),
        directions=directions,
        regions=regions,
        spaces=Spaces(loaded, safety, progress=progress),
        judges=judges,
    )


def _run_all(
    start: Start,
    arms: list[AnyArm],
    seeds: Sequence[int],
    folder: Path,
    progress: bool,
    workers: int,
    prepare: Callable[[], Start],
) -> list[dict[str, Any]]:
    order = [(arm, seed) for seed in seeds for arm in arms]
    steps = start.settings.steps
    runs: dict[tuple[AnyArm, int], dict[str, Any]] = {}

    def finished(arm: AnyArm, seed: int) -> dict[str, Any] | None:
        return finished_run(run_file(folder, arm, seed), settings_of(start, arm, seed))

    with _bar(len(order) * steps, progress) as advance:
        if workers > 1:
            lacking = [each for each in order if finished(*each) is None]
            for arm, seed, run in run_apart(prepare, lacking, folder, workers):
                advance(f"{arm} seed {seed}", steps)(0, 0.0)
                runs[arm, seed] = run
        for arm, seed in order:
            label = f"{arm} seed {seed}"
            if (arm, seed) not in runs and (kept := finished(arm, seed)) is not None:
                advance(label, steps)(0, 0.0)
                runs[arm, seed] = kept
            if (arm, seed) not in runs:
                path = run_file(folder, arm, seed)
                runs[arm, seed] = run_arm(start, arm, seed, path, advance(label, 1))
    return [runs[each] for each in order]


def require_equal_budgets(runs: list[dict[str, Any]]) -> None:
    """Check that all runs had as many steps and training rows.

    Raises:
        ValueError: two had not; both are named.
    """
    first = runs[0]
    for run in runs:
        for what in ("steps", "rows"):
            if run["budget"][what] != first["budget"][what]:
                raise ValueError(
                    f"{run['settings']['arm']} was trained on {run['budget'][what]} {what} and"
                    f" {first['settings']['arm']} on {first['budget'][what]}; arms are compared at"
                    " equal budgets only"
                )


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    """Yields ``advance(label, size)``: an ``on_step`` that moves the bar by ``size`` steps."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda label, size: _silent
        return
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:

        def advance(label: str, size: int) -> OnStep:
            bar.set_description(label)
            return lambda step, loss: bar.update(size) and None

        yield advance


def _silent(step: int, loss: float) -> None:
    """Moves no bar."""
