"""The assembled weight as others see it: a tensor that can be read, and not written to.

It is computed anew each time, so that a write would be lost in silence: PEFT's merge_and_unload
does `base_layer.weight.data += delta`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REFUSED = (
    "{what} writes to a weight that safeopt.parametrize assembles from two parts, and would be"
    " lost: call safeopt.parametrize.remove(model) first (before merge_and_unload, for one). To set"
    " the value, write `module.weight = tensor` under torch.no_grad(), or load a state dict"
)
SETTERS = ("__set__", "__setitem__", "__delitem__")


class ReadOnly(Tensor):
    """A view of a weight that refuses in-place functions, as do its own views; else a Tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        target = next(iter((*args, *kwargs.values())), None)  # torch.nn.init passes it by keyword
        if _writes(name) and isinstance(target, ReadOnly):
            raise RuntimeError(REFUSED.format(what=_readable(func, name)))
        if isinstance(kwargs.get("out"), ReadOnly):
            raise RuntimeError(REFUSED.format(what=f"{name}(out=)"))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if name == "as_subclass":
            return result
        source = next((a for a in args if isinstance(a, ReadOnly)), None)
        if isinstance(result, list | tuple) and type(result) in (list, tuple):
            return type(result)(_guarded(each, source) for each in result)
        return _guarded(result, source)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # saved, it is a plain tensor


def read_only(weight: Tensor) -> Tensor:
    """The weight as `ReadOnly`; as it is while torch.compile traces, which sees every use."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnly)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return in_place or augmented or name in SETTERS


def _readable(func: Callable, name: str) -> str:
    owner = getattr(getattr(func, "__self__", None), "__name__", None)
    return f"setting .{owner}" if owner else f"{name}()"


def _guarded(result: Any, source: Tensor | None) -> Any:
    """The result of a function of a `ReadOnly`; one that shares its memory is read-only too."""
    if not isinstance(result, Tensor) or source is None or result.device.type == "meta":
        return result
    with torch._C.DisableTorchFunctionSubclass():
        shared = result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        return result.as_subclass(ReadOnly) if shared else result
