"""The sum of gradients over prompts, of which gradient scorers are made; on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from safeopt import ops  # noqa: F401 (registers torch.ops.safeopt)
from safeopt.ranks import Ranks
from safeopt.sharding import is_sharded, local


class GradientSum:
    """Adds up the gradient of each target in a float32 buffer, and drops the gradient at once.

    A gradient lives from the moment it is complete until its hook has run: there is one buffer of
    the model's size (`totals`), float32 whatever the model's dtype, and no full set of gradients.
    After a FloatingPointError the totals may hold what caused it, and are of no further use.

    Of a target that is sharded by FSDP2 (a DTensor), the buffer is for this rank's part, and what
    is added is the gradient after its reduction, the mean over ranks: of equal gradients, and of a
    power of two of them, exactly one of them. All ranks call `backward` equally often, and an error
    comes to all of them.

    Args:
        targets: parameters by name. They are made to require gradients.
        fold: from a float32 gradient to what is added, of the same shape; None adds the gradient.
        absolute: add absolute values.

    Attributes:
        totals: plain tensors by name; of a sharded target, this rank's part.
        reached: names of the targets that ever had a gradient.
        n: how many prompts have gone by; for the observation to count.
        differ: ranks of a sharded model have batches of their own.
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        fold: Callable[[Tensor], Tensor] | None = None,
        *,
        absolute: bool = False,
    ) -> None:
        self.totals: dict[str, Tensor] = {}
        self.reached: set[str] = set()
        self.n = 0
        self.differ = False
        self._ranks = Ranks.of(targets.values())
        self._fold = fold
        self._absolute = absolute
        self._handles = []
        # One flag per target, set on its device and read after the backward: a hook waits for none.
        devices = {weight.device for weight in targets.values()}
        self._bad = {
            device: torch.zeros(len(targets), dtype=torch.int32, device=device)
            for device in devices
        }
        for place, (name, weight) in enumerate(targets.items()):
            weight.requires_grad_(True)
            self.totals[name] = torch.zeros_like(
                local(weight), dtype=torch.float32, memory_format=torch.contiguous_format
            )
            hook = self._hook(name, self._bad[weight.device][place : place + 1])
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))

    def _hook(self, name: str, bad: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None  # autograd calls the hook after it has set .grad
            self.reached.add(name)
            if is_sharded(gradient):
                _arrived(gradient)
                gradient = local(gradient)
            if self._fold is not None:
                gradient = self._fold(gradient.float())
            torch.ops.safeopt.esi_accumulate_(
                self.totals[name], gradient, bad, absolute=self._absolute
            )

        return add

    def backward(self, value: Tensor) -> None:
        """Differentiate a scalar, if it has a graph; what has none adds nothing.

        Raises:
            FloatingPointError: it or a gradient is not finite, on whichever rank.
            ValueError: it has a graph on some ranks of a sharded model only.
        """
        if self._ranks is not None:
            self._agree(self._ranks, value)
        if not value.requires_grad:
            return
        if not torch.isfinite(value):
            raise FloatingPointError(f"the safety score is {value.item()}")
        value.backward()
        places = self._spoiled()
        if places:
            for flags in self._bad.values():
                flags.zero_()
            # The last in the model's order is the first that backward met.
            name = list(self.totals)[max(places)]
            raise FloatingPointError(f"the gradient of {name!r} is NaN or infinite")

    def _agree(self, ranks: Ranks, value: Tensor) -> None:
        """Raise on every rank what would stop one of them, as the others would wait for it."""
        finite = bool(torch.isfinite(value)) or not value.requires_grad
        graph = int(value.requires_grad)
        spoiled, most, least = ranks.largest([int(not finite), graph, -graph]).tolist()
        if spoiled and finite:
            raise FloatingPointError("the safety score of another rank is NaN or infinite")
        if most != -least:
            raise ValueError(
                "the objective found nothing to differentiate on some ranks only; leave such"
                " prompts out, or give all ranks the same batches"
            )

    def _spoiled(self) -> list[int]:
        """Places of the targets with a gradient that is not finite, on any rank."""
        if self._ranks is None:
            return [at for bad in self._bad.values() for at in bad.nonzero().flatten().tolist()]
        flags = torch.stack([bad.to(self._ranks.device) for bad in self._bad.values()]).amax(0)
        return self._ranks.largest(flags).nonzero().flatten().tolist()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _arrived(gradient: Tensor) -> None:
    """Wait for a gradient that FSDP2 copies to the CPU: before torch 2.13 it may be under way."""
    kind = gradient.device_mesh.device_type  # type: ignore[attr-defined]
    if gradient.device.type == "cpu" and kind != "cpu":
        torch.get_device_module(kind).current_stream().synchronize()
