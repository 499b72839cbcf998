"""LoRA in a comparison: adapters for training, merged copies for measuring."""

from __future__ import annotations

import copy
from typing import Any

import torch

from safeopt.compare.kinds import Plan
from safeopt.compare.settings import Settings


def with_adapters(model: Any, settings: Settings, seed: int) -> Any:
    """The model with LoRA adapters as the settings say, or as it is for a LoRA rank of 0.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer of the model has one of the wanted names.
    """
    if not settings.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "a comparison with LoRA needs peft; pip install 'torch-safeopt[hf]'"
        ) from error
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A starts at random; every arm of a seed gets the same one
        return get_peft_model(model, config)


def as_measured(model: Any, plan: Plan) -> Any:
    """The model as it would be deployed: mended where the plan says so, and adapters merged.

    Both happen to a copy, so that training goes on as if nothing had been measured.
    """
    adapted = hasattr(model, "merge_and_unload")
    if plan.after is None and not adapted:
        return model
    measured = copy.deepcopy(model)
    if plan.after is not None:
        plan.after(measured)
    return measured.merge_and_unload() if adapted else measured
