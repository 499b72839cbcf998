"""What the tests of trainers share: masks, rows, arguments, and a reporter that writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_llama
from helpers import same_bits
from torch import Tensor, nn

from safeopt import SafetyMask

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "save_steps": 3,
    "logging_steps": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 4,
}


def llama(**overrides: Any) -> Any:
    return make_llama(**overrides)


def mask_of(model: nn.Module, share: float = 0.3) -> SafetyMask:
    """An element mask of every matrix but the last, which it takes whole."""
    draw = torch.Generator().manual_seed(1)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    last = list(matrices)[-1]
    return SafetyMask.from_bool(
        {
            name: torch.rand(p.shape, generator=draw) < (1 if name == last else share)
            for name, p in matrices.items()
        }
    )


def rows(n: int = 12, length: int = 9) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 300, (n, length), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **settings: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_protected(model: nn.Module, start: dict[str, Tensor], mask: SafetyMask) -> None:
    """Frozen elements have their bits, and of the others some moved in every tensor."""
    for name, p in model.named_parameters():
        frozen = mask.to_bool(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        assert same_bits(p[frozen].detach(), start[name][frozen]), name
        assert frozen.all() or not torch.equal(p[~frozen], start[name][~frozen]), name


def reporter() -> Any:
    """A callback that stands where report_to's do, and keeps what it is told."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.told: list[dict[str, Any]] = []

        def on_log(self, args, state, control, logs=None, **_):
            self.told.append(dict(logs))

    return Reporter()
