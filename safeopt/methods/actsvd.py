"""ActSVD: the few output directions that carry safety and not utility, as a low-rank edit.

    U S V^T = W X               X: inputs of a matrix at the response tokens of a set of prompts
    Pi = U_k U_k^T              projects outputs on the k directions of most energy
    dW = (I - Pi_u) Pi_s W      what safety has and utility has not; W - dW is without it

(Wei et al. 2024, arXiv 2402.05162, sections 2.1 and 2.2.) The activations are never kept: the
smaller of X X^T and (W X)(W X)^T is added up, in float64, and U follows from its eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.evaluate.generate import evaluating
from safeopt.methods.linear_inputs import LinearInputs, Tokens, require_tokens
from safeopt.methods.low_rank_edit import LowRankEdit, keep_weights, matrix, wide
from safeopt.progress import bar
from safeopt.scores import Batch, texts
from safeopt.targets import fitting, scorable

NOISE = 1e-6  # singular values below this share of the largest are rounding, not directions


@dataclass(frozen=True)
class OutputSpace:
    """The directions in which one matrix puts most of its output.

    U: float32, (out, k), orthonormal columns, most energy first. S: float32, (k,), the singular
    values of W X that belong to them.
    """

    U: Tensor
    S: Tensor


def actsvd(
    model: nn.Module,
    safety: Iterable[Batch],
    utility: Iterable[Batch],
    *,
    safety_directions: int,
    utility_directions: int,
    parameters: Iterable[str] | None = None,
    tokens: Tokens = "response",
    sequential: bool = True,
    progress: bool = True,
) -> LowRankEdit:
    """The edit dW = (I - Pi_u) Pi_s W of every matrix; the model stays as it is.

    `with edit.taken_out(model): ...` tries it out, `edit.take_out(model)` applies it.

    Args:
        model: put in evaluation mode for the run.
        safety: batches whose responses refuse, made by `safeopt.data.batches`.
        utility: batches of ordinary prompts with their responses.
        safety_directions: rank of Pi_s, and the most that dW can have. The paper counts ranks that
            are removed: this is its R - r_s, R = min(out, in); its best have 6 and 96 of 4096.
        utility_directions: rank of Pi_u, its R - r_u; 0 spares nothing: dW = Pi_s W.
        parameters: names, or patterns of whole dotted components ("layers.3"); None for every
            linear map but the head.
        tokens: which tokens count, as for `Wanda`; the same for both sets.
        sequential: True, as the authors do: layer by layer, and each layer sees what the edits
            before it leave; two passes over the prompts per layer, and in the meantime a copy of
            the edited weights. False: all at once on the intact model, one pass per set; memory
            for min(out, in)^2 float64 per matrix and set, in place of those of one layer.
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        ValueError: arguments out of range; the same prompts in both sets; more directions than the
            prompts' outputs have, naming the matrix; expert stacks, which are left to `parameters`.
        FloatingPointError: an input is NaN or infinite.

    Differs from the authors' code (boyiwei/alignment-attribution-code at 0b0e707): U is exact,
    theirs a randomised SVD of 20 iterations over stored activations; products and projectors are in
    float32 and float64, theirs rounded to bfloat16; d x d projectors are never formed; the model is
    not changed.
    """
    _require_count("safety_directions", safety_directions, 1)
    _require_count("utility_directions", utility_directions, 0)
    require_tokens(tokens)
    safety, utility = list(safety), list(utility)
    prompts = [[text for batch in part for text in texts(batch)] for part in (safety, utility)]
    if set(prompts[0]) & set(prompts[1]):
        shared = sorted(set(prompts[0]) & set(prompts[1]))
        raise ValueError(
            f"safety and utility share prompts, such as {shared[0]!r}; keep them apart"
        )
    targets = _targets(model, parameters)
    groups: dict[Any, list[str]] = {}
    for name in targets:
        groups.setdefault(names.place(name)[0] if sequential else None, []).append(name)
    manifest = {
        "model": artifact.fingerprint(model),
        "method": "actsvd",
        "arguments": {
            "safety_directions": safety_directions,
            "utility_directions": utility_directions,
            "tokens": tokens,
            "sequential": sequential,
        },
        "prompts": {"safety": artifact.digest(prompts[0]), "utility": artifact.digest(prompts[1])},
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with keep_weights(model, list(targets) if sequential else []):
        for group in bar(list(groups.values()), progress, "actsvd", "layer"):
            ours = output_spaces(model, safety, safety_directions, parameters=group, tokens=tokens)
            theirs = None
            if utility_directions:
                theirs = output_spaces(
                    model, utility, utility_directions, parameters=group, tokens=tokens
                )
            edit = safety_edit(model, ours, theirs)
            found.update(edit)
            if sequential:
                edit.take_out(model)
    return LowRankEdit(found, manifest)


def output_spaces(
    model: nn.Module,
    batches: Iterable[Batch],
    directions: int,
    *,
    parameters: Iterable[str] | None = None,
    tokens: Tokens = "response",
) -> dict[str, OutputSpace]:
    """The top output directions of each matrix over prompts: one forward pass over them.

    Args:
        model: put in evaluation mode for the run.
        batches: made by `safeopt.data.batches`; on any device.
        directions: how many to keep per matrix, at least 1.
        parameters: as for `actsvd`.
        tokens: as for `actsvd`.

    Raises:
        ValueError: as `actsvd`.
        FloatingPointError: an input is NaN or infinite.
    """
    _require_count("directions", directions, 1)
    require_tokens(tokens)
    sums = _Grams(model, _targets(model, parameters))
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                sums.inputs.run(moved, tokens)
        if not sums.tokens:
            raise ValueError("batches is empty: give at least one prompt")
        if sums.inputs.unseen:
            raise ValueError(
                f"the model never ran the modules of {sorted(sums.inputs.unseen)[:5]}, so their"
                " outputs are unknown; leave them out with parameters="
            )
        return {name: sums.space(name, directions) for name in sums.totals}
    finally:
        sums.inputs.close()


def safety_edit(
    model: nn.Module,
    safety: Mapping[str, OutputSpace],
    utility: Mapping[str, OutputSpace] | None = None,
) -> LowRankEdit:
    """The edit (I - Pi_u) Pi_s W of the model's weights, from spaces made by `output_spaces`.

    Args:
        model: whose weights W are.
        safety: what is taken out.
        utility: what is spared, of at least the same matrices; None spares nothing.

    Raises:
        ValueError: names that the model or `utility` lacks.
    """
    names.require(safety, names.parameters(model), "safety")
    if utility is not None:
        names.require(safety, utility, "utility")
    edits = {}
    for name, space in safety.items():
        weight, transposed = matrix(model, name)
        left = space.U
        right = left.T @ wide(weight).to(left.dtype)
        if utility is not None:
            spared = utility[name].U
            left = left - spared @ (spared.T @ left)
        edits[name] = (right.T, left.T) if transposed else (left, right)
    return LowRankEdit(edits, {"method": "actsvd"})


class _Grams:
    """Per matrix the smaller of X X^T and (W X)(W X)^T, float64, while prompts go by."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        self.tokens = 0
        self.weights = {name: matrix(model, name)[0].detach() for name in targets}
        self.totals = {
            name: weight.new_zeros((min(weight.shape),) * 2, dtype=torch.float64)
            for name, weight in self.weights.items()
        }
        self.inputs = LinearInputs(model, targets, self._add)

    def _add(self, name: str, x: Tensor, expert: int | None) -> None:
        weight, x = self.weights[name], wide(x)
        if weight.shape[0] <= weight.shape[1]:
            x = x @ wide(weight).T
        self.totals[name].addmm_(x.double().T, x.double())
        self.tokens += len(x)

    def space(self, name: str, k: int) -> OutputSpace:
        """The top k directions; ValueError if the outputs have fewer."""
        weight = self.weights[name].double()
        gram = self.totals[name]
        if not gram.isfinite().all():
            raise FloatingPointError(
                f"the input of {name!r} is NaN or infinite on one of the prompts; look for it with"
                " fewer prompts, or use float32"
            )
        values, vectors = torch.linalg.eigh(gram)
        if weight.shape[0] > weight.shape[1]:
            # C = X X^T = H H^T, so the directions of W X are those of the thin matrix W H.
            thin = weight @ (vectors * values.clamp(min=0).sqrt())
            values, vectors = torch.linalg.eigh(thin.T @ thin)
            vectors = thin @ vectors[:, -k:]
        # Largest first; QR puts right what division by small singular values would spoil.
        U = torch.linalg.qr(vectors.flip(1)[:, :k]).Q
        sizes = values.clamp(min=0).sqrt().flip(0)
        there = int((sizes > NOISE * sizes[0]).sum())
        if there < k:
            raise ValueError(
                f"{name!r} has {there} output directions on these prompts, and {k} were asked for;"
                " give more prompts or ask for fewer directions"
            )
        return OutputSpace(U.float(), sizes[:k].float())


def _targets(model: nn.Module, parameters: Iterable[str] | None) -> dict[str, Tensor]:
    chosen = fitting(scorable(model, head=parameters is not None), parameters)
    stacks = [name for name, weight in chosen.items() if weight.dim() == 3]
    if stacks:
        raise ValueError(
            f"{stacks[0]!r} is a stack of experts, and ActSVD edits single matrices; name others in"
            " parameters, such as ['self_attn']"
        )
    if not chosen:
        raise ValueError("the model has no linear map that ActSVD can edit")
    return chosen


def _require_count(what: str, count: int, least: int) -> None:
    if count < least:
        raise ValueError(f"{what} is {count}; it must be at least {least}")
