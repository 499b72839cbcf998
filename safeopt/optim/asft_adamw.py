"""AsFTAdamW: SafeAdamW that holds down what of a matrix's change lies across a direction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from safeopt.direction import AlignmentDirection
from safeopt.optim.calls import COLUMNS
from safeopt.optim.live import named
from safeopt.optim.off_direction import (
    DIGESTS,
    OffDirection,
    Pull,
    rate,
    require_options,
    require_same,
    total,
)
from safeopt.optim.pairing import Scale
from safeopt.optim.safe_adamw import SafeAdamW
from safeopt.optim.starting_values import Source
from safeopt.sharding import local, matched, wrap


class AsFTAdamW(SafeAdamW):
    """SafeAdamW with the penalty lam * sum over matrices of ||(I - C) dW||_F^2.

    dW is W - W_start where a matrix of the direction is trained itself, and scale * B A where it
    has a LoRA adapter, found by name. What the direction does not name moves as under SafeAdamW: in
    full fine-tuning embeddings, head and norms, through which the organism lost its safety whatever
    lam was (benchmarks/results/asft.md); draw those too, with `anchor=`.
    The penalty acts once per step, whatever gradient accumulation and clipping do, and on live
    elements only. lam = 0 is SafeAdamW, bit for bit (`test_law_6_lam_0_is_safe_adamw`).

    "coupled" adds the penalty's gradient to the loss's before the moments, as the paper's loss
    does: 2 lam (I - C)^2 dW, for adapters times A^T on the right, and B^T on the left. `p.grad`
    stays as it is, for a passing copy of the gradients of the penalised matrices. "decoupled" takes
    min(1 / mu, 2 lr lam) (I - C)^2 dW off the weight before the rest of the step, as weight decay
    does: mu is the largest eigenvalue of (I - C)^2, and at least 1. For a projector it is 1, and
    the part of dW across the direction is scaled by 1 - min(1, 2 lr lam). No step overshoots, at
    any lam. On an adapter it acts on B alone, which does the same to B A at any scale.

    Checkpoints hold W_start, unless `anchor_values` are given again; `group["lam"]` may be changed
    as `lr` may. An adapter takes lam and mode from the group of its B. Under torch.compile the step
    runs eagerly.

    Args:
        params: `model.named_parameters()` or groups of (name, parameter) pairs. For LoRA both A and
            B, as PEFT names them.
        lr, betas, eps, weight_decay, amsgrad: as for AdamW.
        direction: from `AlignmentDirection.between`, on any device; it is copied to the weights'.
            That these are the aligned model's is for `direction.check(model)` to see. Give its
            `complement()` where the direction is to be avoided: C is I - C then, in all of this.
        lam: lambda, 0 or more; the authors use 1, with "safelora" and scale=False.
        mode: "coupled" or "decoupled".
        anchor_values: W_start, as for SafeAdamW; for `anchor=` too. Not used for LoRA.
        scale: for coupled LoRA, alpha / r: one number, or by name of the base weight. False counts
            it as 1, the authors' form: with alpha 32 and r 8 that is lam / 16 of the true update's.
        log: fill `last_penalty` and `last_across` at every step; may be set later.
        options: freeze, train, anchor and the others of SafeAdamW.

    Attributes:
        last_penalty: the penalty before the last step, a 0-d tensor that nothing has waited for;
            None where it was not asked for. Costs two reads of dW.
        last_across: likewise the sum of ||(I - C) dW||_F^2 over that of ||dW||_F^2; 0 without
            drift. For a projector it is the share of drift across the direction, and 1 minus it
            that along it; for "safelora" near 1 means that the penalty is nearly plain L2.

    Raises:
        TypeError: direction is none; complex weights.
        ValueError: besides SafeAdamW's: lam, mode or scale out of range; parameters without names;
            a matrix of the direction that no parameter matches (without adapters), or none that
            trains; another shape; an adapter on a weight that the direction lacks, without its
            other half, or that is not B A; decoupled LoRA with operator "vector"; on loading, the
            state of a run with another direction.
        NotImplementedError: matrices whose rows are sharded (DTensor), with "safelora" without
            rank; adapters whose B is sharded along its rank.

    Source: Yang et al. 2025, AsFT, arXiv 2506.08473, Eq. 4. Differs from the authors' code: the
    penalty is not part of the loss, so that it is not in the logged loss, nor clipped, nor counted
    once per micro-batch; full fine-tuning and "decoupled" are ours; in factored form.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        direction: AlignmentDirection,
        lam: float = 1.0,
        mode: Literal["coupled", "decoupled"] = "coupled",
        anchor_values: Source = None,
        scale: Scale = False,
        log: bool = False,
        **options: Any,
    ) -> None:
        self._options = {"lam": lam, "mode": mode}
        require_options(self._options)
        self._off = OffDirection(direction, anchor_values, scale)
        self._bound = False
        self._reset(log)
        if options.get("anchor") is not None:
            options["anchor_values"] = anchor_values
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        self._off.bind(self.param_groups, self._members)
        self._bound = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as SafeAdamW does; the direction covers its parameters too.

        Raises:
            ValueError: as the constructor; the optimizer is then as before.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, value in self._options.items():
            group.setdefault(key, value)
        group.update(dict.fromkeys(DIGESTS, ""))
        try:
            require_options(group)
            if self._bound:
                self._off.bind(self.param_groups, self._members)
        except (TypeError, ValueError, NotImplementedError):
            self.param_groups.pop()
            raise

    # Compiled, the penalty's gradient of the first step would be built into the graph of all steps.
    # Not through torch.compiler.disable, which would import the compiler with safeopt.
    step = torch._disable_dynamo(SafeAdamW.step)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The penalty now, lam * sum of ||(I - C) dW||_F^2: 0-d, float32 or float64, no sync."""
        found = self._off.penalty(self.param_groups)
        return total(found) if found else torch.zeros(())

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: self.__dict__[key] for key in ("_off", "_options", "_bound", "log")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here too, before anything has changed.
        loading = "param_groups" in self.__dict__
        if loading:
            for own, new in zip(self.param_groups, state["param_groups"], strict=True):
                require_same(own, new)
        super().__setstate__(state)
        self._reset(self.log)
        for group in self.param_groups if loading else ():
            for name, p in named(group, "direction"):
                if p in self.state:
                    self._off.restore(name, self.state[p])

    def _reset(self, log: bool) -> None:
        self.log = log
        self.last_penalty: Tensor | None = None
        self.last_across: Tensor | None = None

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Collect what a step needs, as SafeAdamW, with the penalty in it.

        Here rather than around `step`, where the gradients that the user sees would have to change.
        """
        has_complex = super()._init_group(group, *lists)
        if group is self.param_groups[0]:
            self._off.begin(self.param_groups, self.log)
        names = {p: name for name, p in named(group, "direction")}
        for at in (0, 6, 6 + COLUMNS):
            params, grads = lists[at], lists[at + 1]
            for i, p in enumerate(params):
                pull = self._off.pull(names[p], p, group)
                if pull is None:
                    continue
                if pull.group["mode"] == "coupled":
                    gradient = matched(grads[i], p)
                    pulled = self._with_pull(local(gradient), pull, group["maximize"])
                    grads[i] = wrap(pulled, gradient)
                else:
                    self._shrink(names[p], p, pull, group["lr"])
                self._off.keep(names[p], p, self.state[p])
        if self.log and group is self.param_groups[-1]:
            self.last_penalty, self.last_across = self._off.logged() or (None, None)
        return has_complex

    def _with_pull(self, gradient: Tensor, pull: Pull, maximize: bool) -> Tensor:
        """A gradient with the penalty's in it, in the scale and sign in which the step reads it."""
        strength = -pull.group["lam"] if maximize else pull.group["lam"]
        scale = getattr(self, "grad_scale", None)
        towards = pull.gradient if scale is None else pull.gradient * scale
        if gradient.dtype == towards.dtype and not torch.is_grad_enabled():
            # Into memory that is there: new memory costs as much as the penalty's arithmetic.
            return torch.add(gradient, towards, alpha=strength, out=towards)
        return gradient.add(towards, alpha=strength).to(gradient.dtype)

    def _shrink(self, name: str, p: Tensor, pull: Pull, lr: float | Tensor) -> None:
        """Take the share of one step off the part across the direction, of live elements."""
        taken, share = pull.gradient, rate(pull, lr) / 2
        if isinstance(share, Tensor):
            taken, share = taken * share, 1.0
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:  # the rest of the step will be skipped
            taken = torch.where(found_inf.bool(), 0.0, taken)
        live = {n: count for n, _, count in self._members({"params": [p], "param_names": [name]})}
        if live[name] < p.numel():
            taken = taken.masked_fill_(~self._where(name, p).view(taken.shape), 0)
        local(p).sub_(taken, alpha=share)
