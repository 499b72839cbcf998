"""What enters the linear maps of a model while prompts go by, at the tokens that count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from safeopt.ranks import refuse_sharded
from safeopt.scores import IGNORED, Batch, texts

Tokens = Literal["response", "all"]

Take: TypeAlias = Callable[[str, Tensor, "int | None"], None]
"""Gets the name of a weight, its inputs (tokens, in), and for a stack which expert they entered."""

UP = ("gate_up_proj", "up_proj")
"""The first matrix of an expert in the stacks of transformers 5; the second is `down_proj`."""


class LinearInputs:
    """Hands the inputs of linear maps to a function, by forward hooks alone.

    A stack of fused experts is seen at the door of its module: what a token brings to each expert
    it is routed to. The input of `down_proj` never passes a hook, so it is computed once more, for
    the tokens that count, with the module's own activation: about two thirds of the experts' work.

    Args:
        model: in evaluation mode.
        targets: weights by name: of nn.Linear, of transformers' Conv1D, or expert stacks
            `gate_up_proj` (or `up_proj`) and `down_proj` as transformers 5 lays them out.
        take: called once per weight, expert and forward pass; not for an expert without tokens.

    Attributes:
        transposed: names of the weights that are stored (in, out), as GPT-2's Conv1D and GPT-OSS's
            experts; all others are (out, in), as nn.Linear.
        unseen: names of the weights whose module has not run so far.

    Raises:
        ValueError: a weight of another kind of module, or an expert stack of another layout.
        NotImplementedError: the model is sharded over processes.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Tensor], take: Take) -> None:
        refuse_sharded(model, "looking at the inputs of weights")
        self.transposed: set[str] = set()
        self.unseen = set(targets)
        self._model, self._take = model, take
        self._shape, self._counted = torch.Size(), torch.empty(0, dtype=torch.int64)
        self._last: tuple[Tensor, int, Tensor] | None = None
        wanted = {id(weight): name for name, weight in targets.items()}
        found: list[tuple[nn.Module, Any]] = []
        for path, module in model.named_modules():
            held = {
                part: wanted[id(weight)]
                for part, weight in module.named_parameters(recurse=False)
                if id(weight) in wanted
            }
            if held:
                found.append((module, self._hook(path, module, held)))
        self._handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in found
        ]

    def run(self, batch: Batch, tokens: Tokens) -> None:
        """One forward pass over a batch, without gradients.

        Raises:
            ValueError: see `counted`; a module that was given other rows than the batch's tokens.
        """
        # As indices: picking by a bool mask takes three times as long.
        self._counted = counted(batch, tokens).flatten().nonzero().flatten()
        self._shape = batch["input_ids"].shape
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        try:
            # Tensors of inference mode would not tell whether they have changed.
            with torch.inference_mode(False), torch.no_grad():
                self._model(**inputs)
        finally:
            self._last = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str, module: nn.Module, held: dict[str, str]) -> Any:
        conv = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if set(held) == {"weight"} and (conv or isinstance(module, nn.Linear)):
            name = held["weight"]
            self.transposed |= {name} if conv else set()
            return self._linear_hook(name, path)
        layout = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "down_proj")
        stack = all(hasattr(module, part) for part in layout)
        if not stack or not set(held) <= {*UP, "down_proj"}:
            raise ValueError(
                f"{next(iter(held.values()))!r} is held by {path or 'the model'!r}"
                f" ({type(module).__name__}), which is no nn.Linear, no Conv1D and no expert stack"
                " of transformers 5, so its input cannot be told; leave it out, or use a scorer"
                " that reads gradients (SNIP, ESI)"
            )
        self.transposed |= set(held.values()) if module.is_transposed else set()
        return self._experts_hook(held, path)

    def _linear_hook(self, name: str, path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0]
            self.unseen.discard(name)
            self._take(name, self._picked(x, path), None)

        return look

    def _experts_hook(self, held: dict[str, str], path: str) -> Callable[..., None]:
        first = next((held[part] for part in UP if part in held), None)
        second = held.get("down_proj")

        def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            x, index, *_ = bound.values()
            self.unseen -= set(held.values())
            x, index = self._picked(x, path), self._picked(index, path)
            for expert in index.unique().tolist():
                if expert >= len(module.down_proj):  # a mark for experts on another rank
                    continue
                reached = x[(index == expert).any(1)]
                if first is not None:
                    self._take(first, reached, expert)
                if second is not None:
                    self._take(second, _between(module, reached, expert), expert)

        return look

    def _picked(self, x: Tensor, path: str) -> Tensor:
        """The rows of x at the tokens that count; for one x (q, k, v) the same tensor again."""
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2]
        if x.shape[:-1] not in (self._shape, (self._shape.numel(),)):
            raise ValueError(
                f"{path!r} was given {tuple(x.shape[:-1])} rows for {tuple(self._shape)} tokens, so"
                " it cannot be told which tokens they are; is it an expert that is a module of its"
                " own? SNIP and ESI score those"
            )
        picked = x.reshape(-1, x.shape[-1]).index_select(0, self._counted.to(x.device))
        self._last = (x, x._version, picked)
        return picked


def counted(batch: Batch, tokens: Tokens) -> Tensor:
    """Which tokens of a batch count: bool, shape (rows, tokens).

    "response": the response's own tokens, where labels are set; "all": all but padding.

    Raises:
        ValueError: a row without any such token, naming the prompt; no labels for "response".
    """
    ids = batch["input_ids"]
    if tokens == "response" and batch.get("labels") is None:
        raise ValueError(
            "the batch has no 'labels'; give rows with an instruction and a response, or use"
            " tokens='all'"
        )
    present = batch.get("attention_mask")
    found = torch.ones_like(ids, dtype=torch.bool) if present is None else present.bool()
    if tokens == "response":
        found = found & (batch["labels"] != IGNORED)
    for text, some in zip(texts(batch), found.any(1).tolist(), strict=True):
        if not some:
            raise ValueError(
                f"no {tokens} tokens for the prompt {text!r}; give every prompt a response that"
                " max_length leaves room for, or use tokens='all'"
            )
    return found


def require_tokens(tokens: str) -> None:
    """ValueError unless `tokens` names a policy."""
    if tokens not in ("response", "all"):
        raise ValueError(f"tokens is {tokens!r}; it must be one of ('response', 'all')")


def _between(module: Any, x: Tensor, expert: int) -> Tensor:
    """What enters an expert's second matrix."""
    part = UP[0] if module.has_gate else UP[1]
    weight = getattr(module, part)[expert]
    inner = x @ (weight if module.is_transposed else weight.mT)
    if module.has_bias:
        inner = inner + getattr(module, f"{part}_bias")[expert]
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
