"""SafeAdamW for Trainer: named groups as Trainer makes them, settings from its arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from safeopt.optim import SafeAdamW

OPTIMS = ("adamw_torch", "adamw_torch_fused")


def safe_optimizer(
    args: Any, cls: type[SafeAdamW] = SafeAdamW, **options: Any
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for an optimizer that protects weights.

    Learning rate, betas, eps, weight decay and fused come from `args`, and the groups are Trainer's
    own: no decay for norms and biases. Without a mask the run is the one that Trainer makes itself,
    bit for bit (`test_without_a_mask_trainer_is_as_without_us`). The parameters have names, by
    which masks match. Parameters with requires_grad=False are in the groups too, where they do not
    move: a mask may name them.

    Args:
        args: the `TrainingArguments` of the run; `optim` must be "adamw_torch" or
            "adamw_torch_fused", its default.
        cls: SafeAdamW or AsFTAdamW.
        options: freeze, train, anchor, direction and whatever else `cls` takes. What is given here
            goes before what stands in `args`.

    Returns:
        (factory, its keyword arguments).

    Raises:
        TypeError: another class.
        ValueError: `args.optim` asks for another optimizer.
    """
    return OptimizerFactory, settings(args, cls, options)


def settings(args: Any, cls: type[SafeAdamW], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `OptimizerFactory`; see `safe_optimizer`."""
    if not (isinstance(cls, type) and issubclass(cls, SafeAdamW)):
        raise TypeError(
            f"cls is {cls!r}; it must be SafeAdamW or AsFTAdamW. To hold weights under another"
            " optimizer, see safeopt.hold"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in OPTIMS:
        raise ValueError(
            f"args.optim is {optim!r}, which would be ignored: {cls.__name__} is an AdamW. Leave"
            f" optim out, or give one of {', '.join(OPTIMS)}; to hold weights under another"
            " optimizer, see safeopt.hold"
        )
    return {
        "cls": cls,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **({"fused": True} if optim == "adamw_torch_fused" else {}),
        **options,
    }


class OptimizerFactory:
    """Builds the optimizer once Trainer has the model; no Optimizer, so Trainer calls it so."""

    def __call__(
        self,
        model: nn.Module,
        *,
        cls: type[SafeAdamW],
        decays: Collection[str] | None = None,
        **options: Any,
    ) -> SafeAdamW:
        """The optimizer over two groups of named parameters.

        decays: names of the parameters with weight decay; None asks Trainer.
        """
        if decays is None:
            from transformers import Trainer

            # It does not use the trainer that it is a method of.
            decays = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
        return cls(named_groups(model, decays, options["weight_decay"]), **options)


def named_groups(
    model: nn.Module, decays: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters with decay, then those without; apart by device mesh, as fused steps need it.

    Without integer weights, which nothing trains and which fused AdamW refuses.
    """
    kept = [(n, p) for n, p in model.named_parameters() if p.requires_grad or p.is_floating_point()]
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        by_mesh: dict[Any, list[Any]] = {}
        for name, p in kept:
            if (name in decays) is decay:
                by_mesh.setdefault(getattr(p, "device_mesh", None), []).append((name, p))
        each = weight_decay if decay else 0.0
        groups += [{"params": params, "weight_decay": each} for params in by_mesh.values()]
    return groups
