"""Mean and variance of the inputs of a model's second matrices, while prompts go by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.methods.linear_inputs import Tokens, counted
from safeopt.ranks import refuse_sharded
from safeopt.scores import Batch, texts
from safeopt.units import UnitGroup, UnitMap
from safeopt.units.experts import expert_channels, routing


class Moments:
    """Mean and sum of squared deviations of every channel, in float64, updated batch by batch.

    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1. A
    batch's own moments are taken in float32 (float64 for float64 inputs), in two passes.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """Take in tokens: x of shape (tokens, channels), any floating dtype."""
        n = len(x)
        if not n:
            return
        x = x if x.dtype == torch.float64 else x.float()
        mean = x.mean(0)
        squares = (x - mean).square_().sum(0).double()
        step = mean.double() - self.mean
        total = self.count + n
        self.mean.add_(step, alpha=n / total)
        self.squares.add_(squares).add_(step.square_(), alpha=self.count * n / total)
        self.count = total

    def variance(self) -> Tensor:
        """The sample variance, divided by count - 1: float64 (channels,); 0 below two tokens."""
        return self.squares / max(self.count - 1, 1)


class MomentHooks:
    """Hooks that keep the `Moments` of every group's channels; the model's output is not touched.

    A dense matrix is seen at its input. The channels of fused experts exist only inside their
    module, so they are computed once more, for the tokens that count and are routed to the expert:
    two of an expert's three products again.

    Args:
        model: in evaluation mode.
        units: its units.
        tokens: "response" (labels that are not IGNORED) or "all" (all but padding).

    Raises:
        ValueError: an expert that is a module of its own, which sees tokens of unknown origin.
        NotImplementedError: the model is sharded over processes.
    """

    def __init__(self, model: nn.Module, units: UnitMap, tokens: Tokens) -> None:
        refuse_sharded(model, "looking at the inputs of weights")
        self._model = model
        self._tokens = tokens
        self._shape: tuple[int, ...] = ()
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self.moments: dict[str, Moments] = {}
        self._handles: list[Any] = []
        apart = [n for n, group in units.items() if group.kind == "expert" and group.expert is None]
        if apart:
            raise ValueError(
                f"group {apart[0]!r} is an expert in a module of its own, which sees tokens that"
                " cannot be told apart; load the model with transformers 5, which stacks them"
            )
        modules = {names.canonical(path): module for path, module in model.named_modules()}
        weights = names.parameters(model)
        stacks: dict[str, list[UnitGroup]] = {}
        for name, group in units.items():
            weight, owner = weights[group.read.name], group.read.name.rpartition(".")[0]
            channels = weight.shape[-1 if group.read.axis == "column" else -2]
            self.moments[name] = Moments(channels, weight.device)
            if group.expert is None:
                hook = self._dense(name)
                self._handles.append(modules[owner].register_forward_pre_hook(hook))
            else:
                stacks.setdefault(owner, []).append(group)
        for owner, groups in stacks.items():
            stacked = self._stack(groups)
            module = modules[owner]
            self._handles.append(module.register_forward_pre_hook(stacked, with_kwargs=True))

    def run(self, batch: Batch) -> None:
        """One forward pass; ValueError for a prompt without tokens that count.

        Raises FloatingPointError if an activation is not finite.
        """
        where = counted(batch, self._tokens)
        self._shape = tuple(where.shape)
        self._chosen = where.reshape(-1).nonzero()[:, 0]
        with torch.no_grad():
            self._model(**{k: batch[k] for k in ("input_ids", "attention_mask") if k in batch})
        sums = [moments.squares.sum() for moments in self.moments.values()]
        device = sums[0].device
        finite = torch.stack([each.to(device) for each in sums]).isfinite()
        if not finite.all():
            name = list(self.moments)[int((~finite).nonzero()[0])]
            raise FloatingPointError(
                f"the activations that {name!r} hands on are NaN or infinite, on one of the prompts"
                f" {texts(batch)}; leave it out, or use float32"
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _dense(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.moments[name].add(self._counted(name, inputs[0]))

        return see

    def _stack(self, groups: list[UnitGroup]) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            hidden, routed, _ = routing(module, args, kwargs)
            hidden = self._counted(groups[0].name, hidden)
            routed = routed.index_select(0, self._chosen.to(routed.device))
            for group in groups:
                tokens = (routed == group.expert).any(1)
                self.moments[group.name].add(expert_channels(module, group.expert, hidden[tokens]))

        return see

    def _counted(self, name: str, x: Tensor) -> Tensor:
        rows, tokens = self._shape
        if x.shape[:-1] not in ((rows, tokens), (rows * tokens,)):
            raise ValueError(
                f"the reading matrix of {name!r} sees {tuple(x.shape)}, not (rows, tokens,"
                f" channels) with {rows} rows and {tokens} tokens; its tokens cannot be told apart"
            )
        return x.reshape(-1, x.shape[-1]).index_select(0, self._chosen.to(x.device))
