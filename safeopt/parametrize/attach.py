"""What a module gets with a parametrization of ours: a class of its own that is safe to save.

torch makes a class per parametrized module, whose checkpoints hold
`parametrizations.weight.original`: from_pretrained puts a new random weight in its place, with no
more than a line in its report. Here the class gets methods that save and load the plain names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from safeopt.parametrize.linear import linear
from safeopt.parametrize.parts import Kept, Slices
from safeopt.parametrize.read_only import read_only

MARK = "_safeopt_dressed"


def attach(module: nn.Module, name: str, kept: Kept) -> None:
    """Register `kept` on a parameter, which stays the same object and is the part that trains."""
    if kept.resizes:
        module.get_parameter(name).grad = None  # it has the old shape
    torch_parametrize.register_parametrization(module, name, kept)
    cls: Any = type(module)
    cls.__getstate__ = _refuse_to_pickle
    if "__deepcopy__" in vars(cls):  # torch's, whose copies share this class: not a user's own
        cls.__deepcopy__ = _deepcopy
    cls.state_dict, cls._load_from_state_dict = _state_dict, _load_from_state_dict
    setattr(cls, MARK, True)
    setattr(cls, name, _property(name))
    if name == "weight" and isinstance(kept, Slices) and cls.forward is nn.Linear.forward:
        cls.forward = _linear_forward


def detach(module: nn.Module, name: str) -> None:
    """Undo `attach`: the parameter holds the assembled weight, to the bit, and has no gradient."""
    plist = _lists(module)[name]
    weight = plist[0].whole(plist.original)
    torch_parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    parameter = module.get_parameter(name)
    parameter.grad, parameter.data = None, weight
    if not torch_parametrize.is_parametrized(module):
        return
    cls: Any = type(module)
    if "forward" in vars(cls) and name == "weight":
        del cls.forward


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Kept, Tensor]]:
    """(module's name, module, parameter's name, parametrization, original) of each of ours."""
    for path, module in model.named_modules():
        for name, kept, original in _ours(module):
            yield path, module, name, kept, original


def _ours(module: nn.Module) -> list[tuple[str, Kept, Tensor]]:
    if not torch_parametrize.is_parametrized(module):
        return []
    found = _lists(module).items()
    return [(n, plist[0], plist.original) for n, plist in found if isinstance(plist[0], Kept)]


def _lists(module: nn.Module) -> Any:
    return module.parametrizations


def _property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        plist = _lists(self)[name]
        if hasattr(plist.original, "device_mesh"):
            # Outside forward, fully_shard has the parts in pieces. Shape and dtype are known; the
            # values would need every rank, and only state_dict() may count on that.
            dtype = plist.original.dtype
            return read_only(torch.empty(plist[0].shape, dtype=dtype, device="meta"))
        return read_only(plist())

    def put(self: nn.Module, value: Tensor) -> None:
        _lists(self)[name].right_inverse(value)

    return property(get, put)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    plist = self.parametrizations.weight
    return linear(input, plist.original, plist[0], self.bias)


def _state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As nn.Module.state_dict, with the plain names and the assembled weights."""
    prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
    found = _above(self).state_dict(*args, **kwargs)
    for name, kept, original in _ours(self):
        inner = f"{prefix}parametrizations.{name}."
        for key in [key for key in found if key.startswith(inner)]:
            del found[key]
        found[prefix + name] = kept.whole(original)
    return found


def _load_from_state_dict(
    self: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """As nn.Module's, from the plain names: a whole weight is split into its parts."""
    for name, kept, original in _ours(self):
        key, inner = prefix + name, f"{prefix}parametrizations.{name}."
        value = state_dict.pop(key, None)
        parts: tuple[Tensor, Tensor] = (original, kept.get_parameter(kept.part))
        if value is None:
            missing_keys += [key] if strict else []
        elif value.shape != kept.shape:
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape {value.shape} from"
                f" checkpoint, the shape in current model is {kept.shape}."
            )
        else:
            parts = kept.split_like(value, original)
        # Those of now where there are none: the inner modules must not report names of theirs.
        state_dict[f"{inner}original"], state_dict[f"{inner}0.{kept.part}"] = parts
    _above(self)._load_from_state_dict(
        state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    )


def _refuse_to_pickle(self: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"{type(self).__name__} has a weight that safeopt.parametrize assembles, and cannot be"
        " pickled. Save model.state_dict() (or save_pretrained), which holds the whole weights"
        " under their plain names, or call safeopt.parametrize.remove(model) first"
    )


def _deepcopy(self: Any, memo: dict[int, Any]) -> nn.Module:
    """A copy with a class of its own: `remove` takes the property off the class."""
    if id(self) in memo:
        return memo[id(self)]
    cls = type(self)
    body = {key: v for key, v in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    replica: Any = object.__new__(type(cls.__name__, cls.__bases__, body))
    memo[id(self)] = replica
    replica.__dict__ = copy.deepcopy(self.__dict__, memo)
    return replica


def _above(self: nn.Module) -> Any:
    """super() of the class that `attach` dressed; fully_shard may have put one below it."""
    return super(next(cls for cls in type(self).__mro__ if MARK in vars(cls)), self)
