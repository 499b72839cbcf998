"""Whether a trainer protects anything, and whether its checkpoints can be loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from safeopt.names import canonical
from safeopt.optim import AsFTAdamW, SafeAdamW
from safeopt.optim.frozen import frozen_parameters

HOW = (
    "Give Trainer optimizer_cls_and_kwargs=safe_optimizer(args, freeze=mask), or make a trainer"
    " class with SafeOptTrainerMixin"
)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, SafeAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_parametrized_by_us(model: nn.Module) -> bool:
    """Whether `safeopt.parametrize` rules some weight of the model."""
    rules = (
        rule
        for module in model.modules()
        if is_parametrized(module)
        for chain in module.parametrizations.values()  # type: ignore[operator]
        for rule in chain
    )
    return any(type(rule).__module__.startswith("safeopt.parametrize") for rule in rules)


def require_protection(optimizer: Any, model: nn.Module) -> SafeAdamW | None:
    """The optimizer of ours that protects weights of this model.

    None where a parametrization of ours does, under some other optimizer.

    Raises:
        RuntimeError: neither; or ours protects nothing, or has other parameters than the model.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, SafeAdamW):
        if is_parametrized_by_us(model):
            return None
        raise RuntimeError(
            f"nothing is protected: the trainer steps with {type(inner).__name__}, not with an"
            f" optimizer of safeopt. The trainer has built its own. {HOW}"
        )
    _require_active(inner, model)
    _require_same_parameters(inner, model)
    return inner


def _require_active(optimizer: SafeAdamW, model: nn.Module) -> None:
    if next(frozen_parameters(optimizer), None) is not None or is_parametrized_by_us(model):
        return
    groups, kind = optimizer.param_groups, type(optimizer).__name__
    anchored = optimizer._anchor is not None and any(g["anchor_strength"] for g in groups)
    directed = isinstance(optimizer, AsFTAdamW) and any(group["lam"] for group in groups)
    if anchored or directed:
        return
    if optimizer._live is not None:
        raise RuntimeError(
            f"nothing is protected: the {optimizer._live.argument}= mask of this {kind} freezes no"
            " element of the model; look at mask.summary()"
        )
    raise RuntimeError(
        f"nothing is protected: this {kind} has no mask and no anchor or direction of a strength"
        f" above 0, which makes it plain AdamW. {HOW}"
    )


def _require_same_parameters(optimizer: SafeAdamW, model: nn.Module) -> None:
    of_model = {canonical(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for group in optimizer.param_groups:
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
            if of_model.get(canonical(name)) is p:
                continue
            what = "has no such parameter" if canonical(name) not in of_model else "has another one"
            raise RuntimeError(
                f"the optimizer holds {name!r} of shape {tuple(p.shape)}, and the model that the"
                f" trainer trains {what}: it was built for another model, or before this one was"
                f" replaced, and its steps would move nothing here. {HOW}"
            )


def require_loadable(model: nn.Module) -> None:
    """RuntimeError for a parametrized model whose state dict has names that no plain model has."""
    if not any(is_parametrized(module) for module in model.modules()):
        return
    strange = [key for key in model.state_dict() if "parametrizations" in key.split(".")]
    if strange:
        raise RuntimeError(_STRANGE.format("the model's state dict", strange[0]))


def require_plain_checkpoint(folder: Path) -> None:
    """RuntimeError when a saved model or adapter has names of parametrizations in it."""
    for name in ("model", "adapter_model"):
        index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        keys: list[str] = []
        if index.is_file():
            keys = list(json.loads(index.read_text("utf-8"))["weight_map"])
        elif single.is_file():
            with safe_open(single, framework="pt") as opened:
                keys = list(opened.keys())
        strange = [key for key in keys if "parametrizations" in key.split(".")]
        if strange:
            raise RuntimeError(_STRANGE.format(f"the checkpoint {folder}", strange[0]))


_STRANGE = (
    "{} holds {!r}, a name of torch.nn.utils.parametrize: from_pretrained would make that weight"
    " anew, at random. Parametrize with safeopt.parametrize, whose models are saved under plain"
    " names, or remove the parametrization before saving"
)
