"""Null-space training: updates that leave the answers of every matrix to safety prompts alone.

    M_s = E[x x^T]      over the inputs x of a matrix while refusals go by, M_t while the task does
    F                   the inputs that may be answered differently: tr(F^T M_s F) <= leak tr(M_s)
    dW <- dW F F^T      each update, after Adam has made it

Without a task F spans the eigenvectors of M_s with the smallest eigenvalues (Wang et al. 2021,
Adam-NSCL, arXiv 2103.07113; Saha et al. 2021, GPM, arXiv 2103.09762; Zhang et al. 2025, GuardSpace,
arXiv 2510.14301, for LoRA adapters). With one, F is the span of the first generalised eigenvectors
of M_t v = mu M_s v: those inputs that the task has most of for what safety has of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.evaluate.generate import evaluating
from safeopt.input_space import InputBasis, InputSpace
from safeopt.methods.linear_inputs import LinearInputs, Tokens, require_tokens
from safeopt.progress import bar
from safeopt.scores import Batch, texts
from safeopt.targets import fitting, scorable

RIDGE = 1e-3
"""Share of the mean eigenvalue that is added to M_s: below it safety has nothing worth ranking."""


@dataclass(frozen=True, eq=False)
class InputMoments(Mapping[str, Tensor]):
    """Name -> sum of x x^T over the inputs of a matrix: float64 (in, in), or (experts, in, in).

    Matrices with the same input share one tensor. shapes: of the weights. transposed: names of
    those stored (in, out). manifest: JSON values that say where they come from.
    """

    totals: dict[str, Tensor]
    shapes: dict[str, torch.Size]
    transposed: frozenset[str]
    manifest: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.totals[names.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.totals)

    def __len__(self) -> int:
        return len(self.totals)


def input_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    parameters: Iterable[str] | None = None,
    tokens: Tokens = "all",
    progress: bool = True,
) -> InputMoments:
    """The second moments of what enters each linear map while prompts go by: one forward pass.

    Memory: in^2 float64 for every distinct input, so 0.13 GB where `in` is 4096; for large models
    take some layers at a time with `parameters`, and join the spaces that come of them.

    Args:
        model: put in evaluation mode for the run; not sharded, without adapters.
        batches: made by `safeopt.data.batches`; on any device.
        parameters: names, or patterns of whole dotted components ("layers.3"); None for every
            linear map and stack of experts, and the head unless it is tied to the embeddings.
        tokens: "all" but padding, as the prompt's inputs decide the answer too; or "response".
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        ValueError: no batches, a pattern that fits nothing, or a matrix whose inputs cannot be
            told (see `LinearInputs`).
        FloatingPointError: an input is NaN or infinite.
        NotImplementedError: the model is sharded over processes.
    """
    require_tokens(tokens)
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: give at least one prompt")
    targets = fitting(scorable(model), parameters)
    sums = _Sums(targets)
    inputs = LinearInputs(model, targets, sums.add)
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in bar(batches, progress, "input moments", "batch"):
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                inputs.run(moved, tokens)
        if inputs.unseen:
            raise ValueError(
                f"the model never ran the modules of {sorted(inputs.unseen)[:5]}, so their inputs"
                " are unknown; leave them out with parameters="
            )
    finally:
        inputs.close()
    sums.require_finite()
    manifest = {
        "model": artifact.fingerprint(model),
        "prompts": artifact.digest([text for batch in batches for text in texts(batch)]),
        "tokens": tokens,
    }
    shapes = {name: weight.shape for name, weight in targets.items()}
    return InputMoments(sums.whole(), shapes, frozenset(inputs.transposed), manifest)


def null_space(
    safety: InputMoments, task: InputMoments | None = None, *, leak: float = 0.01
) -> InputSpace:
    """The inputs that training may answer differently, for `project_step`.

        space = null_space(input_moments(model, refusals), input_moments(model, task), leak=0.01)
        space.freeze_rest(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        project_step(optimizer, space, model)

    Args:
        safety: moments of harmful prompts with refusals.
        task: moments of the rows that will be trained on, of the same model; a few hundred are
            enough. None leaves the directions free that safety uses least, which is the published
            form and leaves the task fewer for the same leak.
        leak: share of the safety inputs' second moment that may lie in the free space of a matrix,
            in (0, 1). Nearer 0 is safer and slower to learn.

    Raises:
        ValueError: leak out of range; moments of two models or of different matrices; no matrix is
            left an input.

    Source: Wang et al. 2021, arXiv 2103.07113, section 3, for the filter, there of Adam's update
    as here. Differs from the authors' code: their null space is chosen per layer by a multiple of
    the smallest eigenvalue, here by the share of the moment; the choice by the task is ours.
    """
    require_leak(leak)
    if task is not None:
        _require_same(safety, task)
    made: dict[int, tuple[Tensor, dict[str, list[float]]]] = {}
    bases = {}
    for name, total in safety.items():
        if id(total) not in made:  # q, k and v have one input
            made[id(total)] = _basis(total, None if task is None else task[name], leak)
        basis, stats = made[id(total)]
        bases[name] = InputBasis(safety.shapes[name], basis, stats, name in safety.transposed)
    manifest = {"leak": leak, "safety": safety.manifest, "task": task and task.manifest}
    return InputSpace(bases, manifest)


def require_leak(leak: float) -> None:
    """ValueError for a leak out of (0, 1)."""
    if not 0 < leak < 1:
        raise ValueError(f"leak is {leak}; it must lie in (0, 1), for example 0.01")


def _basis(safety: Tensor, task: Tensor | None, leak: float) -> tuple[Tensor, dict[str, Any]]:
    """F of one matrix (in, k), or of a stack (experts, in, k), and its stats."""
    stacked = safety.dim() == 3
    safeties = list(safety) if stacked else [safety]
    tasks: list[Tensor | None] = [None] * len(safeties)
    if task is not None:
        tasks = list(task) if stacked else [task]
    found = [_free(one, other, leak) for one, other in zip(safeties, tasks, strict=True)]
    most = max(F.shape[1] for F in found)
    padded = [torch.nn.functional.pad(F, (0, most - F.shape[1])).float() for F in found]
    stats = {
        "free": [F.shape[1] / F.shape[0] for F in found],
        "leak": [_share(F, one) for F, one in zip(found, safeties, strict=True)],
    }
    if task is not None:
        stats["task"] = [
            _share(F, one) for F, one in zip(found, tasks, strict=True) if one is not None
        ]
    return torch.stack(padded) if stacked else padded[0], stats


def _free(safety: Tensor, task: Tensor | None, leak: float) -> Tensor:
    """Orthonormal columns, best first, of which together safety has at most its share `leak`."""
    size = len(safety)
    whole = torch.eye(size, dtype=safety.dtype, device=safety.device)
    total = safety.trace()
    if total == 0:  # an expert that no safety prompt reaches
        return whole
    if task is None or task.trace() == 0:
        columns = torch.linalg.eigh(safety).eigenvectors
    else:
        root = torch.linalg.cholesky(safety / total + RIDGE / size * whole)
        inverse = torch.linalg.solve_triangular(root, whole, upper=False)
        z = torch.linalg.eigh(inverse @ (task / task.trace()) @ inverse.mT).eigenvectors
        columns = torch.linalg.qr(inverse.mT @ z.flip(1)).Q
    spent = (columns * (safety @ columns)).sum(0).cumsum(0) / total
    return columns[:, : int((spent <= leak).sum())]


def _share(F: Tensor, moment: Tensor) -> float:
    total = float(moment.trace())
    return float((F * (moment @ F)).sum()) / total if total else 0.0


class _Sums:
    """Sums of x x^T by weight, one for all that get the very same input."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        self._experts = {n: len(w) for n, w in targets.items() if w.dim() == 3}
        self._totals: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def add(self, name: str, x: Tensor, expert: int | None) -> None:
        if expert is None and self._last[0] is x:
            self._owner[name] = self._last[1]
            return
        self._last = (x, name) if expert is None else (None, "")
        size = x.shape[-1]
        if name not in self._totals:
            stack = () if expert is None else (self._experts[name],)
            self._totals[name] = x.new_zeros((*stack, size, size), dtype=torch.float64)
        total = self._totals[name] if expert is None else self._totals[name][expert]
        total.addmm_(x.double().T, x.double())

    def require_finite(self) -> None:
        for name, total in self._totals.items():
            if not total.isfinite().all():
                raise FloatingPointError(
                    f"the input of {name!r} is NaN or infinite on one of the prompts; look for it"
                    " with fewer prompts, or use float32"
                )

    def whole(self) -> dict[str, Tensor]:
        shared = {name: self._totals[owner] for name, owner in self._owner.items()}
        return {**self._totals, **shared}


def _require_same(safety: InputMoments, task: InputMoments) -> None:
    if safety.manifest["model"] != task.manifest["model"]:
        raise ValueError(
            "safety and task are moments of two models: the inputs of the layers are not the same;"
            " make both with the model that will be trained"
        )
    names.require(safety, task.totals, "task")
