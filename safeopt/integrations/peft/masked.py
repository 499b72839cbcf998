"""What a PEFT model trains on the weights in which a mask selects something.

A mask names base weights and an adapter has names of its own: whatever acts on a selected weight
and is not found here would be free to move it. So all that could act on it is found, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.bitmask import BitMask
from safeopt.mask import SafetyMask
from safeopt.penalty import LoraPair, require_plain_start

# Components that PEFT adds to the name of a weight it leaves as it was, and to trained tensors.
KEPT, COPIED = ("original_module", "token_adapter"), "modules_to_save"
TRAINED = ("lora_", "shira_", "trainable_tokens_")


@dataclass(frozen=True, eq=False)
class Adapter(LoraPair):
    """An active LoRA adapter on a weight in which `rule` selects.

    `place` is the canonical path of its layer, `key` the adapter's name; `weight` is None where the
    base layer keeps no parameter of that name (GPTQ and the like).
    """

    module: Any
    place: str
    key: str
    rule: BitMask
    weight: Tensor | None


@dataclass(frozen=True, eq=False)
class Copy:
    """A trained copy of the weight `weight`, as PEFT makes them for modules_to_save."""

    name: str
    weight: str
    copy: Tensor
    original: Tensor
    rule: BitMask


@dataclass(frozen=True, eq=False)
class Masked:
    """All that acts on the selected weights; `bases` are these weights, under every name."""

    adapters: list[Adapter] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    bases: dict[str, tuple[Tensor, BitMask]] = field(default_factory=dict)


def masked(model: nn.Module, mask: SafetyMask, kind: str = "lora_A") -> Masked:
    """What the mask rules in a PEFT model; weights it does not name, or selects nothing in, are not
    looked at.

    Args:
        model: a PEFT model.
        mask: over base weights.
        kind: the attribute that marks a layer of the adapters that may lie on selected weights.

    Raises:
        ValueError: a name that matches no base weight; other shapes; two masks for one tied weight;
            on a selected weight: adapters of another kind, and LoRA whose change is not B A,
            several active, or merged.
    """
    bases, tuners = _base_parameters(model), _tuners(model)
    first: dict[int, str] = {}
    for name, tensor in bases.items():
        first.setdefault(id(tensor), name)
    known = {name: first[id(tensor)] for name, tensor in bases.items()}
    for place, modules in tuners.items():  # quantised layers may have no parameter of that name
        if any(is_lora(module) for module in modules):
            known.setdefault(f"{place}.weight", f"{place}.weight")
    names.require(mask, known, "mask, for the base weights of this model")
    rules = _rules(mask, known)
    found = Masked()
    for name, owner in known.items():
        if owner not in rules:
            continue
        rule, weight = rules[owner], bases.get(owner)
        if weight is not None and not is_quantised(weight):
            _require_shape(owner, rule, weight.shape)
        if weight is not None:
            found.bases[name] = weight, rule
        for place, rest in _parents(name):
            for module in tuners.get(place, ()):
                if hasattr(module, "trainable_tokens_delta"):
                    _require_other_tokens(module, rest, name, rule)
                elif not hasattr(module, kind):
                    raise _refused(name, f"an adapter of another kind ({type(module)})")
                elif is_lora(module):
                    for key in _active(module, rest, name):
                        B, A = module.lora_B[key].weight, module.lora_A[key].weight
                        _require_shape(name, rule, (B.shape[0], A.shape[1]))
                        s = float(module.scaling[key])
                        found.adapters.append(
                            Adapter(name, B, A, s, module, place, key, rule, weight)
                        )
    _require_starts(model, {adapter.key for adapter in found.adapters})
    for name, tensor in _copies(model).items():
        head, _, rest = name.partition(f".{COPIED}.")
        weight_name = f"{head}.{rest.partition('.')[2]}"
        owner = known.get(weight_name, weight_name)
        if owner in rules:
            found.copies.append(Copy(name, owner, tensor, bases[weight_name], rules[owner]))
    return found


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a layer with LoRA adapters."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def is_quantised(weight: Tensor) -> bool:
    """Whether a parameter holds packed integers (bitsandbytes), not the values of a weight."""
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base model's parameters by the name they have in it; tied ones under every name."""
    found: dict[str, Tensor] = {}
    for raw, tensor in model.named_parameters(remove_duplicate=False):
        parts = names.canonical(raw).split(".")
        if COPIED not in parts and not any(part.startswith(TRAINED) for part in parts):
            found[".".join(part for part in parts if part not in KEPT)] = tensor
    return found


def require_equal(copy: Copy) -> None:
    """ValueError if a trained copy differs from its original on selected elements."""
    selected = copy.rule.to_bool(copy.copy.device)
    original = copy.original.detach().to(selected.device)
    if not torch.equal(copy.copy.detach()[selected], original[selected]):
        raise ValueError(
            f"{copy.name!r} is a trained copy of {copy.weight!r} that differs from it on selected"
            " elements; start from a fresh copy (get_peft_model), or merge with merge_masked, which"
            " puts them back"
        )


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {
        names.canonical(raw): tensor
        for raw, tensor in model.named_parameters()
        if COPIED in raw.split(".")
    }


def _tuners(model: nn.Module) -> dict[str, list[Any]]:
    """PEFT's layers by the path that the layer they wrap has in the base model."""
    found: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and not hasattr(module, "original_module"):
            parts = names.canonical(path).split(".")
            found.setdefault(".".join(p for p in parts if p not in KEPT), []).append(module)
    return found


def _rules(mask: SafetyMask, known: dict[str, str]) -> dict[str, BitMask]:
    """The masks that select something, tied weights under the first of their names."""
    rules: dict[str, BitMask] = {}
    for name, rule in mask.items():
        if rules.setdefault(known[name], rule) != rule:
            raise ValueError(
                f"{name!r} and another name of the tied weight {known[name]!r} carry different"
                " masks; keep one of them, or combine them with | or &"
            )
    return {name: rule for name, rule in rules.items() if bool(rule.bits.any())}


def _parents(name: str) -> Iterator[tuple[str, str]]:
    """("a.b", "c") and ("a", "b.c") of "a.b.c"."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:length]), ".".join(parts[length:])


def _active(module: Any, rest: str, name: str) -> list[str]:
    """The adapter, if any, by which a LoRA layer changes its tensor `rest`."""
    held = [*module.lora_A, *module.lora_embedding_A]
    active = [key for key in module.active_adapters if key in held]
    parameter = getattr(module, "parameter_name", None)
    if not active or rest == "bias" or (parameter is not None and rest != parameter):
        return []
    if len(active) > 1:
        raise ValueError(
            f"several adapters are active on {name!r}: {', '.join(active)}; activate one with"
            " model.set_adapter(name)"
        )
    reason = _other_than_plain(module, active[0], rest)
    if reason:
        raise _refused(name, reason)
    if getattr(module, "merged", False):
        raise ValueError(
            f"the adapter of {name!r} is merged into its weight; call model.unmerge_adapter() first"
        )
    return active


def _other_than_plain(module: Any, key: str, rest: str) -> str | None:
    """What an adapter is, in words, if its change is not B A of the weight's shape."""
    if key not in module.lora_A:
        return "an adapter on an embedding"
    if hasattr(module, "parameter_name") or rest != "weight":
        return f"an adapter on the bare parameter {rest!r}"
    if key in getattr(module, "lora_variant", {}):
        return f"no plain LoRA ({type(module.lora_variant[key]).__name__})"
    if getattr(module, "fan_in_fan_out", False):
        return "an adapter on a Conv1D, which stores its weight as (in, out)"
    if module.lora_A[key].weight.dim() != 2:
        return "an adapter on a convolution"
    return None


def _refused(name: str, what: str) -> ValueError:
    return ValueError(
        f"the mask selects elements of {name!r}, which has {what}: what it adds to the weight is"
        " not scaling * B A with B of one row per row of the weight, so the selection cannot be"
        " held in it. Leave this layer out of target_modules, or use a plain LoRA, or train the"
        " weights themselves (SafeAdamW on the merged model)"
    )


def _require_other_tokens(module: Any, rest: str, name: str, rule: BitMask) -> None:
    """ValueError if the mask selects in rows that trainable_token_indices replaces."""
    if rest != "weight":
        return
    rows = rule.to_bool("cpu").any(dim=1)
    for indices in module.token_indices.values():
        hit = [token for token in indices if bool(rows[token])]
        if hit:
            raise ValueError(
                f"the mask selects elements of the rows {hit[:5]} of {name!r}, which"
                " trainable_token_indices trains; leave these tokens out of one of the two"
            )


def _require_shape(name: str, rule: BitMask, shape: torch.Size | tuple[int, ...]) -> None:
    if tuple(rule.shape) != tuple(shape):
        raise ValueError(
            f"the mask for {name!r} has shape {tuple(rule.shape)}, the weight has {tuple(shape)}:"
            " the mask was made for another model"
        )


def _require_starts(model: nn.Module, keys: set[str]) -> None:
    """ValueError for adapters that moved the base weights when they were made, or copied layers."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None) or {}
        for key in keys & set(configs):
            require_plain_start(
                getattr(configs[key], "init_lora_weights", None), f"adapter {key!r}"
            )
            if getattr(configs[key], "layer_replication", None):
                raise ValueError(
                    f"adapter {key!r} has layer_replication, which numbers the layers anew: the"
                    " mask's names mean other layers here; train without it"
                )
