"""Who gives which batches to `score`: one process, ranks with shares, or ranks of a sharded model.

Each kind has the same five methods. All of them raise on every rank what stops one rank, so that
none waits for another that has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeopt.gradient_sum import GradientSum
from safeopt.ranks import Ranks, number, refuse_sharded, require_reduction, require_rows, reshard
from safeopt.sharding import is_sharded

Batch: TypeAlias = Mapping[str, Any]

KINDS = {kind.__name__: kind for kind in (FloatingPointError, ValueError, TypeError)}
END, GIVEN, FAILED = 0, 1, 2


class Alone:
    """One process, which has all weights and all batches."""

    shows = True  # a bar of progress
    differ = False  # whether ranks of a sharded model have batches of their own

    def meet(self, scorer: Any, targets: Mapping[str, Tensor]) -> None:
        """Check that all ranks score the same weights in the same way."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every rank, at the end, what any of them raised inside."""
        yield

    def agreed(self, batches: Iterable[Batch], check: Callable[[Batch], Any]) -> Iterator[Batch]:
        """The batches, each after `check` where other ranks would wait for it."""
        yield from batches

    def merge(self, observation: Any, prompts: list[str]) -> list[str]:
        """Add up what the ranks have summed; all prompts, in rank order."""
        return prompts

    def require_same_weights(self, fingerprint: Mapping[str, str]) -> None:
        """ValueError unless all ranks have the same weights."""


class Shares(Alone):
    """Ranks that all have all weights, and each a share of the batches."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._ranks = Ranks((group,), device)
        self.shows = dist.get_rank(group) == 0

    def meet(self, scorer: Any, targets: Mapping[str, Tensor]) -> None:
        """ValueError on every rank if weights or settings differ."""
        _require_same_plan(self._ranks, scorer, targets)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every rank, at the end, what any of them raised inside."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 (raised below, when the others know)
            error = raised
        said = _gathered(error and (type(error).__name__, str(error)), self._group)
        if error is not None:
            raise error
        for rank, word in enumerate(said):
            if word is not None:
                raise KINDS.get(word[0], RuntimeError)(f"rank {rank} of the group: {word[1]}")

    def merge(self, observation: Any, prompts: list[str]) -> list[str]:
        """Add up the sums of all ranks, tensor by tensor."""
        sums: GradientSum = observation.sums
        said = _gathered((prompts, sorted(sums.reached), sums.n), self._group)
        for total in sums.totals.values():
            dist.all_reduce(total, group=self._group)
        sums.reached.update(name for _, reached, _ in said for name in reached)
        sums.n = sum(n for *_, n in said)
        return [prompt for part, *_ in said for prompt in part]

    def require_same_weights(self, fingerprint: Mapping[str, str]) -> None:
        """ValueError on every rank unless all have the same weights."""
        if not all(self._ranks.same([number(fingerprint)])):
            raise ValueError(
                "the ranks of group hold different weights, so their sums do not belong together;"
                " load the same model on all, or broadcast its weights from one"
            )


class Sharded(Alone):
    """Ranks of a sharded model, with the same batches, or (`group`) each with its own."""

    def __init__(self, ranks: Ranks, size: int, group: dist.ProcessGroup | None) -> None:
        self._ranks, self._size, self._group = ranks, size, group
        self.differ = group is not None
        self.shows = all(dist.get_rank(each) == 0 for each in ranks.groups)

    def meet(self, scorer: Any, targets: Mapping[str, Tensor]) -> None:
        """ValueError on every rank if weights or settings differ."""
        _require_same_plan(self._ranks, scorer, targets)
        plain = [name for name, weight in targets.items() if not is_sharded(weight)]
        if self._group is not None and plain:
            raise ValueError(
                f"{plain[0]!r} is not sharded, so its gradient is not reduced over the ranks; give"
                " all ranks the same batches, and no group"
            )

    def agreed(self, batches: Iterable[Batch], check: Callable[[Batch], Any]) -> Iterator[Batch]:
        """The batches, while all ranks have one each; a word between the ranks before each."""
        source = iter(batches)
        place = 0
        while True:
            batch, error, state, word = None, None, END, 0
            try:
                batch = next(source)
                check(batch)
                state, word = GIVEN, 0 if self._group is not None else number(batch)
            except StopIteration:
                pass
            except Exception as raised:  # noqa: BLE001 (raised when the others know)
                error, state = raised, FAILED
            self._require_agreement(place, state, word, error)
            if batch is None:
                return
            yield batch
            place += 1

    def _require_agreement(
        self, place: int, state: int, word: int, error: Exception | None
    ) -> None:
        failed = dist.get_rank() + 1 if error else 0
        most, least, high, low, failed = self._ranks.largest(
            [state, -state, word, -word, failed]
        ).tolist()
        if error is not None:
            raise error
        if most == FAILED:
            raise ValueError(
                f"rank {failed - 1} has no usable batch {place}; its own error says why"
            )
        if most != -least:
            raise ValueError(
                f"some ranks have a batch {place} and others have none; a sharded model needs as"
                " many batches on every rank"
            )
        if high != -low:
            raise ValueError(
                f"batch {place} is not the same on all ranks; give all ranks of a sharded model the"
                " same batches in the same order, or, for ESI(reduction='sum'), say with group="
                " that each has its own share"
            )

    def merge(self, observation: Any, prompts: list[str]) -> list[str]:
        """Make the means over ranks sums again; nothing to do where all have the same batches."""
        if self._group is None:
            return prompts
        sums: GradientSum = observation.sums
        said = _gathered((prompts, sums.n), self._group)
        for total in sums.totals.values():
            total.mul_(self._size)
        sums.n = sum(n for _, n in said)
        return [prompt for part, _ in said for prompt in part]


def parties(
    model: nn.Module, scorer: Any, group: dist.ProcessGroup | None
) -> tuple[nn.Module, Alone]:
    """The model to score, without a wrapper that reduces gradients, and who scores it.

    Raises:
        ValueError: `group` is needed, or wrong; the scorer cannot add up what ranks give it.
        NotImplementedError: the model is sharded in a way that is not known, or with a scorer that
            needs whole matrices.
    """
    model = _unwrapped(model, group)
    reshard(model)
    weights = dict(model.named_parameters())
    ranks = Ranks.of(weights.values())
    if group is not None:
        _require_member(group)
    if ranks is None and group is None:
        return model, Alone()
    if not getattr(scorer, "parallel", False):
        refuse_sharded(model, f"scoring with {scorer.method}")
        raise NotImplementedError(
            f"{scorer.method} cannot add up shares of several ranks; give every rank all batches"
            " and no group, or score in one process"
        )
    if ranks is None:
        assert group is not None
        return model, Shares(group, next(iter(weights.values())).device)
    require_reduction(model)
    require_rows(weights, f"scoring with {scorer.method}")
    meshes = {weight.device_mesh for weight in weights.values() if is_sharded(weight)}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise NotImplementedError(
            f"the weights are sharded over {len(meshes)} meshes, {meshes}; score a model that is"
            " sharded over one, or the whole model in one process"
        )
    (mesh,) = meshes
    if group is not None:
        _require_shares(scorer, group, sorted(mesh.mesh.flatten().tolist()))
    return model, Sharded(ranks, mesh.size(), group)


def _unwrapped(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    # By name: importing FSDP1 takes a second, and a model wrapped in it has imported it.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flat"
            " pieces; score it before it is wrapped, or shard it with fully_shard (FSDP2)"
        )
    wrapped = nn.parallel.DistributedDataParallel
    if isinstance(model, wrapped):
        if group is None:
            raise ValueError(
                "the model is wrapped in DistributedDataParallel; pass group=model.process_group if"
                " each rank has its own share of the batches, or score model.module if every rank"
                " has all of them"
            )
        model = model.module
    if any(isinstance(module, wrapped) for module in model.modules()):
        raise ValueError(
            "the model holds a DistributedDataParallel module, which would average gradients before"
            " they are added up; score the model inside it"
        )
    return model


def _require_member(group: dist.ProcessGroup) -> None:
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"group is {group!r}; give a process group this rank belongs to, such as"
            " torch.distributed.group.WORLD"
        )


def _require_shares(scorer: Any, group: dist.ProcessGroup, ranks: list[int]) -> None:
    if not getattr(scorer, "linear", False):
        raise ValueError(
            f"{scorer.method} takes absolute values or squares prompt by prompt, and a sharded"
            " model gives the mean over ranks of the gradients only; give all ranks the same"
            " batches and no group, or use ESI(reduction='sum')"
        )
    if sorted(dist.get_process_group_ranks(group)) != ranks:
        raise ValueError(
            f"group has ranks {sorted(dist.get_process_group_ranks(group))} and the model is"
            f" sharded over {ranks}; pass the group of all of them"
        )


def _require_same_plan(ranks: Ranks, scorer: Any, targets: Mapping[str, Tensor]) -> None:
    plan = [scorer.method, scorer.arguments(), [[n, list(w.shape)] for n, w in targets.items()]]
    if not all(ranks.same([number(plan)])):
        raise ValueError(
            "the ranks score different weights, or with different settings; give all of them the"
            " same model and scorer"
        )


def _gathered(word: Any, group: dist.ProcessGroup) -> list[Any]:
    words: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(words, word, group)
    return words
