"""Fisher: how sharply the likelihood of refusals reacts to every weight (EWC, arXiv 1612.00796).

    F(W) = mean over prompts n of (dS_n/dW)^2

the diagonal of the empirical Fisher information of the refusals, S_n the log-likelihood of the
refusal to prompt n. It is the curvature with which EWC weighs its pull to the starting values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.gradient_sum import GradientSum
from safeopt.methods.esi import OBJECTIVES, Objective, describe
from safeopt.scores import Batch, rows, texts
from safeopt.targets import scorable


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Scores weights by the mean over prompts of their squared gradient; for `safeopt.score`.

    One backward per prompt, whatever the batches: the square of a batch's summed gradient would let
    prompts cancel. Squares are added up in float32, whatever the model's dtype, in one buffer per
    scored weight. Made for `SafeAdamW(..., anchor=scores)`; `select` takes it as well.

    Args:
        objective: S_n, the number per prompt that is differentiated, as for `ESI`: "refusal_nll",
            "margin", or a function (model, batch) -> Tensor of shape (rows,). Its sign is of no
            account.
        power: 1 is the Fisher information, EWC's weights; 0.5 its square root, the root mean square
            gradient, which spreads the pull over more weights. Above 0, at most 1.
        cover: "all" scores every weight, embeddings, norms, biases and routers too, as EWC does;
            "linear" scores what `ESI` scores, linear maps and expert stacks, as masks want it.

    Raises:
        ValueError: an unknown objective or cover, a power out of range.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
    arXiv 1612.00796, eq. 3. Gradients are of the given refusals, not of answers drawn from the
    model: the empirical Fisher (Kunstner et al. 2019, arXiv 1905.12558, eq. 3). The square root is
    ours.
    """

    objective: Literal["refusal_nll", "margin"] | Objective = "refusal_nll"
    power: float = 1.0
    cover: Literal["all", "linear"] = "all"

    method = "fisher"
    parallel = True

    def __post_init__(self) -> None:
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective is {self.objective!r}; it must be one of {tuple(OBJECTIVES)}, or a"
                " function"
            )
        if not 0 < self.power <= 1:
            raise ValueError(
                f"power is {self.power}; it must be above 0 and at most 1: 1 for the Fisher"
                " information, 0.5 for its square root"
            )
        if self.cover not in ("all", "linear"):
            raise ValueError(f"cover is {self.cover!r}; it must be one of ('linear', 'all')")

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values."""
        named = self.objective if isinstance(self.objective, str) else describe(self.objective)
        return {"objective": named, "power": self.power, "cover": self.cover}

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores: see `cover`; ValueError as `scorable`."""
        linear = scorable(model)
        if self.cover == "linear":
            return linear
        every = names.parameters(model).items()
        return {name: weight for name, weight in every if weight.is_floating_point()}

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> FisherObservation:
        """Begin to add up squared gradients."""
        return FisherObservation(self, model, targets)


class FisherObservation:
    """One run of Fisher: squared gradients, prompt by prompt, and their mean at the end."""

    def __init__(self, settings: Fisher, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        chosen = settings.objective
        self._objective = OBJECTIVES[chosen] if isinstance(chosen, str) else chosen
        self._model = model
        self._power = settings.power
        self.sums = GradientSum(targets, fold=torch.square)

    def observe(self, batch: Batch) -> None:
        """Add the squares of each prompt; FloatingPointError names the prompt that spoils them."""
        for part in rows(batch):
            safety = self._objective(self._model, part).sum()
            self.sums.n += 1
            try:
                self.sums.backward(safety)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}, on the prompt {texts(part)[0]!r} (or its square is: gradients beyond"
                    " 1e19); leave it out, or score in float32"
                ) from error

    def finish(self) -> dict[str, Tensor]:
        """The scores; they take the place of the sums, so that no second buffer is needed."""
        if not self.sums.reached:
            raise ValueError(
                "no prompt gave a gradient to any scored weight; check objective and responses"
            )
        for total in self.sums.totals.values():
            total.div_(self.sums.n)
            if self._power != 1:
                total.pow_(self._power)
        return self.sums.totals

    def close(self) -> None:
        """Remove the hooks."""
        self.sums.close()
