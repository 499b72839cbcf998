"""Which weights of a model are scored: one rule, in one place, by role and not by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from safeopt import names

ROUTER_CLASS = re.compile(r"Router$|Gating$|Gate$")
ROUTER_CHILD = re.compile(r"(^|_)(gate|router|wg)$")


def scorable(model: nn.Module, *, head: bool = True) -> dict[str, Tensor]:
    """The weights that scores are given to, by canonical name: linear maps and expert stacks.

    Scored: 2-D weights, and 3-D stacks of matrices (the fused experts of transformers 5), whether
    or not a prompt ever reaches them; a tied tensor once. Not scored: embeddings and a head tied to
    one, norms, biases (2-D expert biases too), convolutions, and the routers of mixture-of-experts
    models, known by their role: a module whose class is a Router, Gate or Gating, or a gate or
    router beside `experts` (Mixtral's `gate`, Qwen2-MoE's `shared_expert_gate`).

    Args:
        model: any module.
        head: score the output head (`lm_head`), if it is not tied to the embeddings.

    Raises:
        ValueError: the model holds LoRA adapters, or weights in a dtype without gradients.
    """
    skipped = set(map(id, _unscored(model)))
    if not head:
        skipped |= set(map(id, _head(model)))
    found: dict[str, Tensor] = {}
    for name, weight in names.parameters(model).items():
        components = name.split(".")
        if any(component.startswith("lora_") for component in components):
            raise ValueError(
                f"the model holds LoRA adapters ({name!r}): scores are for its own weights; merge"
                " the adapters first, model = model.merge_and_unload()"
            )
        if weight.dim() not in (2, 3) or id(weight) in skipped or "bias" in components[-1]:
            continue
        if not weight.is_floating_point():
            raise ValueError(
                f"{name!r} is {weight.dtype}, which has no gradient; load the model unquantised,"
                " with dtype float32 or bfloat16"
            )
        found[name] = weight
    return found


def fitting(known: Mapping[str, Tensor], parameters: Iterable[str] | None) -> dict[str, Tensor]:
    """Those of known weights that a name or a pattern of dotted components fits; None means all.

    Raises:
        ValueError: a pattern that fits none, with near misses.
    """
    if parameters is None:
        return dict(known)
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    fits = {pattern: {n for n in known if names.contains(n, pattern)} for pattern in wanted}
    names.require([pattern for pattern, found in fits.items() if not found], known, "parameters")
    return {n: w for n, w in known.items() if any(n in found for found in fits.values())}


def _unscored(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        children = dict(module.named_children())
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, _ConvNd)):
            yield module.weight
        if ROUTER_CLASS.search(type(module).__name__):
            yield from module.parameters()
        if "experts" in children:
            for name, child in children.items():
                if ROUTER_CHILD.search(name):
                    yield from child.parameters()


def _head(model: nn.Module) -> list[Tensor]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return list(output.parameters())
    return [w for name, w in names.parameters(model).items() if names.place(name)[1] == "head"]
