"""Scores: how much each weight matters, and the one loop that lets a scorer see a model work.

A scorer (see `Scorer`) says which weights it scores and what it adds up while prompts go by;
`score` does what all need: evaluation mode, batches on the device, a model left as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from safeopt import artifact, names, ops  # noqa: F401 (ops: registers torch.ops.safeopt)
from safeopt.progress import bar

Batch: TypeAlias = Mapping[str, Any]
"""`input_ids`, `attention_mask`, `labels`: int64 of shape (rows, tokens); `texts`: the prompts."""


IGNORED = -100
"""The label of a token that does not count, as in torch.nn.functional.cross_entropy."""


class Scores(Mapping[str, Tensor]):
    """Importance of every scored weight: name -> non-negative float32 tensor of its shape.

    Args:
        tensors: by parameter name; other floating dtypes are converted to float32.
        provenance: JSON values that say where the scores come from. `score` fills in `model`
            (fingerprint), `method`, `arguments`, `prompts` (hash), `n` (their number), `torch`.

    Raises:
        TypeError: an entry is not a floating-point tensor.
        ValueError: a score is negative, infinite or NaN; the message names the tensor.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"scores of {name!r} are {kind}; give a floating-point tensor")
            self._tensors[names.canonical(name)] = tensor.detach().float()
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.check()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        method = self.provenance.get("method", "unknown method")
        return f"Scores({len(self)} tensors, {self.count():,} weights, {method})"

    def count(self) -> int:
        """Number of scored weights, which `fraction` in `select` is a fraction of."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    def check(self) -> None:
        """Raise ValueError, naming the tensor, unless every score is finite and not negative."""
        for name, tensor in self._tensors.items():
            if tensor.numel() == 0:
                continue
            low, high = (float(value) for value in tensor.aminmax())
            if not (low >= 0 and high < float("inf")):
                raise ValueError(
                    f"scores of {name!r} reach from {low} to {high}; they must be finite and not"
                    " negative: look for overflow in the model or in what was added up"
                )

    def save(self, path: str | PathLike[str]) -> None:
        """Write scores and provenance to one safetensors file (errors: see `artifact.write`)."""
        self.check()
        artifact.write(path, self._tensors, "scores", self.provenance)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read what `save` wrote, on the CPU (errors: see `artifact.read`)."""
        return cls(*artifact.read(path, "scores"))


class Observation(Protocol):
    """One run of a scorer over one model, between `Scorer.start` and `close`."""

    def observe(self, batch: Batch) -> None:
        """Take in one batch, already on the device; FloatingPointError if it is not finite."""

    def finish(self) -> dict[str, Tensor]:
        """The scores by name, float32, one for every target."""

    def close(self) -> None:
        """Remove all hooks; called once, also after an error."""


class Scorer(Protocol):
    """What `score` needs of a method: ESI is one; SNIP, Wanda or Fisher fit the same surface."""

    method: str

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values, for the provenance."""

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores, by canonical name; usually `scorable(model)`."""

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> Observation:
        """Begin a run. No parameter requires a gradient at this point: ask for those you need."""


def score(
    model: nn.Module, batches: Iterable[Batch], scorer: Scorer, *, progress: bool = True
) -> Scores:
    """Score the weights of a model on prompts.

    The model runs in evaluation mode on the device it is on. Modes, `requires_grad` and `grad` of
    all parameters are as before afterwards, also after an error. Beside the activations, gradient
    scorers keep one float32 buffer per scored weight and never a full set of gradients.

    Args:
        model: called as model(input_ids=..., attention_mask=...).
        batches: made by `safeopt.data.batches`, or any mappings like those; read once, in order.
        scorer: such as `safeopt.methods.esi.ESI()`.
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        ValueError: no batches, no weights to score, or what the scorer objects to.
        FloatingPointError: a loss or gradient is NaN or infinite; the message names the prompt.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches is a single batch; pass a list of batches: [batch]")
    prompts: list[str] = []
    with _undisturbed(model):
        targets = scorer.targets(model)
        if not targets:
            raise ValueError(f"{type(model).__name__} has no weight that {scorer.method} can score")
        observation = scorer.start(model, targets)
        try:
            for batch in bar(batches, progress, f"score ({scorer.method})", "batch"):
                prompts.extend(texts(batch))
                observation.observe(_to(batch, next(model.parameters()).device))
            if not prompts:
                raise ValueError("batches is empty: give at least one prompt to score on")
            tensors = observation.finish()
        finally:
            observation.close()
    provenance = {
        "model": artifact.fingerprint(model),
        "method": scorer.method,
        "arguments": scorer.arguments(),
        "prompts": artifact.digest(prompts),
        "n": len(prompts),
        "torch": torch.__version__,
    }
    return Scores(tensors, provenance)


class GradientSum:
    """Adds up the gradient of each target in a float32 buffer, and drops the gradient at once.

    A gradient lives from the moment it is complete until its hook has run: there is one buffer of
    the model's size (`totals`), float32 whatever the model's dtype, and no full set of gradients.
    After a FloatingPointError the totals may hold what caused it, and are of no further use.

    Args:
        targets: parameters by name. They are made to require gradients.
        fold: from a float32 gradient to what is added, of the same shape; None adds the gradient.
        absolute: add absolute values.
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
                weight, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            hook = self._hook(name, self._bad[weight.device][place : place + 1])
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))

    def _hook(self, name: str, bad: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None  # autograd calls the hook after it has set .grad
            self.reached.add(name)
            if self._fold is not None:
                gradient = self._fold(gradient.float())
            torch.ops.safeopt.esi_accumulate_(
                self.totals[name], gradient, bad, absolute=self._absolute
            )

        return add

    def backward(self, value: Tensor) -> None:
        """Differentiate a scalar; FloatingPointError if it or a gradient is not finite."""
        if not torch.isfinite(value):
            raise FloatingPointError(f"the safety score is {value.item()}")
        value.backward()
        places = [at for flags in self._bad.values() for at in flags.nonzero().flatten().tolist()]
        if places:
            for flags in self._bad.values():
                flags.zero_()
            # The last in the model's order is the first that backward met.
            name = list(self.totals)[max(places)]
            raise FloatingPointError(f"the gradient of {name!r} is NaN or infinite")

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def texts(batch: Batch) -> list[str]:
    """The prompts of a batch, or, where it holds no `texts`, their token ids, to name them by."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            f"a batch is {type(batch).__name__!r} without 'input_ids'; make batches with"
            " safeopt.data.batches(tokenizer, rows, batch_size)"
        )
    if not len(batch["input_ids"]):
        raise ValueError("a batch holds no prompt; leave empty batches out")
    if "texts" in batch:
        return [str(text) for text in batch["texts"]]
    return [f"token ids {row}" for row in batch["input_ids"].tolist()]


def rows(batch: Batch) -> list[Batch]:
    """Cut a batch into batches of one prompt each."""

    def cut(value: Any, i: int) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(inner, i) for key, inner in value.items()}
        return value[i : i + 1]

    return [cut(batch, i) for i in range(len(batch["input_ids"]))]


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: move(inner) for key, inner in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: move(value) for key, value in batch.items()}


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    flags = {weight: (weight.requires_grad, weight.grad) for weight in model.parameters()}
    try:
        model.eval()
        for weight in flags:
            weight.grad = None
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for weight, (requires_grad, grad) in flags.items():
            weight.requires_grad_(requires_grad)
            weight.grad = grad
