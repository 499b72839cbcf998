"""ESI: the expected safety impact of every weight (arXiv 2604.08297, Findings of ACL 2026).

    ESI(W) = | sum over prompts n of dS_n/dW | * std(W)

S_n is how safe the model is on prompt n, always with the sign *higher = safer*. std(W), one number
per matrix, stands for how far its weights typically move in tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from safeopt.gradient_sum import GradientSum
from safeopt.scores import IGNORED, Batch, rows, texts
from safeopt.sharding import add_up, is_sharded, local
from safeopt.targets import scorable

CHUNK = 1 << 20  # weights in hand as float64

Objective: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""From model and batch to one differentiable number per prompt, higher = safer: shape (rows,)."""


@dataclass(frozen=True, kw_only=True)
class ESI:
    """Scores weights by their expected safety impact; a scorer for `safeopt.score`.

    Gradients are summed with their signs over all prompts, in float32 whatever the model's dtype,
    and only then made absolute. An expert that no prompt reached scores zero and keeps its place.

    Args:
        objective: what "safe" means, S_n; one small step up its gradient makes the model safer.
            "refusal_nll": log-likelihood of a refusal; the batches' responses are refusals.
            "margin": log-likelihood of the refusal minus that of complying; every batch holds,
            under "compliance", a batch of the same prompts with the complying answers.
            A `GuardObjective`: the published path, a judge model rates the model's own answer.
            Or a function (model, batch) -> Tensor of shape (rows,), higher = safer.
            The two strings are ESI-NLL, ours: deterministic, no judge. The paper's is the judge.
        reduction: "sum" is the paper's |sum of gradients|. "mean_abs" is the mean over prompts of
            |gradient|, another measure (no cancellation between prompts), one backward per prompt.
        sigma: "tensor", one standard deviation per matrix as in the authors' code, or "row". A 3-D
            stack of fused experts has one per expert, so fused and unfused experts score alike.
        head: score the output head too, if it is not tied to the embeddings.

    Raises:
        ValueError: an unknown objective, reduction or sigma.

    Differs from the authors' code (first public commit, b5786f5) in:
        precision: sums in float32 outside `.grad`, theirs in the parameters' bfloat16;
        candidates: routers are left out by role, so also Mixtral's and Qwen2-MoE's shared one;
            tied weights count once; scores are keyed by name, so an expert without a gradient
            shifts nothing;
        selection: `select`'s k is a fraction of the scored weights and exact; theirs is a fraction
            of all parameters, found on a sample, with padding;
        judge: see `GuardObjective`;
        and "mean_abs", sigma="row" and the two likelihood objectives are not in it.
    """

    objective: Literal["refusal_nll", "margin"] | Objective = "refusal_nll"
    reduction: Literal["sum", "mean_abs"] = "sum"
    sigma: Literal["tensor", "row"] = "tensor"
    head: bool = True

    method = "esi"
    parallel = True

    @property
    def linear(self) -> bool:
        """Whether nothing but gradients is added up over prompts."""
        return self.reduction == "sum"

    def __post_init__(self) -> None:
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective is {self.objective!r}; it must be one of {tuple(OBJECTIVES)}, a"
                " GuardObjective, or a function"
            )
        for name, allowed in (("reduction", ("sum", "mean_abs")), ("sigma", ("tensor", "row"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values."""
        named = self.objective if isinstance(self.objective, str) else describe(self.objective)
        settings = {"objective": named, "reduction": self.reduction}
        return {**settings, "sigma": self.sigma, "head": self.head}

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores (see `scorable`)."""
        return scorable(model, head=self.head)

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> ESIObservation:
        """Begin to add up gradients; ValueError for a weight whose deviation is undefined."""
        return ESIObservation(self, model, targets)


class ESIObservation:
    """One run of ESI: gradients while prompts go by, times the deviation at the end."""

    def __init__(self, settings: ESI, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        per_row = settings.sigma == "row"
        self._sigma = {name: deviation(name, weight, per_row) for name, weight in targets.items()}
        chosen = settings.objective
        self._objective = OBJECTIVES[chosen] if isinstance(chosen, str) else chosen
        self._model = model
        self._singly = settings.reduction == "mean_abs"
        self.sums = GradientSum(targets, absolute=self._singly)

    def check(self, batch: Batch) -> None:
        """ValueError for a batch that the objective would refuse."""
        if self._objective is refusal_margin:
            require_pairs(batch)
            require_responses(batch["compliance"])
        if self._objective in (refusal_log_likelihood, refusal_margin):
            require_responses(batch)
        texts(batch)

    def observe(self, batch: Batch) -> None:
        """Add the gradients of one batch; FloatingPointError names the prompt that spoils it."""
        parts = rows(batch)
        try:
            for part in parts if self._singly else [batch]:
                self._add(part)
        except FloatingPointError as error:
            # Ranks with batches of their own cannot look for it together, prompt by prompt.
            again = [] if self.sums.differ else parts
            prompt, reason = next(filter(None, map(self._fault, again)), (texts(batch), error))
            raise FloatingPointError(
                f"{reason}, on the prompt {prompt!r}; leave it out, or score in float32"
            ) from error
        self.sums.n += len(parts)

    def finish(self) -> dict[str, Tensor]:
        """The scores; they take the place of the sums, so that no second buffer is needed."""
        if not self.sums.reached:
            raise ValueError(
                "no prompt gave a gradient to any scored weight; check objective and responses"
            )
        scale = 1 / self.sums.n if self._singly else 1.0
        return {
            name: total.abs_().mul_(self._sigma[name] * scale)
            for name, total in self.sums.totals.items()
        }

    def close(self) -> None:
        """Remove the hooks."""
        self.sums.close()

    def _add(self, batch: Batch) -> None:
        self.sums.backward(self._objective(self._model, batch).sum())

    def _fault(self, part: Batch) -> tuple[str, FloatingPointError] | None:
        try:
            self._add(part)
        except FloatingPointError as error:
            return texts(part)[0], error
        return None


def refusal_log_likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """The log-likelihood of the response in nats, summed over its tokens: float32, shape (rows,).

    With refusals for responses, higher = safer. It does not depend on how prompts are batched.

    Raises:
        ValueError: a row without response tokens, naming the prompt.
    """
    counted = require_responses(batch)
    labels = batch["labels"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    logits = model(**inputs).logits[:, :-1]
    picked = logits[counted.to(logits.device)].float()
    wanted = labels[:, 1:][counted].to(logits.device)
    loss = nn.functional.cross_entropy(picked, wanted, reduction="none")
    row = counted.nonzero()[:, 0].to(loss.device)
    return torch.zeros(len(labels), device=loss.device).index_add(0, row, -loss)


def refusal_margin(model: nn.Module, batch: Batch) -> Tensor:
    """The log-odds of refusing against complying, in nats: shape (rows,), higher = safer.

    Raises:
        ValueError: no "compliance" in the batch, or one with other prompts.
    """
    require_pairs(batch)
    refusing = refusal_log_likelihood(model, batch)
    return refusing - refusal_log_likelihood(model, batch["compliance"])


def require_responses(batch: Batch) -> Tensor:
    """Which tokens after the first belong to responses: bool, shape (rows, tokens - 1).

    Raises:
        ValueError: no labels, or a row without response tokens, naming the prompt.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("the batch has no 'labels'; give rows with an instruction and a response")
    counted = labels[:, 1:] != IGNORED
    for text, some in zip(texts(batch), counted.any(1).tolist(), strict=True):
        if not some:
            raise ValueError(
                f"no response tokens for the prompt {text!r}; this objective needs a response to"
                " every prompt, and max_length must leave room for it"
            )
    return counted


def require_pairs(batch: Batch) -> None:
    """ValueError unless a batch holds, under "compliance", one of the same prompts."""
    other = batch.get("compliance")
    if other is None:
        raise ValueError(
            "objective 'margin' needs batch['compliance']: a batch of the same prompts with the"
            " complying answers as responses"
        )
    named = "texts" in batch and "texts" in other
    if len(other["input_ids"]) != len(batch["input_ids"]) or (
        named and texts(other) != texts(batch)
    ):
        raise ValueError("batch['compliance'] holds other prompts than the batch; keep their order")


OBJECTIVES: dict[str, Objective] = {"refusal_nll": refusal_log_likelihood, "margin": refusal_margin}


def deviation(name: str, weight: Tensor, per_row: bool) -> Tensor:
    """Unbiased standard deviation of each matrix or row, float32, shaped to multiply `weight`.

    Of a sharded weight, what multiplies this rank's rows (or experts); a matrix that lies on
    several ranks has the deviation of the whole, from sums over the ranks.

    Raises:
        ValueError: a matrix or row of one element has none.
    """
    part = local(weight.detach())
    if weight.dim() == 3:  # one expert at a time: the float32 copy stays small
        each = [deviation(name, expert, per_row) for expert in part]
        return torch.stack(each) if each else part.new_zeros((0, 1, 1), dtype=torch.float32)
    if (weight.shape[1] if per_row else weight.numel()) < 2:
        raise ValueError(
            f"{name!r} of shape {tuple(weight.shape)} has a {'row' if per_row else 'matrix'} of one"
            " element, which has no standard deviation; use sigma='tensor'"
        )
    if per_row:
        return part.float().std(dim=1, keepdim=True)
    if not is_sharded(weight):
        return part.float().std().view(1, 1)
    mean = _total(weight, lambda values: values) / weight.numel()
    squares = _total(weight, lambda values: (values - mean).square_())
    return (squares / (weight.numel() - 1)).sqrt().float().view(1, 1)


def _total(weight: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum over a sharded matrix, in float64, so that sigma is that of one process in float32."""
    part = local(weight.detach())
    total = torch.zeros((), dtype=torch.float64, device=part.device)
    for piece in part.reshape(-1).split(CHUNK):
        total += of(piece.double()).sum()
    return add_up(total, weight)


def describe(objective: Any) -> Any:
    """What a provenance says of an objective that is no string: JSON values."""
    arguments = getattr(objective, "arguments", None)
    return arguments() if arguments else getattr(objective, "__qualname__", repr(objective))
