"""A mixin by which any trainer of transformers or TRL builds an optimizer that protects weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from safeopt.integrations.transformers.optimizer import OptimizerFactory, settings
from safeopt.optim import SafeAdamW

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SafeOptTrainerMixin(_Base):
    """Gives a trainer SafeAdamW or AsFTAdamW, and SafeOptCallback.

        class SafeDPOTrainer(SafeOptTrainerMixin, DPOTrainer): ...

        SafeDPOTrainer(model=..., args=..., ..., safeopt={"freeze": mask}).train()

    The trainer builds the optimizer when it has the model, also under FSDP, where `optimizers=` is
    refused, and in TRL's trainers that have no `optimizer_cls_and_kwargs`.

    Args:
        safeopt: what `safe_optimizer` takes: freeze, train, anchor, direction, `cls=AsFTAdamW`.
        callbacks: as for the trainer. A SafeOptCallback is added unless there is one.

    Raises:
        TypeError: no `safeopt`, or another `cls`; a class whose bases stand the other way round.
        ValueError: an optimizer besides ours; `args.optim` asks for another one.
    """

    def __init__(self, *args: Any, safeopt: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not isinstance(safeopt, Mapping):
            raise TypeError(
                f"safeopt is {safeopt!r}; say what to protect, such as safeopt={{'freeze': mask}}"
            )
        given = [
            key
            for key in ("optimizers", "optimizer_cls_and_kwargs")
            if kwargs.get(key) not in (None, (None, None))
            and (key != "optimizers" or kwargs[key][0] is not None)
        ]
        if given:
            raise ValueError(
                f"{given[0]} brings an optimizer besides the one of safeopt=; give one of the two"
            )
        self._safeopt = dict(safeopt)
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            raise ValueError(
                f"{type(self).__name__} has an optimizer already, {type(self.optimizer).__name__},"
                " besides the one of safeopt=; leave `optimizers` out"
            )
        settings(self.args, **self._split())  # its errors belong here rather than in train()
        from safeopt.integrations.transformers.callback import SafeOptCallback

        if not any(isinstance(each, SafeOptCallback) for each in self.callback_handler.callbacks):
            self.add_callback(SafeOptCallback())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for before in cls.__mro__[: cls.__mro__.index(SafeOptTrainerMixin)]:
            if hasattr(before, "create_optimizer") and not issubclass(before, SafeOptTrainerMixin):
                raise TypeError(
                    f"class {cls.__name__}: {before.__name__} stands before SafeOptTrainerMixin and"
                    " would build its own optimizer; write"
                    f" class {cls.__name__}(SafeOptTrainerMixin, {before.__name__})"
                )

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer of safeopt=, over the parameters of the model; made once."""
        if self.optimizer is None:
            over: Any = self.model if model is None else model
            options = settings(self.args, **self._split())
            decays = self.get_decay_parameter_names(over)
            self.optimizer = OptimizerFactory()(over, decays=decays, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the figures of SafeOptCallback in it from the start."""
        from safeopt.integrations.transformers.callback import SafeOptCallback

        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SafeOptCallback):
                callback.add_figures(logs)
        super().log(logs, *args, **kwargs)

    def _split(self) -> dict[str, Any]:
        options = dict(self._safeopt)
        return {"cls": options.pop("cls", SafeAdamW), "options": options}
