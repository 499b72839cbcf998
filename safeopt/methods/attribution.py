"""SNIP, Wanda, and what safety has that utility has not (Wei et al. 2024, arXiv 2402.05162).

    SNIP    I(W) = mean over prompts x of | W * dL(x)/dW |       L(x) = -log p(response | prompt)
    Wanda   I(W)_ij = |W_ij| * ||X_j||_2                         X_j: input j at all response tokens
    S(p, q) = (top q of the safety scores) - (top p of the utility scores)

Freezing in the paper (its Table 3) takes the top of the safety scores as they are, that is
`select(safety, q, scope="row")`; the set difference is what the paper prunes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt.gradient_sum import GradientSum
from safeopt.mask import SafetyMask
from safeopt.methods.esi import refusal_log_likelihood
from safeopt.methods.linear_inputs import LinearInputs, Tokens, require_tokens
from safeopt.scores import IGNORED, Batch, Scores, rows, texts
from safeopt.selection import select
from safeopt.sharding import local
from safeopt.targets import scorable


@dataclass(frozen=True, kw_only=True)
class SNIP:
    """Scores weights by the mean over prompts of |W * dL/dW|; a scorer for `safeopt.score`.

    How much the loss on one response changes, to first order, when the weight is set to zero.
    Absolute values are taken prompt by prompt, so there is one forward and one backward pass per
    prompt, whatever the batches; batches of one prompt save the padding. Only response tokens
    count. Memory: one float32 buffer per scored weight.

    Args:
        loss: L of one prompt: "sum", the negative log-likelihood of the whole response, as in the
            paper; "mean", the same per response token, as in the authors' code, so that long
            responses weigh no more than short ones.
        head: score the output head too, if it is not tied; the authors score blocks only.

    Raises:
        ValueError: an unknown loss.

    Source: Wei et al. 2024, arXiv 2402.05162, section 2.1, after Lee et al. 2019, arXiv 1810.02340.
    Differs from the authors' code (boyiwei/alignment-attribution-code at 0b0e707): absolute
    gradients are added up in float32, theirs in the weight's bfloat16, which ties many scores;
    `loss` is "sum" by default; tied weights count once; the scores come from the intact model.
    """

    loss: Literal["sum", "mean"] = "sum"
    head: bool = False

    method = "snip"
    parallel = True

    def __post_init__(self) -> None:
        if self.loss not in ("sum", "mean"):
            raise ValueError(f"loss is {self.loss!r}; it must be one of ('sum', 'mean')")

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"loss": self.loss, "tokens": "response", "head": self.head}

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores (see `scorable`)."""
        return scorable(model, head=self.head)

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> SNIPObservation:
        """Begin to add up absolute gradients."""
        return SNIPObservation(self, model, targets)


class SNIPObservation:
    """One run of SNIP: absolute gradients, prompt by prompt, times |W| / n at the end."""

    def __init__(self, settings: SNIP, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        self._model, self._targets = model, targets
        self._mean = settings.loss == "mean"
        self.sums = GradientSum(targets, absolute=True)

    def observe(self, batch: Batch) -> None:
        """Add |dL/dW| of each prompt; FloatingPointError names the prompt that spoils it."""
        for part in rows(batch):
            loss = -refusal_log_likelihood(self._model, part).sum()
            if self._mean:
                loss = loss / (part["labels"][:, 1:] != IGNORED).sum()
            self.sums.n += 1
            try:
                self.sums.backward(loss)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}, on the prompt {texts(part)[0]!r}; leave it out, or score in float32"
                ) from error

    def finish(self) -> dict[str, Tensor]:
        """The scores; they take the place of the sums, so that no second buffer is needed."""
        if not self.sums.reached:
            raise ValueError("no prompt gave a gradient to any scored weight; check the responses")
        for name, total in self.sums.totals.items():
            total.mul_(local(self._targets[name].detach()).abs()).div_(self.sums.n)
        return self.sums.totals

    def close(self) -> None:
        """Remove the hooks."""
        self.sums.close()


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Scores weights by |W_ij| times the norm of their input; a scorer for `safeopt.score`.

    One forward pass over the prompts and no gradient. Meant to be compared within each output row:
    `select(..., scope="row")`. Squares of a batch are summed in float32, batches in float64, in one
    vector per matrix (one per expert for a stack). An expert's norms are over the tokens routed to
    it, as they enter, without the routing weight; one that no token reached scores zero. Expert
    stacks: see `LinearInputs` for the layouts, and for the cost of their second matrix.

    Args:
        tokens: over which tokens the norm runs: "response", the response's own tokens, or "all",
            every token but padding. The same for two scores that are to be compared.
        head: score the output head too, if it is not tied; the authors score blocks only.

    Raises:
        ValueError: unknown tokens.

    Source: Wei et al. 2024, arXiv 2402.05162, section 2.1, after Sun et al. 2023, arXiv 2306.11695.
    Differs from the authors' code (boyiwei/alignment-attribution-code at 0b0e707): the norm is that
    of all tokens, where theirs is divided by the square root of the number of prompts, a factor
    that no ranking sees; scores are those of the intact model, as in their scoring pass.
    """

    tokens: Tokens = "response"
    head: bool = False

    method = "wanda"

    def __post_init__(self) -> None:
        require_tokens(self.tokens)

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"tokens": self.tokens, "head": self.head}

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores (see `scorable`)."""
        return scorable(model, head=self.head)

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> WandaObservation:
        """Begin to add up squared inputs; ValueError for a weight whose input cannot be seen."""
        return WandaObservation(self, model, targets)


class WandaObservation:
    """One run of Wanda: squared inputs while prompts go by, the norms times |W| at the end."""

    def __init__(self, settings: Wanda, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        self._targets, self._tokens = targets, settings.tokens
        self._inputs = LinearInputs(model, targets, self._add)
        self._last: tuple[Tensor, Tensor] | None = None
        self._squares = {
            name: weight.new_zeros(self._norms_shape(name, weight), dtype=torch.float64)
            for name, weight in targets.items()
        }

    def observe(self, batch: Batch) -> None:
        """Add the squares of one batch; FloatingPointError names its prompts if one is not finite.

        Raises:
            FloatingPointError: an input is NaN or infinite.
        """
        self._inputs.run(batch, self._tokens)
        self._last = None
        first = next(iter(self._squares.values())).device
        sums = torch.stack([total.sum().to(first) for total in self._squares.values()])
        bad = (~sums.isfinite()).nonzero().flatten().tolist()
        if bad:
            # The first in the model's order is the first that the forward pass met.
            name = list(self._squares)[bad[0]]
            raise FloatingPointError(
                f"the input of {name!r} is NaN or infinite, on one of the prompts {texts(batch)};"
                " leave it out, or score in float32"
            )

    def finish(self) -> dict[str, Tensor]:
        """The scores; ValueError if the model never ran some of the scored modules."""
        if self._inputs.unseen:
            raise ValueError(
                f"the model never ran the modules of {sorted(self._inputs.unseen)[:5]}, so their"
                " inputs are unknown; score with SNIP or ESI"
            )
        scores = {}
        for name, weight in self._targets.items():
            norms = self._squares[name].sqrt().float()
            norms = norms.unsqueeze(-1 if name in self._inputs.transposed else -2)
            scores[name] = weight.detach().float().abs() * norms
        return scores

    def close(self) -> None:
        """Remove the hooks."""
        self._inputs.close()

    def _norms_shape(self, name: str, weight: Tensor) -> tuple[int, ...]:
        inputs = weight.shape[-2 if name in self._inputs.transposed else -1]
        return (*weight.shape[:-2], inputs)

    def _add(self, name: str, x: Tensor, expert: int | None) -> None:
        total = self._squares[name] if expert is None else self._squares[name][expert]
        if self._last is None or self._last[0] is not x:  # q, k and v share their input
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            self._last = (x, wide.square().sum(0))
        total += self._last[1]


def set_difference(
    safety: Mapping[str, Tensor],
    utility: Mapping[str, Tensor],
    *,
    p: float,
    q: float,
    scope: Literal["row", "tensor"] = "row",
) -> SafetyMask:
    """The weights among the top q for safety and not among the top p for utility.

    Args:
        safety: scores on responses that refuse.
        utility: scores of the same model, by the same scorer, on ordinary prompts.
        p: share of the utility ranking that is spared, strictly between 0 and 1. The paper's
            numbers are percent: its best have p about q, from 0.03 to 0.09.
        q: share of the safety ranking, likewise.
        scope: "row": rankings within each output row, as the paper says; "tensor": within each
            matrix, as the authors' code does. A row is the last dimension; of weights stored
            (in, out), GPT-2's Conv1D, that is an input and not an output: use "tensor" there.

    Raises:
        ValueError: scores of other weights, of another model, method or setting (such as `tokens`),
            or of the same prompts; arguments out of range; nothing is left.

    Source: Wei et al. 2024, arXiv 2402.05162, section 2.2. Differs from the authors' code (at
    0b0e707): `select` rounds the number of weights to the nearest, theirs rounds down; ties go to
    the first weight; `scope` is "row" by default. What their hard-coded `prune_part` leaves out for
    Llama-2-7B can be left out of the mask by name.
    """
    if scope not in ("row", "tensor"):
        raise ValueError(f"scope is {scope!r}; it must be one of ('row', 'tensor')")
    _require_comparable(safety, utility)
    critical = select(safety, q, scope=scope)
    mask = critical - select(utility, p, scope=scope)
    if mask.count() == 0:
        raise ValueError(
            f"all of the top {q} for safety is among the top {p} for utility, so nothing is left;"
            " raise q or lower p"
        )
    mask.manifest["arguments"] = {"p": p, "q": q, "scope": scope, "selected": mask.count()}
    return mask


def _require_comparable(safety: Mapping[str, Tensor], utility: Mapping[str, Tensor]) -> None:
    shapes = [{name: t.shape for name, t in scores.items()} for scores in (safety, utility)]
    if shapes[0] != shapes[1]:
        other = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise ValueError(
            f"safety and utility score different weights, such as {sorted(other)[:5]}; score one"
            " model with one scorer"
        )
    if not (isinstance(safety, Scores) and isinstance(utility, Scores)):
        return
    known, other_known = safety.provenance, utility.provenance
    for key in ("model", "method", "arguments"):
        if key in known and key in other_known and known[key] != other_known[key]:
            raise ValueError(
                f"safety was scored with {key} {known[key]} and utility with {other_known[key]};"
                " score both on one model with the same settings"
            )
    if "prompts" in known and known["prompts"] == other_known.get("prompts"):
        raise ValueError(
            "safety and utility were scored on the same prompts; give utility ordinary prompts,"
            " kept apart from those that are refused"
        )
