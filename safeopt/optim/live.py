"""Which elements of which parameter an optimizer may move."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from safeopt import ops
from safeopt.bitmask import BitMask
from safeopt.mask import SafetyMask
from safeopt.names import canonical, require
from safeopt.sharding import box, is_sharded, local

Rule = tuple[Tensor, int, int, int, bool]


class LiveSet:
    """A safety mask and what happens to its selection: frozen, or the only thing to train.

    Parameters are met by canonical name, each time anew, because sharding swaps the tensors. The
    mask is whole; what rules a sharded parameter is cut from it when a step first meets it.
    """

    def __init__(self, mask: SafetyMask, argument: str) -> None:
        self.argument = argument
        self.live_bit = argument == "train"
        self._mask = mask
        self._selected = {name: bits.count() for name, bits in mask.items()}
        self._parts: dict[Hashable, tuple[BitMask | None, int]] = {}
        self._bits: dict[Hashable, Tensor] = {}
        self._starts: dict[Hashable, Tensor] = {}
        if not any(self._selected.values()):
            effect = "nothing will train" if self.live_bit else "nothing is protected"
            warnings.warn(f"the {argument}= mask selects no weight: {effect}", stacklevel=4)

    @classmethod
    def of(cls, freeze: SafetyMask | None, train: SafetyMask | None) -> LiveSet | None:
        """The live set of an optimizer's two arguments, or None without a mask."""
        if freeze is not None and train is not None:
            raise ValueError(
                "freeze= and train= were both given; give one: freeze=mask protects the selected"
                " weights, train=mask moves nothing else. Combine two masks with & | - first"
            )
        for argument, mask in (("freeze", freeze), ("train", train)):
            if mask is None:
                continue
            if not isinstance(mask, SafetyMask):
                raise TypeError(
                    f"{argument}= must be a SafetyMask, got {type(mask).__name__}; make one with"
                    " SafetyMask.from_bool({name: bool tensor}) or SafetyMask.load(path)"
                )
            if argument == "freeze":
                require_freezable(mask, "freeze=")
            return cls(mask, argument)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}, "_bits": {}, "_starts": {}}

    def count(self, name: str, param: Tensor) -> int:
        """Number of live elements of a parameter, of all its parts together.

        Raises:
            ValueError: mask and parameter differ in shape.
        """
        if name not in self._mask:
            return 0 if self.live_bit else param.numel()
        if self._mask[name].shape != param.shape:
            raise ValueError(
                f"{self.argument}= mask for {name!r} has shape {tuple(self._mask[name].shape)}, the"
                f" parameter has {tuple(param.shape)}: the mask was made for another model, or for"
                " one rank's part of this one (masks are given whole; each rank cuts its part), or"
                f" the parameter was flattened{_FLAT.format(self.argument)}"
            )
        selected = self._selected[name]
        return selected if self.live_bit else param.numel() - selected

    def count_here(self, name: str, param: Tensor) -> int:
        """Number of live elements of this rank's part of a masked parameter."""
        return self._here(name, param)[1]

    def rule(self, name: str, param: Tensor) -> Rule:
        """(bits, span, nbits, offset, live_bit) of a masked parameter, as `ops` takes them.

        Of a sharded one, of its part on this rank, which must not be empty.
        """
        mask, key = self._here(name, param)[0], _key(name, param)
        assert mask is not None
        if key not in self._bits:
            self._bits[key] = mask.bits.to(param.device)
        return self._bits[key], mask.span, mask.nbits, 0, self.live_bit

    def columns(self, name: str, param: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
        """(bits, starts, span, nbits, offset) of a masked parameter, as the op takes them.

        A complex parameter counts as the real one of twice its elements.
        """
        if not local(param).numel():  # the step leaves it out
            return torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 1, 1, 0
        bits, span, nbits, offset, live_bit = self.rule(name, param)
        parts = 2 if param.is_complex() else 1
        key = (_key(name, param), parts)
        if key not in self._starts:
            # From the mask's own bits: they are on the CPU, where the counting is done.
            own, elements = self._here(name, param)[0], local(param).numel()
            assert own is not None
            counted = (own.bits, parts * span, nbits, parts * offset, live_bit)
            self._starts[key] = ops.live_starts(parts * elements, *counted).to(param.device)
        return bits, self._starts[key], parts * span, nbits, parts * offset

    def _here(self, name: str, param: Tensor) -> tuple[BitMask | None, int]:
        """(mask, live elements) of this rank's part; (None, 0) where it is empty."""
        if not is_sharded(param):
            return self._mask[name], self.count(name, param)
        key = _key(name, param)
        if key not in self._parts:
            mask = self._mask[name].cut(box(param))
            live = 0 if mask is None else mask.count() if self.live_bit else (~mask).count()
            self._parts[key] = mask, live
        return self._parts[key]

    def members(self, group: dict[str, Any]) -> Iterator[tuple[str, Tensor, int]]:
        """(canonical name, parameter, live elements) of each parameter of a group, in order.

        Raises:
            ValueError: as `named`; another shape than the mask's.
        """
        for name, param in named(group, self.argument):
            yield name, param, self.count(name, param)

    def check_group(self, group: dict[str, Any]) -> None:
        """Check that the mask can rule a group.

        Raises:
            ValueError: a tensor under two names, trainable LoRA adapters, or as `members`.
        """
        seen: dict[int, str] = {}
        for name, param, _ in self.members(group):
            first = seen.setdefault(id(param), name)
            if first != name:
                raise ValueError(
                    f"{name!r} and {first!r} are one tied tensor; pass it once, as"
                    " model.named_parameters() does"
                )
            adapter = any(part.startswith("lora_") for part in name.split("."))
            if adapter and param.requires_grad and name not in self._mask:
                raise ValueError(
                    f"{name!r} is a trainable LoRA adapter that the {self.argument}= mask does not"
                    " name: an adapter moves every element of its base weight, so a mask made for"
                    " base weights cannot protect them. safeopt.integrations.peft.lora_mask makes"
                    " one for adapters of it (docs/peft.md); or merge them (merge_and_unload) and"
                    " train the base weights with this mask, or train them without a mask"
                )

    def check_names(self, names: Iterable[str]) -> None:
        """ValueError with near misses when a mask name matches none of the parameters."""
        require(self._mask, list(names), f"{self.argument}= mask")

    def digest(self, group: dict[str, Any]) -> str:
        """Hash of what is live in a group: the same for freeze=m and train=~m."""
        sha = hashlib.sha256()
        for name, param, live in self.members(group):
            sha.update(f"{name}:{live}/{param.numel()};".encode())
            if 0 < live < param.numel():
                mask = self._mask[name] if self.live_bit else ~self._mask[name]
                sha.update(mask.to("cpu").to_weights().bits.numpy().data)
        return sha.hexdigest()


class AllLive:
    """The rule of a wholly live parameter, where the op steps it too: one bit for all of it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def columns(self, param: Tensor, live_bit: bool) -> tuple[Tensor, Tensor, int, int, int]:
        """(bits, starts, span, nbits, offset), as `LiveSet.columns`."""
        numel = local(param).numel()
        key = (numel, param.device, live_bit)
        if key not in self._known:
            bits = torch.tensor([int(live_bit)], dtype=torch.uint8)
            starts = ops.live_starts(numel, bits, 1, 1, 0, live_bit)
            self._known[key] = bits.to(param.device), starts.to(param.device)
        return *self._known[key], 1, 1, 0


def named(group: dict[str, Any], argument: str) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, parameter) of each parameter of a group, in order.

    Raises:
        ValueError: parameters without names, or flattened ones (DeepSpeed, FSDP1).
    """
    names, params = group.get("param_names"), group["params"]
    if names is None:
        raise ValueError(
            f"{argument}= matches parameters by name, and these have none: pass"
            " model.named_parameters() in place of model.parameters(), or groups whose 'params' is"
            " a list of (name, parameter) pairs"
        )
    if len(names) != len(params):
        raise ValueError(
            f"the group has {len(params)} parameters and {len(names)} names: something replaced its"
            f" parameters{_FLAT.format(argument)}"
        )
    for raw, param in zip(names, params, strict=True):
        name = canonical(raw)
        if name.endswith("_flat_param"):
            raise ValueError(f"{name!r} is a flattened parameter{_FLAT.format(argument)}")
        if "_fsdp_wrapped_module" in raw.split("."):  # on every rank, whatever shapes it has
            raise ValueError(f"{name!r} is sharded by FSDP1{_FLAT.format(argument)}")
        if hasattr(param, "ds_id"):
            raise ValueError(f"{name!r} is partitioned by DeepSpeed{_FLAT.format(argument)}")
        yield name, param


_FLAT = (
    " (DeepSpeed ZeRO and FSDP1 flatten or partition them), and {}= rules elements of the original"
    " ones. Shard with FSDP2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version 2), or"
    " use DDP; under DeepSpeed ZeRO 1 and 2 give DeepSpeed an optimizer without a mask and call"
    " safeopt.integrations.deepspeed.hold(engine, mask)"
)


def _key(name: str, param: Tensor) -> Hashable:
    return name, param.device, getattr(param, "placements", None)


def require_freezable(mask: SafetyMask, what: str) -> None:
    """ValueError for a mask that says what may move, as `alignment_budget` makes it."""
    if mask.manifest.get("use") == "train":
        raise ValueError(
            f"{what} was given a mask of what may move (its manifest says use: train; method"
            f" {mask.manifest.get('method')}): frozen, it would hold what is redundant and let the"
            " rest move. Give it as SafeAdamW(train=mask), or give ~mask"
        )
