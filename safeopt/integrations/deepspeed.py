"""DeepSpeed ZeRO: selected weights kept exact in the partitions that the ranks step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safeopt.bitmask import BitMask
from safeopt.mask import SafetyMask
from safeopt.names import parameters, require
from safeopt.ops import live_elements
from safeopt.optim import hold as hold_plain
from safeopt.optim.live import require_freezable


def hold(engine: Any, mask: SafetyMask) -> RemovableHandle:
    """Keep the selected elements at the values they have now, exactly, under ZeRO stage 0, 1 or 2.

    ZeRO 1 and 2 step flat partitions, one per rank and parameter group, and copy them into the
    model afterwards. The selected elements of this rank's partitions are written back between the
    two, by a post hook of the optimizer inside, so that they stay in the master weights and, on
    every rank, in the model. The other elements move as they would without `hold`.

    Every rank calls it, after `deepspeed.initialize`, and after `engine.load_checkpoint` if the run
    is resumed: checkpoints have no part in it.

    Args:
        engine: what `deepspeed.initialize` returned; under accelerate, the model that
            `accelerator.prepare` returned; under Trainer, `trainer.model_wrapped` when training
            has begun.
        mask: selected elements are held; whole masks, by name, the same on all ranks. Cost on a
            rank: the master values (mostly float32) of those in its partitions, the mask's bits,
            and at a step a bool tensor of one parameter.

    Returns:
        A handle; `.remove()` ends the hold and frees the values.

    Raises:
        TypeError: not a DeepSpeed engine.
        ValueError: ZeRO stage 3, ZenFlow, expert parallelism, `round_robin_gradients`, or 16-bit
            training without ZeRO; a mask name matches no parameter; a shape differs; a held
            parameter that requires grad is not in the engine's optimizer; a mask of what may move;
            weights changed after `deepspeed.initialize`.
        RuntimeError: at a step, other partitions than when `hold` was called.
    """
    _require_supported(engine)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if optimizer is engine.optimizer:  # no ZeRO: it steps the model's own parameters
        return hold_plain(optimizer, mask, engine.module)
    known = parameters(engine.module)
    require(mask, known, "hold mask")
    require_freezable(mask, "hold")
    for name in mask:
        _check(name, known[name], mask)
    _require_same_weights(engine, optimizer, known)
    held: dict[Tensor, list[_Piece]] = {_partition(optimizer, i): [] for i in _groups(optimizer)}
    for name, bits in mask.items():
        mapping = getattr(known[name], "_hp_mapping", None)
        if mapping is not None:
            partition = _partition(optimizer, mapping.param_group_index)
            held[partition].append(_Piece.of(partition, mapping, bits))

    def write_back(stepped: Optimizer, *_: object) -> None:
        with torch.no_grad():
            for partition in (p for group in stepped.param_groups for p in group["params"]):
                if partition not in held:
                    raise RuntimeError(
                        "DeepSpeed has replaced the partitions of its optimizer since hold was"
                        " called: call hold again, with the engine as it is now"
                    )
                for piece in held[partition]:
                    piece.write(partition)

    return optimizer.register_step_post_hook(write_back)


@dataclass(frozen=True)
class _Piece:
    """The held elements of the stretch of one parameter that lies in this rank's partition."""

    start: int  # of the stretch in the partition
    numel: int
    rule: tuple[Tensor, int, int, int, bool]  # as `live_elements` takes it
    values: Tensor

    @classmethod
    def of(cls, partition: Tensor, mapping: Any, bits: BitMask) -> _Piece:
        start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        offset = mapping.lp_fragment_address.start
        rule = bits.bits.to(partition.device), bits.span, bits.nbits, offset, True
        stretch = partition.detach().narrow(0, start, numel)
        return cls(start, numel, rule, stretch[live_elements(numel, *rule)])

    def write(self, partition: Tensor) -> None:
        bits, span, nbits, offset, bit = self.rule
        where = live_elements(self.numel, bits.to(partition.device), span, nbits, offset, bit)
        values = self.values.to(partition.device, partition.dtype)
        partition.detach().narrow(0, self.start, self.numel).masked_scatter_(where, values)


def _groups(optimizer: Optimizer) -> range:
    return range(len(optimizer.param_groups))


def _partition(optimizer: Optimizer, group: int) -> Tensor:
    return optimizer.param_groups[group]["params"][0]


def _require_supported(engine: Any) -> None:
    if not hasattr(engine, "zero_optimization_stage"):
        raise TypeError(
            f"hold takes a DeepSpeed engine, got {type(engine).__name__}: give what"
            " deepspeed.initialize returned (accelerate: the model from accelerator.prepare;"
            " Trainer: trainer.model_wrapped in on_train_begin). Without DeepSpeed use safeopt.hold"
        )
    if engine.optimizer is None:
        raise ValueError("the engine has no optimizer, so nothing moves and nothing can be held")
    stage = int(engine.zero_optimization_stage())
    if stage >= 3:
        raise ValueError(
            f"ZeRO stage {stage} partitions every parameter, and hold cannot keep elements of its"
            " pieces: use ZeRO stage 2 ('zero_optimization': {'stage': 2}), or shard with FSDP2"
            " (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version 2) and use"
            " SafeAdamW(freeze=mask)"
        )
    if getattr(engine, "zenflow", False):
        raise ValueError(
            "ZenFlow steps weights beside the optimizer, where hold does not see it: remove"
            " 'zenflow' from 'zero_optimization'"
        )
    if getattr(engine, "has_moe_layers", False):
        raise ValueError(
            "DeepSpeed's expert parallelism gives the experts of all ranks the same names, so that"
            " a mask cannot tell them apart: train without deepspeed.moe layers"
        )
    if stage and engine.zero_round_robin_gradients():
        raise ValueError(
            "with 'round_robin_gradients' DeepSpeed does not say truly which elements a partition"
            " has: set it to false in 'zero_optimization' (its default)"
        )


def _check(name: str, param: Tensor, mask: SafetyMask) -> None:
    if mask[name].shape != param.shape:
        raise ValueError(
            f"hold mask for {name!r} has shape {tuple(mask[name].shape)}, the parameter has"
            f" {tuple(param.shape)}: the mask was made for another model"
        )
    if param.requires_grad and not hasattr(param, "_hp_mapping"):
        raise ValueError(
            f"{name!r} is held but is not in a partition of the engine's optimizer: give DeepSpeed"
            " the optimizer of the whole model; and train in 16 bits with ZeRO stage 1 or 2, not 0"
        )


def _require_same_weights(engine: Any, optimizer: Optimizer, known: dict[str, Tensor]) -> None:
    """ValueError on all ranks where the master weights of one are not those of the model."""
    stale = torch.zeros((), dtype=torch.int32, device=engine.device)
    for param in known.values():
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
            partition = _partition(optimizer, mapping.param_group_index).detach()
            master = partition.narrow(0, ours.start, ours.numel)
            model = param.detach().flatten().narrow(0, theirs.start, theirs.numel)
            stale |= (master.to(model.device, model.dtype) != model).any()
    if dist.is_initialized():
        dist.all_reduce(stale, op=dist.ReduceOp.MAX)
    if stale:
        raise ValueError(
            "the model's weights are not those of DeepSpeed's master copy, which the next step"
            " would write over them: change weights before deepspeed.initialize, or call"
            " engine.optimizer.refresh_fp32_params() after it, and then hold"
        )
