"""SafeAdamW: torch's AdamW with elements that never move, or elements that alone move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT, _get_scalar_dtype, _use_grad_for_differentiable

from safeopt import ops
from safeopt.mask import SafetyMask
from safeopt.optim.live import LiveSet
from safeopt.optim.loading import MOMENTS, fit

SixLists: TypeAlias = tuple[list[Any], list[Any], list[Any], list[Any], list[Any], list[Any]]


class SafeAdamW(torch.optim.AdamW):
    """AdamW that never moves the critical weights (`freeze=`), or moves only them (`train=`).

    Without a mask it is `torch.optim.AdamW`, bit for bit. With one, frozen elements keep their
    exact bits whatever decay, momentum, scaler, clipping or learning rate do, live elements move
    as under AdamW, and state is kept for live elements only: a partly live parameter has 1-D
    moments of one value per live element, a wholly frozen one has no state.

    Live elements too are bit-identical to AdamW's where plain torch does the step, with one
    exception: on CPU, `fused=True` with float32 or float64 parameters can differ in the last bit.
    Torch's fused CPU kernel rounds the elements behind the last full vector of a tensor otherwise
    than the rest, and an element has another place among the live ones than in the whole tensor
    (`test_law_3_fused_on_cpu_differs_only_by_rounding`). Compiled kernels (`safeopt env` says
    whether they run) differ from AdamW by rounding, whatever `foreach` and `fused` say: a few units
    in the last place of float32. Parameters of 16 bits they compute in float32 and round once,
    where torch rounds after every operation.

    Args:
        params: as for AdamW; when a mask is given, `model.named_parameters()` or groups of
            (name, parameter) pairs, since masks match by name.
        lr, betas, eps, weight_decay, amsgrad: as for AdamW.
        freeze: selected elements never move; parameters the mask does not name are live (SPA).
        train: only selected elements move; parameters the mask does not name are frozen (SET).
        maximize, foreach, capturable, differentiable, fused: as for AdamW. `foreach` and `fused`
            choose among torch's own kernels, for the parameters that the mask leaves whole.

    Raises:
        TypeError: a mask is not a `SafetyMask`.
        ValueError: both masks; parameters without names; a mask name that matches no parameter; a
            mask of another shape; trainable LoRA adapters; on loading, the state of other
            parameters or of another mask.
        NotImplementedError: a mask with sharded parameters (DTensor).

    Source: SPA and SET of ESI (arXiv 2604.08297). Differs from the authors' code: frozen elements
    are left out of decay and momentum as well; masking the gradient alone lets both move them.
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
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._live = LiveSet.of(freeze, train)
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
        if self._live is not None:
            self._live.check_names(n for group in self.param_groups for n in group["param_names"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; the mask rules its parameters too.

        Raises:
            ValueError: as the constructor; the optimizer is then as before.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["mask_digest"] = self._checked_digest(group)
        except (ValueError, NotImplementedError):
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
            partly: list[list[Any]] = [[] for _ in range(11)]
            has_complex = self._init_group(group, *whole, *partly)
            options = self._options(group)
            if whole[0]:
                adam(
                    *whole,
                    has_complex=has_complex,
                    differentiable=group["differentiable"],
                    decoupled_weight_decay=True,
                    **options,
                )
            self._step_partly_live(partly, group["differentiable"], options)
        return loss

    def mask_grads_(self) -> None:
        """Set the gradients of frozen elements to zero, in place.

        The step does not need it. Call it before `clip_grad_norm_`, so that the norm, and with it
        the scale of the live gradients, is that of the live elements alone.
        """
        live = self._live
        if live is None:
            return
        with torch.no_grad():
            for name, p, count in self._members():
                if p.grad is None or count == p.numel():
                    continue
                if count == 0:
                    p.grad.zero_()
                else:
                    moves = ops.live_elements(p.numel(), *live.rule(name, p.device))
                    p.grad.masked_fill_(~moves.view(p.shape), 0)

    def live_count(self) -> tuple[int, int]:
        """(elements that may move, all elements) over every parameter group."""
        total = sum(p.numel() for group in self.param_groups for p in group["params"])
        return total - sum(p.numel() - count for _, p, count in self._members()), total

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_live": self._live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here too, after its hooks and before anything has changed.
        if "param_groups" in self.__dict__:
            fit(self.param_groups, state, self._live)
        super().__setstate__(state)
        self.__dict__.setdefault("_live", None)
        for group in self.param_groups:
            group.setdefault("mask_digest", "")

    def _members(self) -> list[tuple[str, Tensor, int]]:
        """Every parameter the mask could rule; none without a mask."""
        if self._live is None:
            return []
        return [member for group in self.param_groups for member in self._live.members(group)]

    def _checked_digest(self, group: dict[str, Any]) -> str:
        if self._live is None:
            return ""
        self._live.check_group(group)
        return self._live.digest(group)

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Collect what a step needs: six lists for wholly live parameters, as torch does, and the
        eleven columns of the op for partly live ones. Not traced by torch.compile.
        """
        live, whole, partly = self._live, lists[:6], lists[6:]
        if live is None:
            return super()._init_group(group, *whole)
        members = list(live.members(group))
        for name, p, count in members:
            if p.grad is None or not 0 < count < p.numel():
                continue
            if p.grad.is_sparse:
                raise RuntimeError("sparse gradients are not supported; use dense embeddings")
            state = self._compact_state(group, p, count)
            moments = [state.get(key) for key in MOMENTS]
            row = [p, p.grad, *moments, state["step"], *live.columns(name, p)]
            for column, value in zip(partly, row, strict=True):
                if value is not None:
                    column.append(value)
        wholly = [p for _, p, count in members if count == p.numel()]
        return super()._init_group({**group, "params": wholly}, *whole)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
            "foreach": group["foreach"],
            "capturable": group["capturable"],
            "fused": group["fused"],
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
        }

    def _step_partly_live(
        self, columns: list[list[Any]], differentiable: bool, options: dict[str, Any]
    ) -> None:
        if self._live is None or not columns[0]:
            return
        # By name: a call of the bare op would turn a tensor lr into a float.
        op = torch.ops.safeopt.masked_adamw_
        kernel: Callable[..., None] = (
            op.tensor_lr if isinstance(options["lr"], Tensor) else op.default
        )
        if differentiable or isinstance(options["beta1"], Tensor):
            # The op has no autograd, and takes betas as floats only.
            kernel = partial(ops.masked_adamw_, differentiable=differentiable)
        for device in dict.fromkeys(p.device for p in columns[0]):
            here = [i for i, p in enumerate(columns[0]) if p.device == device]
            rows = [[column[i] for i in here] if column else [] for column in columns]
            parameters = rows[0]
            for k in range(5):
                rows[k] = [torch.view_as_real(t) if t.is_complex() else t for t in rows[k]]
            if torch.compiler.is_compiling():
                # Tracing claims capturable for every group, also on the CPU, where it cannot be.
                options = {**options, "capturable": device.type != "cpu"}
            kernel(*rows, [], [], self._live.live_bit, **options)
            if not torch.compiler.is_compiling():  # compiled graphs see to it themselves
                torch.autograd.graph.increment_version(parameters)

    def _compact_state(self, group: dict[str, Any], p: Tensor, count: int) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            device = p.device if group["capturable"] or group["fused"] else "cpu"
            dtype = _get_scalar_dtype(is_fused=group["fused"])
            state["step"] = torch.zeros((), dtype=dtype, device=device)
            for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
                state[key] = torch.zeros(count, dtype=p.dtype, device=p.device)
        return state
