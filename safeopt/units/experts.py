"""What happens inside the fused experts of transformers 5: who goes where, and the channels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def routing(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What fused experts are called with: hidden states, experts and weights of every token."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return list(bound.arguments.values())[1:4]


def expert_channels(module: Any, expert: int | None, hidden: Tensor) -> Tensor:
    """The input of one fused expert's down_proj: (tokens, H) to (tokens, I), by its own formula."""
    weight = module.gate_up_proj[expert]
    value = hidden @ (weight if getattr(module, "is_transposed", False) else weight.T)
    if getattr(module, "gate_up_proj_bias", None) is not None:
        value = value + module.gate_up_proj_bias[expert]
    return module._apply_gate(value)
