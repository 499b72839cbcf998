"""SHiRA from a mask: an adapter that trains single elements of base weights."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from safeopt import names
from safeopt.bitmask import BitMask
from safeopt.integrations.peft.masked import masked
from safeopt.integrations.peft.rows import held_beside
from safeopt.mask import SafetyMask
from safeopt.optim.live import require_freezable


def shira_config(model: nn.Module, mask: SafetyMask, **options: Any) -> Any:
    """The `peft.ShiraConfig` of an adapter over the elements that `mask` selects (SET, to be kept
    as an adapter); `config.mask_fn` is the mask function, `config.r` the smallest that holds it.

    PEFT gives every layer of shape (out, in) exactly r (out + in) values, with one r for all. A
    layer in which fewer are selected is filled up with elements that are not, the first ones in
    memory; hold these, or they train too. Both lines belong together:

        peft_model = get_peft_model(model, shira_config(model, mask))
        optimizer = SafeAdamW(peft_model.named_parameters(), freeze=shira_mask(peft_model, ~mask))

    With weight_decay=0 this trains the selected weights as `SafeAdamW(train=mask)` on the model
    itself does, up to rounding: there the sum W + dW is kept, here dW. Decay acts on dW here.

    Args:
        model: the model that goes into `get_peft_model`, this very object: PEFT tells `mask_fn` the
            layer and not its name.
        mask: over weights of `nn.Linear` layers, at any granularity; where it selects nothing, no
            adapter is made. To train what a mask does not select, pass `~mask`.
        options: other fields of ShiraConfig, such as task_type; not r, target_modules, mask_type,
            random_seed.

    Raises:
        ImportError: without peft.
        ValueError: nothing is selected; selected elements of other layers than `nn.Linear`; names
            and shapes that do not fit; more selected than any r can hold next to the other layers.

    Source: SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175), with the mask of another method.
    """
    try:
        from peft import ShiraConfig
    except ImportError as error:
        raise ImportError("shira_config needs peft: pip install 'torch-safeopt[hf]'") from error
    layers = _layers(model, mask)
    r = _rank(layers, mask)
    with warnings.catch_warnings():  # any mask_type but "random" warns that mask_fn is to be set
        warnings.filterwarnings("ignore", message="Argument self.mask_type=")
        config: Any = ShiraConfig(
            r=r,
            mask_type="safeopt",  # type: ignore[arg-type]
            target_modules=list(layers),
            **options,
        )
    places = {id(layer): f"{path}.weight" for path, layer in layers.items()}

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        name = places.get(id(base_layer))
        if name is None:
            raise ValueError(
                f"mask_fn was given a layer ({base_layer}) that is none of those the mask selects"
                " in: pass get_peft_model the model that shira_config was given, not a copy, and"
                " leave target_modules as they are"
            )
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        return _filled(mask[name], r, name).to(weight.device)

    config.mask_fn = mask_fn
    return config


def shira_mask(model: nn.Module, mask: SafetyMask) -> SafetyMask:
    """The mask over the trainable values of SHiRA adapters that freezes what `mask` selects in the
    base weights: `SafeAdamW(model.named_parameters(), freeze=shira_mask(model, mask))`.

    SHiRA trains single elements, so that it is exact at every granularity, for adapters of
    `shira_config` and of PEFT's own random mask.

    Args:
        model: a PEFT model with SHiRA adapters.
        mask: over base weights, by their names in the base model; adapters on weights it does not
            name are named with nothing selected.

    Raises:
        ValueError: no trainable SHiRA adapters; a value that is to be held is not 0 now; names or
            shapes that do not fit; a mask of what may move.
    """
    require_freezable(mask, "shira_mask")
    trainable = {names.canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
    found = masked(model, mask.to("cpu"), kind="shira_weight")
    held: dict[str, BitMask] = {}
    for path, module in model.named_modules():
        place = names.canonical(path)
        for key, values in getattr(module, "shira_weight", {}).items():
            selected = torch.zeros(values.shape, dtype=torch.bool)
            if f"{place}.weight" in found.bases:
                _, rule = found.bases[f"{place}.weight"]
                row, column = cast(Any, module).shira_indices[key].long().cpu()
                selected = rule.to_bool()[row, column]
            held[f"{place}.shira_weight.{key}"] = BitMask.from_bool(selected)
            if values.requires_grad and bool((values.detach().cpu()[selected] != 0).any()):
                raise ValueError(
                    f"values of the adapter {key!r} of '{place}.weight' that are to be held are not"
                    " 0; start from a fresh adapter, or from one trained with this mask"
                )
    if not held.keys() & trainable.keys():
        raise ValueError(
            "the model has no trainable SHiRA adapters; make them with get_peft_model(model,"
            " shira_config(model, mask)); lora_mask is for LoRA"
        )
    held.update(held_beside(found))
    manifest = {"method": "shira_mask", "of": [mask.manifest]}
    return SafetyMask({name: rule for name, rule in held.items() if name in trainable}, manifest)


def _layers(model: nn.Module, mask: SafetyMask) -> dict[str, nn.Linear]:
    """The layers in which the mask selects something, by path."""
    names.require(mask, names.parameters(model), "mask, for this model")
    modules = {f"{names.canonical(path)}.weight": (path, m) for path, m in model.named_modules()}
    found = {}
    for name, rule in mask.items():
        if not rule.count_units():
            continue
        path, module = modules.get(name, ("", None))
        if type(module) is not nn.Linear:
            raise ValueError(
                f"the mask selects elements of {name!r}, which is no weight of an nn.Linear layer;"
                " SHiRA has no adapters for others: leave it out of the mask"
            )
        _require_shape(name, rule, module.weight)
        found[path] = module
    if not found:
        raise ValueError("the mask selects no weight, so that there is nothing to train")
    return found


def _rank(layers: dict[str, nn.Linear], mask: SafetyMask) -> int:
    """The smallest r with r (out + in) values for every layer's selection."""
    counts = {path: mask[f"{path}.weight"].count() for path in layers}
    sums = {path: layer.in_features + layer.out_features for path, layer in layers.items()}
    r = max(-(-counts[path] // sums[path]) for path in layers)
    for path, layer in layers.items():
        if r * sums[path] > layer.weight.numel():
            fullest = max(layers, key=lambda p: counts[p] / sums[p])
            raise ValueError(
                f"SHiRA gives each layer r (out + in) values: '{fullest}.weight' with"
                f" {counts[fullest]} selected needs r={r}, which for '{path}.weight' of shape"
                f" {tuple(layer.weight.shape)} are more than it has; train fewer elements, or the"
                " weights themselves with SafeAdamW(train=mask)"
            )
    return r


def _filled(rule: BitMask, r: int, name: str) -> Tensor:
    """The selection and, to r (out + in) elements, the first that are not in it; bool (out, in)."""
    selected = rule.to_bool("cpu")
    missing = r * sum(selected.shape) - int(selected.sum())
    if missing < 0:
        raise ValueError(
            f"r={r} gives {name!r} {r * sum(selected.shape)} values, and the mask selects"
            f" {int(selected.sum())} of its elements; leave r as shira_config chose it"
        )
    flat = selected.view(-1)
    flat[(~flat).nonzero().flatten()[:missing]] = True
    return selected


def _require_shape(name: str, rule: BitMask, weight: Tensor) -> None:
    if rule.shape != weight.shape:
        raise ValueError(
            f"the mask for {name!r} has shape {tuple(rule.shape)}, the weight has"
            f" {tuple(weight.shape)}: the mask was made for another model"
        )
