"""What can be parametrized, and what to do about the rest; all of it before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from safeopt import names


@dataclass(frozen=True)
class Place:
    """A parameter of a model: `module.attribute`, by the name it has with its wrappers."""

    module: nn.Module
    attribute: str
    raw: str
    tied: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands there now."""
        return self.module.get_parameter(self.attribute)


def find(model: nn.Module, wanted: Mapping[str, Any], what: str) -> dict[str, Place]:
    """The places of the wanted names, by canonical name.

    Args:
        model: bare or wrapped.
        wanted: by canonical name something with the `shape` of the parameter.
        what: whose names they are, for messages ("freeze mask").

    Raises:
        TypeError: no module.
        ValueError: names that match nothing, with near misses; another shape; a weight that is
            parametrized already, or stands under an adapter of PEFT.
        NotImplementedError: sharded parameters (DTensor).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    places, taken = dict(_places(model)), set(_taken(model))
    names.require(wanted, places.keys() | taken, what)
    for name, rule in wanted.items():
        if name in taken:
            raise ValueError(
                f"{what}: {name!r} is parametrized already; call safeopt.parametrize.remove(model)"
                " first, then give one mask or one direction for it"
            )
        _check(name, places[name], rule.shape, what)
    return {name: places[name] for name in wanted}


def require_plain(name: str, place: Place, what: str) -> None:
    """Check that a weight can be taken apart.

    Raises:
        ValueError: a tied weight, one without values (meta), one that is no plain floating-point
            nn.Parameter, such as a quantised one.
    """
    parameter = place.parameter
    if place.tied:
        raise ValueError(
            f"{what}: {name!r} is tied to another weight, and would be so no longer: untie them"
            " (tie_word_embeddings=False, and a clone for one of the two), take it out of the mask,"
            " or use SafeAdamW(freeze=mask), which rules tied weights"
        )
    if type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point:
        kind = f"{type(parameter).__module__}.{type(parameter).__name__}"
        raise ValueError(
            f"{what}: {name!r} is a {kind} of {parameter.dtype}, not a plain floating-point"
            " parameter: a quantised weight cannot be taken apart. Load the model without"
            " quantisation, or train adapters, which leave quantised weights as they are"
        )
    if parameter.device.type == "meta":
        raise ValueError(
            f"{what}: {name!r} is on the meta device and has no values yet; load the weights first"
        )


def _check(name: str, place: Place, shape: torch.Size, what: str) -> None:
    parameter = place.parameter
    if hasattr(parameter, "device_mesh"):
        raise NotImplementedError(
            f"{what}: {name!r} is sharded already (DTensor): call safeopt.parametrize before"
            " fully_shard, which then shards both parts"
        )
    if "base_layer" in place.raw.split("."):
        raise ValueError(
            f"{what}: {name!r} stands under a PEFT adapter, which moves what the whole layer gives"
            " out, whatever its base weight does. Call merge_and_unload() first, and then"
            " safeopt.parametrize; for protection under LoRA use AsFTAdamW"
        )
    if shape != parameter.shape:
        raise ValueError(
            f"{what}: {name!r} has shape {tuple(parameter.shape)}, and {tuple(shape)} is asked for:"
            " it was made for another model"
        )


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    tied = set(names.aliases(model).values())
    first = names.parameters(model)
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            raw = f"{path}.{attribute}" if path else attribute
            name = names.canonical(raw)
            if parameter is not None and name in first and "parametrizations" not in raw.split("."):
                yield name, Place(module, attribute, raw, name in tied)


def _taken(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if is_parametrized(module):
            for attribute in module.parametrizations:
                yield names.canonical(f"{path}.{attribute}" if path else attribute)
