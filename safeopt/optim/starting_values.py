"""Where the values that weights had before training are kept: beside them, in CPU memory, or read
from the files of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safeopt import artifact
from safeopt.names import canonical, require
from safeopt.sharding import cut, is_sharded, local
from safeopt.weights import files

Source: TypeAlias = str | PathLike[str] | Mapping[str, Tensor] | None


class StartingValues:
    """Values of weights before training, by canonical parameter name.

    Args:
        source: None keeps copies on the parameters' device, in their dtype. "cpu" keeps them in CPU
            memory. The path of a Hugging Face model folder maps its safetensors files, so that
            there is no second copy in memory. A mapping from name to floating-point tensor is used
            as it is, on whatever device it lies.

    Raises:
        ValueError: the folder holds no safetensors weights, or damaged ones.
        TypeError: source is none of these.
    """

    def __init__(self, source: Source) -> None:
        if source is not None and not isinstance(source, (str, PathLike, Mapping)):
            raise TypeError(
                f"anchor_values is {type(source).__name__}; give None, 'cpu', the path of a model"
                " folder, or a mapping from parameter name to tensor"
            )
        self._source = source
        self._kept: dict[str, Tensor] = {}
        self._parts: set[str] = set()  # names of which this rank's part is kept
        self._given = _given(source)

    @property
    def saved(self) -> bool:
        """Whether the values are in the optimizer's checkpoint: they can come from nowhere else."""
        return self._given is None

    def __getstate__(self) -> dict[str, Any]:
        mapped = isinstance(self._source, (str, PathLike)) and self._given is not None
        return (
            {**self.__dict__, "_given": None, "_kept": {}, "_parts": set()}
            if mapped
            else self.__dict__
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._given is None:
            self._given = _given(self._source)

    def take(self, params: Mapping[str, Tensor]) -> None:
        """Copy the values of the parameters now, or look them up where they are given.

        Raises:
            ValueError: given values lack a name, have another shape, are not finite, or are the
                parameter itself.
            TypeError: given values are not floating-point.
        """
        if self._given is not None:
            require(params, self._given, "anchor_values")
        self._kept |= {name: self._value(name, p) for name, p in params.items()}
        self._parts |= {name for name, p in params.items() if is_sharded(p)}

    def of(self, name: str, param: Tensor) -> Tensor:
        """The value of a parameter; copies kept beside it follow it to another device.

        Of a sharded one, that of this rank's part. Where it was not sharded when the value was
        taken, given ones are cut now and others taken again: the first step is the start, and only
        the first rank may have had the weights before (accelerate loads them so).
        """
        uncut = is_sharded(param) and name not in self._parts
        if uncut or (name not in self._kept and self._given is not None):  # or after unpickling
            self._kept[name] = self._value(name, param)
            self._parts |= {name} if uncut else set()
        value = self._kept[name]
        if self._source is None and value.device != param.device:
            value = self._kept[name] = value.to(param.device)
        return value

    def restore(self, name: str, value: Tensor) -> Tensor:
        """Put a value from a checkpoint in place of what was taken; returns it as it is kept."""
        if is_sharded(value):
            self._parts.add(name)
        value = local(value)
        self._kept[name] = value.to("cpu") if self._source == "cpu" else value
        return self._kept[name]

    def digest(self, names: Iterable[str]) -> str:
        """Hash of given values, or "" where the optimizer's checkpoint holds them."""
        if self._given is None:
            return ""
        return artifact.fingerprint({name: self._given[name] for name in names})["weights"]

    def _value(self, name: str, param: Tensor) -> Tensor:
        if self._given is None:
            device = param.device if self._source is None else torch.device("cpu")
            part = local(param.detach())
            return part.to(device, copy=True, memory_format=torch.contiguous_format)
        value = self._given[name].detach()
        if not value.is_floating_point():
            raise TypeError(
                f"anchor_values of {name!r} are {value.dtype}; give unquantised floating-point ones"
            )
        if value.shape != param.shape:
            raise ValueError(
                f"anchor_values of {name!r} have shape {tuple(value.shape)}, the parameter has"
                f" {tuple(param.shape)}: they belong to another model"
            )
        if value.device == param.device and value.data_ptr() == param.data_ptr():
            raise ValueError(
                f"anchor_values of {name!r} are the parameter itself, which training changes; leave"
                " anchor_values out to take a copy, or clone them"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"anchor_values of {name!r} hold NaN or infinity; give finite ones")
        value = cut(value, param)
        # The kernels reckon in the dtype of the parameter, or in float32.
        wide = value.dtype == torch.float64 and param.dtype != torch.float64
        return value.to(param.dtype if wide else value.dtype).contiguous()


def _given(source: Source) -> dict[str, Tensor] | None:
    if source is None or (isinstance(source, str) and source == "cpu"):
        return None
    if isinstance(source, Mapping):
        return {canonical(name): value for name, value in source.items()}
    return _read(Path(source))


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder by canonical name, mapped from its files."""
    where = f"anchor_values {str(folder)!r}"
    found: dict[str, Tensor] = {}
    try:
        for file in files(folder, where):
            with safe_open(file, framework="pt") as opened:
                found |= {canonical(n): opened.get_tensor(n) for n in opened.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{where} cannot be read ({error}); copy the folder again") from error
    return found
