"""What people do without safeopt, written as a careful user writes it: the contestants.

The masks are bool tensors by parameter, True = frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

GUESS = 1_000_000  # scores drawn by the sampling approach


class ByHand:
    """Any optimizer, and a mask around it: keep the frozen values, zero their gradients, put back.

    Zeroing the gradient alone is not enough: momentum and weight decay would move the weights.

    Args:
        optimizer: with its parameters.
        frozen: (parameter, bool mask of its shape).
        keep: "values" stores the frozen values and writes them back; "weights" stores the whole
            weight and chooses. Which is faster depends on the density.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, frozen: Iterable[tuple[Tensor, Tensor]], keep: str
    ) -> None:
        self.optimizer = optimizer
        self.frozen = list(frozen)
        self.keep = keep

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        return self.optimizer.state

    def mask_bytes(self) -> int:
        return sum(mask.nbytes for _, mask in self.frozen)

    @torch.no_grad()
    def step(self) -> None:
        whole = self.keep == "weights"
        kept = [p.clone() if whole else p[mask] for p, mask in self.frozen]
        for p, mask in self.frozen:
            if p.grad is not None:
                p.grad.masked_fill_(mask, 0)
        self.optimizer.step()
        for (p, mask), before in zip(self.frozen, kept, strict=True):
            if whole:
                torch.where(mask, before, p, out=p)
            else:
                p[mask] = before

    @torch.no_grad()
    def refill(self) -> None:
        """Give the frozen places a gradient again, as the next backward pass would.

        Left at zero, their momentum would shrink to denormal numbers, which a CPU adds slowly.
        """
        for p, mask in self.frozen:
            p.grad.masked_fill_(mask, 0.5)


class ESIAuthors:
    """The masked AdamW of the ESI authors, by its semantics.

    A loop over parameters. The moments see the whole gradient, also at frozen places, and are kept
    for all weights. Only the update is multiplied by the mask, a dense float tensor per parameter.
    Weight decay is part of the bias-corrected update, so that it is lr * decay / (1 - beta1^t) at
    step t: ten times torch's at the first step.
    """

    def __init__(
        self,
        frozen: Iterable[tuple[Tensor, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.live = [(p, (~mask).to(p.dtype)) for p, mask in frozen]
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.steps: dict[Tensor, int] = {}

    def mask_bytes(self) -> int:
        return sum(live.nbytes for _, live in self.live)

    @torch.no_grad()
    def step(self) -> None:
        for p, live in self.live:
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            beta1, beta2 = self.betas
            self.steps[p] = t = self.steps.get(p, 0) + 1
            mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            mean.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            update = mean / (square.sqrt() / (1 - beta2**t) ** 0.5 + self.eps)
            if self.weight_decay:
                update.add_(p, alpha=self.weight_decay)
            p.add_(update.mul_(live), alpha=-self.lr / (1 - beta1**t))


def top_by_sorting(scores: Sequence[Tensor], fraction: float) -> Tensor:
    """Positions of the k largest scores in the concatenation: exact, with a copy of everything."""
    joined = torch.cat([tensor.flatten() for tensor in scores])
    return torch.topk(joined, round(fraction * joined.numel()), sorted=False).indices


def top_by_sampling(scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Bool masks of what exceeds the quantile of a random sample; not exactly k weights."""
    total = sum(tensor.numel() for tensor in scores)
    drawn = []
    for tensor in scores:
        share = max(1, round(min(GUESS, total) * tensor.numel() / total))
        places = torch.randint(tensor.numel(), (share,), device=tensor.device)
        drawn.append(tensor.flatten()[places])
    threshold = torch.quantile(torch.cat(drawn), 1 - fraction)
    return [tensor > threshold for tensor in scores]
