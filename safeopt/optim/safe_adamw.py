"""SafeAdamW: torch's AdamW with elements that never move, elements that alone move, and elements
that are drawn to where they started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from safeopt import ops
from safeopt.mask import SafetyMask
from safeopt.optim.anchor import ALONE, Anchor, Mode, Shares, check_options
from safeopt.optim.calls import COLUMNS, SixLists, adam_options, step_columns, step_whole
from safeopt.optim.live import LiveSet, named
from safeopt.optim.loading import DIGESTS, OPTIONS, expand, fit, settle
from safeopt.optim.rows import row
from safeopt.optim.starting_values import Source
from safeopt.sharding import local, matched


class SafeAdamW(torch.optim.AdamW):
    """AdamW with weights that never move (`freeze=`), that alone move (`train=`), and that are
    drawn to their starting values (`anchor=`).

    Without these it is `torch.optim.AdamW`, bit for bit. With a mask, frozen elements keep their
    exact bits whatever decay, momentum, scaler, clipping or learning rate do, live elements move
    as under AdamW, and state is kept for live elements only: a partly live parameter has 1-D
    moments of one value per live element, a wholly frozen one has no state.

    Live elements too are bit-identical to AdamW's where plain torch does the step, but for
    `fused=True` on CPU in float32 or float64, where they can differ in the last bit: torch's fused
    kernel rounds the last elements of a tensor otherwise than the rest, and an element has another
    place among the live ones (`test_law_3_fused_on_cpu_differs_only_by_rounding`). Compiled kernels
    (`safeopt env` says whether they run) differ from AdamW by rounding, whatever `foreach` and
    `fused` say: a few units in the last place of float32. Parameters of 16 bits they compute in
    float32 and round once, where torch rounds after every operation.

    An anchor is a soft mask: the penalty lambda * sum over i of s_i (p_i - a_i)^2, with a the
    starting values, s the shares and lambda the `anchor_strength`. It acts on live elements, once
    per step, whatever gradient accumulation and clipping do. "coupled" adds its gradient
    2 lambda s (p - a) to the loss's; "decoupled" takes min(1, lr 2 lambda s) of the way to a off
    beside the weight decay: no step goes past a, at any strength. Checkpoints hold a, unless
    `anchor_values` are given again; `group["anchor_strength"]` may be changed as `lr` may.

    Args:
        params: as for AdamW; with a mask or an anchor, `model.named_parameters()` or groups of
            (name, parameter) pairs, since both match by name.
        lr, betas, eps, weight_decay, amsgrad: as for AdamW.
        freeze: selected elements never move; parameters the mask does not name are live (SPA).
        train: only selected elements move; parameters the mask does not name are frozen (SET).
        anchor: s. `Scores` are scaled to mean 1 over the weights they name, and parameters they do
            not name are not pulled; a `SafetyMask` is 1 where it selects, else 0; "uniform" is 1
            for every weight (L2-SP). Costs 4 bytes per weight, "uniform" none.
        anchor_strength: lambda, 0 or more; 0 changes nothing and keeps nothing.
        anchor_mode: "coupled" or "decoupled".
        anchor_values: a. None copies the parameters as they are now, on their device and in their
            dtype: load the weights first. "cpu" keeps the copy in CPU memory and streams it. The
            folder of a model maps its safetensors files, without a copy; a mapping from name to
            tensor is used as it is. Shares lie beside the values.
        maximize, foreach, capturable, differentiable, fused: as for AdamW. `foreach` and `fused`
            choose among torch's own kernels, for the parameters that the mask leaves whole.

    Raises:
        TypeError: a mask or an anchor of another type; an anchor for complex parameters.
        ValueError: both masks; as freeze= a mask of what may move; parameters without names; names
            that match no parameter; another shape; trainable LoRA adapters that a mask or scores do
            not name; a strength without anchor; scores that are all zero; on loading, the state of
            other parameters, of another mask or of another anchor.
    Sharded parameters (DTensor: fully_shard, tensor parallel) are ruled by the same masks, given
    whole; each rank steps its part, and nothing is gathered.

    Source: SPA and SET of ESI (arXiv 2604.08297). Differs from the authors' code: frozen elements
    are left out of decay and momentum as well; masking the gradient alone lets both move them.
    The anchor: EWC (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3, with lambda for their
    lambda / 2) where s is a Fisher information, L2-SP (Li et al. 2018, arXiv 1802.01483, eq. 3)
    where it is uniform; decoupled as the weight decay of AdamW (arXiv 1711.05101).
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
        freeze: SafetyMask | None = None,
        train: SafetyMask | None = None,
        anchor: Shares | None = None,
        anchor_strength: float = 0.0,
        anchor_mode: Mode = "coupled",
        anchor_values: Source = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.full_state = False
        self._live = LiveSet.of(freeze, train)
        self._anchor = Anchor.of(anchor, anchor_strength, anchor_mode, anchor_values)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        for ruling in (self._live, self._anchor):
            if ruling is not None:
                ruling.check_names(n for g in self.param_groups for n in g["param_names"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; mask and anchor rule its parameters too.

        Raises:
            ValueError: as the constructor; the optimizer is then as before.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        options = OPTIONS if self._anchor is None else self._anchor.options
        for key, value in options.items():
            group.setdefault(key, value)
        group.update(dict.fromkeys(DIGESTS, ""))
        try:
            check_options(group)
            if self._live is not None:
                self._live.check_group(group)
                group["mask_digest"] = self._live.digest(group)
            if self._anchor is not None:
                self._anchor.add(group, self._members(group))
            elif group["anchor_strength"]:
                raise ValueError(f"anchor_strength {ALONE}")
        except (TypeError, ValueError, NotImplementedError):
            self.param_groups.pop()
            raise

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over the live elements.

        Args:
            closure: reevaluates the model and returns the loss, as for torch.

        Returns:
            The closure's loss, or None.
        """
        # Not super().step(): torch wraps the step of every class with the step hooks, and they
        # would run twice.
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            whole: SixLists = ([], [], [], [], [], [])
            partly: list[list[Any]] = [[] for _ in range(COLUMNS)]
            drawn: list[list[Any]] = [[] for _ in range(COLUMNS)]
            has_complex = self._init_group(group, *whole, *partly, *drawn)
            options, differentiable = adam_options(self, group), group["differentiable"]
            pull = {
                "anchor_strength": 2 * group["anchor_strength"],
                "anchor_decoupled": group["anchor_mode"] == "decoupled",
            }
            step_whole(whole, has_complex, differentiable, options)
            step_columns(partly, self._live_bit, differentiable, options)
            step_columns(drawn, self._live_bit, differentiable, {**options, **pull})
        return loss

    def mask_grads_(self) -> None:
        """Set the gradients of frozen elements to zero, in place.

        The step does not need it. Call it before `clip_grad_norm_`, so that the norm, and with it
        the scale of the live gradients, is that of the live elements alone.
        """
        if self._live is None:
            return
        with torch.no_grad():
            for group in self.param_groups:
                for name, p, count in self._members(group):
                    if p.grad is None or count == p.numel():
                        continue
                    p.grad = matched(p.grad, p)
                    gradient = local(p.grad)
                    if count == 0:
                        gradient.zero_()
                    else:
                        gradient.masked_fill_(~self._where(name, p).view(gradient.shape), 0)

    def live_count(self) -> tuple[int, int]:
        """(elements that may move, all elements) over every parameter group.

        Parameters that do not require gradients may not.
        """
        given = [p for group in self.param_groups for p in group["params"]]
        counts = [(p, p.numel()) for p in given]
        if self._live is not None:
            counts = [(p, n) for group in self.param_groups for _, p, n in self._members(group)]
        live = sum(n for p, n in counts if p.requires_grad)
        return live, sum(p.numel() for p in given)

    @torch.no_grad()
    def anchor_penalty(self) -> Tensor:
        """The penalty lambda * sum of s (p - a)^2 over the live elements; 0 without an anchor.

        Returns:
            A 0-d tensor on the first parameter's device, float32, or float64 where that parameter
            is; the same on all ranks of sharded parameters. Reads weights, starting values and
            shares once; needs three float32 copies of one tensor at a time.
        """
        total = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        for group in self.param_groups if self._anchor is not None else ():
            for name, p, count in self._members(group):
                if self._anchor is not None and count and name in self._anchor:
                    live = self._where(name, p) if count < p.numel() else None
                    energy = group["anchor_strength"] * self._anchor.energy(name, p, live)
                    total = total + energy.to(total.device)
        return total

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's AdamW has it, compact where a parameter is partly live.

        Sharded parameters' is expanded to their shape, as DTensors, and wholly frozen ones have
        zeros: distributed checkpoints can be resumed on another number of ranks. With
        `optimizer.full_state = True` plain ones are expanded too, for a run that goes on sharded.
        """
        packed = super().state_dict()
        expand(packed, self.param_groups, self._members, self._live, self.full_state)
        return packed

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("full_state", "_live", "_anchor")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here too, after its hooks and before anything has changed.
        loading = "param_groups" in self.__dict__
        if loading:
            fit(self.param_groups, state, self._live)
        super().__setstate__(state)
        self.__dict__.setdefault("full_state", False)
        self.__dict__.setdefault("_live", None)
        self.__dict__.setdefault("_anchor", None)
        settle(self.param_groups, self.state, self._anchor if loading else None)

    @property
    def _live_bit(self) -> bool:
        return self._live is None or self._live.live_bit

    def _members(self, group: dict[str, Any]) -> Iterable[tuple[str, Tensor, int]]:
        """(canonical name, parameter, live elements) of a group with a mask or an anchor."""
        if self._live is not None:
            return self._live.members(group)
        return ((name, p, p.numel()) for name, p in named(group, "anchor"))

    def _where(self, name: str, p: Tensor) -> Tensor:
        """Which elements of (this rank's part of) a partly live parameter are live: bool, flat."""
        assert self._live is not None  # else no parameter is partly live
        numel = local(p).numel()
        if not numel:
            return torch.zeros(0, dtype=torch.bool, device=p.device)
        return ops.live_elements(numel, *self._live.rule(name, p))

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Collect what a step needs: six lists for wholly live parameters, as torch does, then the
        columns of the op for partly live ones and for those that are drawn. Not traced by compile.
        """
        whole, partly, drawn = lists[:6], lists[6 : 6 + COLUMNS], lists[6 + COLUMNS :]
        if self._live is None and self._anchor is None:
            return super()._init_group(group, *whole)
        anchor, wholly = self._anchor, []
        for name, p, count in self._members(group):
            pulled = anchor is not None and anchor.pulls(name, p, group)
            if count == p.numel() and not pulled:
                wholly.append(p)
            elif p.grad is not None and count > 0:
                partial = self._live if count < p.numel() else None
                live = partial.count_here(name, p) if partial else local(p).numel()
                entries: list[Any] = row(self.state[p], group, p, live)
                if partial is not None:
                    entries += partial.columns(name, p)
                elif anchor is not None:
                    entries += anchor.rule(p, self._live_bit)
                if pulled and anchor is not None:
                    entries += anchor.columns(name, p, self.state[p])
                for column, value in zip(drawn if pulled else partly, entries, strict=False):
                    if value is not None:
                        column.append(value)
        return super()._init_group({**group, "params": wholly}, *whole)
