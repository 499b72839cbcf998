"""A mask of every kind, a direction, and training, for the tests of safeopt.parametrize."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from conftest import make_llama
from torch import Tensor, nn

from safeopt import AlignmentDirection, SafetyMask

HYPER = {"lr": 3e-3, "betas": (0.85, 0.95), "eps": 1e-6, "weight_decay": 0.13}
WHOLE = "model.layers.0.post_attention_layernorm.weight"
NOTHING = "model.norm.weight"
ROWS = "model.layers.0.self_attn.q_proj.weight"
COLUMNS = "model.layers.0.mlp.down_proj.weight"
ELEMENTS = "model.layers.0.self_attn.k_proj.weight"


def example_mask(model: nn.Module) -> SafetyMask:
    """Rows, columns, elements, a whole tensor, nothing of one, and parameters not named."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, elements = {}, {}, {}
    for name, p in model.named_parameters():
        if any(part in name for part in ("q_proj", "gate_proj", "embed_tokens", "lm_head")):
            rows[name] = torch.rand(p.shape[0], generator=generator) < 0.6
        if any(part in name for part in ("o_proj", "down_proj")):
            columns[name] = torch.rand(p.shape[1], generator=generator) < 0.4
        if any(part in name for part in ("k_proj", "1.input_layernorm")):
            elements[name] = torch.rand(p.shape, generator=generator) < 0.3
    elements[NOTHING] = torch.zeros(32, dtype=torch.bool)
    mask = SafetyMask.from_rows(rows, model) | SafetyMask.from_columns(columns, model)
    return mask | SafetyMask.from_bool(elements) | SafetyMask.from_tensors([WHOLE], model)


def example_direction(model: nn.Module, operator: str = "subspace") -> AlignmentDirection:
    wanted = [n for n, _ in model.named_parameters() if "v_proj" in n or "down_proj" in n]
    rank = 4 if operator == "subspace" else None
    return AlignmentDirection.between(
        model, make_llama(seed=1), parameters=wanted, operator=operator, rank=rank
    )


def batch(step: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 300, (rows, 11), generator=generator)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **HYPER)


def logits(model: Any) -> Tensor:
    return model(batch(99)).logits.detach()


def parts(model: nn.Module, name: str) -> tuple[Tensor, Any]:
    """`original` and the parametrization of a weight."""
    path, attribute = name.rsplit(".", 1)
    plist = model.get_submodule(path).parametrizations[attribute]
    return plist.original, plist[0]
