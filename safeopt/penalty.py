"""The AsFT penalty of a whole model, for people who add it to a loss of their own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.direction import AlignmentDirection

SHOWN = 5  # names spelled out in one error message
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # see `require_plain_start`


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One LoRA adapter: scaling * B A is added to the weight `name`; B (out, r), A (r, in)."""

    name: str
    B: Tensor
    A: Tensor
    scaling: float


def asft_penalty(
    model: nn.Module,
    direction: AlignmentDirection,
    lam: float,
    *,
    anchor: nn.Module | Mapping[str, Tensor] | None = None,
    scale: bool = False,
) -> Tensor:
    """The sum of lam * ||(I - C) dW||_F^2 over matrices, to be added to a loss.

    dW is B A of the active LoRA adapter (PEFT), paired with the base weight it belongs to by name;
    or, with an anchor, W - W_anchor for every matrix of the direction. Under gradient accumulation
    add it to one micro-batch only, or divide lam by their number: else its strength grows with it.
    That the base weights, or the anchor, are those of the aligned model is for `direction.check` to
    see, once before training.

    Args:
        model: a PEFT model whose adapters all lie on matrices of the direction, or, with an anchor,
            any model that has those matrices. What the direction does not cover is not penalised:
            norms, biases, embeddings, `modules_to_save`.
        direction: on the device of the model; `direction.complement()` penalises ||C dW||_F^2, for
            one that is to be avoided.
        lam: strength, at least 0; the authors use 1, with "safelora" and without alpha / r.
        anchor: for full fine-tuning, the model or the tensors by name before training, on any
            device; it may hold more than the direction covers.
        scale: for LoRA, count alpha / r into dW, so that lam is in units of the true update. False
            is the authors' form: with alpha 32 and r 8 it is lam / 16 in those units.

    Returns:
        0-d, float32 also under autocast (float64 for float64 weights), on the device of the first
        matrix. Only r x r and d x r products are made for LoRA.

    Raises:
        ValueError: no adapters and no anchor, or both; an adapter on a weight that the direction
            lacks; several active adapters on one weight; DoRA and other variants, adapters of
            Conv1D layers and of bare parameters, whose dW is not B A of shape (out, in); adapters
            that moved the base weights when they were made (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA); a
            matrix of the direction that model or anchor lack; lam negative or not finite.

    Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Eq. 4, and the authors' code, whose value this
    is for LoRA with a whole-rank "safelora" direction. Differs from the authors' code: pairs by
    name and not by order, in factored form.
    """
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam={lam}; give a finite number of at least 0 (the authors use 1)")
    pairs = lora_pairs(model)
    if anchor is not None:
        if pairs:
            raise ValueError(
                f"anchor is for full fine-tuning, and the model has LoRA adapters ({pairs[0].name})"
                " whose base weights do not move: leave anchor out"
            )
        return lam * _sum(_full(model, direction, anchor))
    if not pairs:
        raise ValueError(
            "the model has no active LoRA adapters; for full fine-tuning pass anchor=, the weights"
            " before training"
        )
    require_covered(pairs, direction)
    return lam * _sum(
        [
            direction.penalty_lora(pair.name, pair.B, pair.A, pair.scaling if scale else 1.0)
            for pair in pairs
        ]
    )


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The active LoRA adapters of a PEFT model, each under the canonical name of its base weight.

    Raises:
        ValueError: see `asft_penalty`.
    """
    pairs = []
    for path, module in model.named_modules():  # the PEFT model itself may lie within DDP or FSDP
        for adapter, config in (getattr(module, "peft_config", None) or {}).items():
            require_plain_start(getattr(config, "init_lora_weights", None), f"adapter {adapter!r}")
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        name = names.canonical(f"{path}.weight")
        inner = [*module.lora_A, *getattr(module, "lora_embedding_A", ())]
        active = [key for key in module.active_adapters if key in inner]
        if len(active) > 1:
            raise ValueError(
                f"several adapters are active on {name!r}: {', '.join(active)}; activate one with"
                " model.set_adapter(name)"
            )
        for key in active:
            _require_plain(module, key, name)
            A, B = module.lora_A[key].weight, module.lora_B[key].weight
            pairs.append(LoraPair(name, B, A, float(module.scaling[key])))
    return pairs


def require_covered(pairs: list[LoraPair], direction: Collection[str]) -> None:
    """ValueError that names the adapters whose base weight the direction lacks, with near misses.

    An adapter is never left out silently: it would be free to undo what the others protect.
    """
    missing = [pair.name for pair in pairs if pair.name not in direction]
    if not missing:
        return
    lines = []
    for name in missing[:SHOWN]:
        near = difflib.get_close_matches(name, list(direction), n=2)
        lines.append(f"  {name!r}" + (f" (the direction has {near})" if near else ""))
    if len(missing) > SHOWN:
        lines.append(f"  and {len(missing) - SHOWN} more")
    raise ValueError(
        f"the direction lacks {len(missing)} of the {len(pairs)} weights with adapters:\n"
        + "\n".join(lines)
        + "\nMake it with parameters= that cover them, or adapt other layers (target_modules)."
    )


def require_plain_start(init: object, where: str) -> None:
    """ValueError for a start of LoRA that takes B A out of the base weights before training.

    There B A is not what training changed, but that plus what was taken out.

    Args:
        init: `init_lora_weights` of the adapter's PEFT configuration.
        where: the adapter in words, for the message.
    """
    if isinstance(init, str) and init.lower().startswith(MOVED_BASE):
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, which moves the base weights, so that B A is"
            " not the change; train with init_lora_weights=True, or convert the trained adapter to"
            " a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _require_plain(module: nn.Module, key: str, name: str) -> None:
    """ValueError unless what this adapter adds to its weight is B A, of the weight's shape."""
    reason = None
    if key not in module.lora_A:  # type: ignore[operator]
        reason = "is on an embedding, which no direction covers"
    elif hasattr(module, "parameter_name"):
        reason = "is on a bare parameter (target_parameters)"
    elif key in getattr(module, "lora_variant", {}):
        reason = f"is no plain LoRA ({type(module.lora_variant[key]).__name__})"  # type: ignore
    elif getattr(module, "fan_in_fan_out", False):
        reason = "is on a Conv1D, which stores its weight as (in, out)"
    if reason:
        raise ValueError(
            f"the adapter {key!r} of {name!r} {reason}: its change is not B A, and is not"
            " penalised; adapt other layers, or fine-tune fully with anchor="
        )


def _full(
    model: nn.Module, direction: AlignmentDirection, anchor: nn.Module | Mapping[str, Tensor]
) -> list[Tensor]:
    current, start = names.parameters(model), names.parameters(anchor)
    names.require(direction, current, "direction, for this model")
    names.require(direction, start, "direction, for this anchor")
    values = []
    for name in direction:
        weight, before = current[name], start[name]
        if before.shape != weight.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(weight.shape)} in the model and {tuple(before.shape)}"
                " in the anchor; give the weights of this model before training"
            )
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        values.append(
            direction.penalty(name, weight.to(wide) - before.detach().to(weight.device, wide))
        )
    return values


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum()
