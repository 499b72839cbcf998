"""Which modules of a model are its blocks (decoder layers), and which parameters lie in a range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from safeopt import names

Layers = tuple[int, int] | Sequence[int]
"""The first and the last block of a range, counted from 0; the last one belongs to it."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, in order; made by `blocks_of`."""

    name: str
    modules: tuple[nn.Module, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.modules)

    def check(self, layers: Layers, what: str = "layers") -> tuple[int, int]:
        """The range as two ints: (6, 14) is 9 blocks.

        Raises:
            ValueError: not two ints with 0 <= first <= last < blocks; the message says `what`.
        """
        ends = tuple(layers) if isinstance(layers, Sequence) else (layers,)
        whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        if len(ends) != 2 or not whole or not 0 <= ends[0] <= ends[1] < len(self):
            raise ValueError(
                f"{what} is {layers}; give (first, last), both counted from 0 and both in the"
                f" range, with 0 <= first <= last <= {len(self) - 1} ({self.name!r} has"
                f" {len(self)} blocks)"
            )
        return ends

    def parameters(self, model: nn.Module, layers: Layers) -> list[str]:
        """Canonical names of all parameters in a range; a tied tensor by the model's first name."""
        first, last = self.check(layers)
        heads = tuple(f"{self.name}.{i}." for i in range(first, last + 1))
        known = names.aliases(model)
        every = (names.canonical(raw) for raw, _ in model.named_parameters(remove_duplicate=False))
        return list(dict.fromkeys(known.get(n, n) for n in every if n.startswith(heads)))


def blocks_of(model: nn.Module, name: str | None = None) -> Blocks:
    """The blocks of a language model: its outermost ModuleList of as many modules as it has layers.

    Args:
        model: any module. The number of layers is its config's `num_hidden_layers` (of the text
            model, where there are several); without a config every outermost ModuleList counts.
        name: the ModuleList's name, such as "model.layers", where that does not decide.

    Raises:
        ValueError: no such ModuleList, several, or one with a single block, in which no range of
            layers can be told from the model.
    """
    lists = {
        names.canonical(raw): module
        for raw, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if name is not None:
        found = {key: lists[key] for key in [names.canonical(name)] if key in lists}
    else:
        count = _layers(model)
        found = {key: lists[key] for key in lists if count in (None, len(lists[key]))}
        inner = {key for key in found if any(key.startswith(f"{other}.") for other in found)}
        found = {key: module for key, module in found.items() if key not in inner}
    if len(found) != 1:
        sizes = ", ".join(f"{key!r} ({len(module)})" for key, module in lists.items()) or "none"
        raise ValueError(
            f"the blocks of {type(model).__name__} are not clear"
            + (f": {name!r} is none of its lists of modules" if name is not None else "")
            + f"; name the list that holds them with blocks=. Lists of modules there are: {sizes}"
        )
    ((key, module),) = found.items()
    if len(module) < 2:
        raise ValueError(
            f"{key!r} of {type(model).__name__} holds one block only; safety layers are a range"
            " among several blocks, so give a model with at least two"
        )
    return Blocks(key, tuple(module))


def _layers(model: Any) -> int | None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    return getattr(text, "num_hidden_layers", None)
