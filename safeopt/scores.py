"""Scores: how much each weight matters, and the one loop that lets a scorer see a model work.

A scorer (see `Scorer`) says which weights it scores and what it adds up while prompts go by;
`score` does what all need: evaluation mode, batches on the device, a model left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from safeopt import artifact, names
from safeopt.parties import parties
from safeopt.progress import bar
from safeopt.ranks import largest, reshard
from safeopt.sharded_file import write
from safeopt.sharding import device_of, is_sharded, local, wrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    Scores of a sharded model are DTensors, sharded as their weights. All ranks make, check, save
    and `select` from them together, as these compare notes; no rank ever holds all scores.

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
        extremes = {name: _extremes(local(tensor)) for name, tensor in self._tensors.items()}
        bad = [not (low >= 0 and high < float("inf")) for low, high in extremes.values()]
        spoiled = largest(bad, self._tensors.values())
        if any(spoiled):
            place = spoiled.index(1)
            name, (low, high) = list(extremes.items())[place]
            here = f"reach from {low} to {high}" if bad[place] else "are spoiled on another rank"
            raise ValueError(
                f"scores of {name!r} {here}; they must be finite and not negative: look for"
                " overflow in the model or in what was added up"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write scores and provenance to one safetensors file (errors: see `artifact.write`).

        Scores of a sharded model are gathered tensor by tensor, and the first rank writes the file;
        all ranks call this, and all raise if it fails.
        """
        self.check()
        write(path, self._tensors, "scores", self.provenance)

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
    """What `score` needs of a method: ESI is one; SNIP, Wanda or Fisher fit the same surface.

    One that works on several processes has `parallel = True`; its observation then keeps all it
    adds up in a `GradientSum` called `sums`, and `finish` gives this rank's part of each score. If
    it adds nothing but gradients, `linear` is true as well. An observation may have a `check` that
    takes a batch and raises ValueError for what `observe` would refuse.
    """

    method: str

    def arguments(self) -> dict[str, Any]:
        """The settings as JSON values, for the provenance."""

    def targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that get scores, by canonical name; usually `scorable(model)`."""

    def start(self, model: nn.Module, targets: Mapping[str, Tensor]) -> Observation:
        """Begin a run. No parameter requires a gradient at this point: ask for those you need."""


def score(
    model: nn.Module,
    batches: Iterable[Batch],
    scorer: Scorer,
    *,
    progress: bool = True,
    group: ProcessGroup | None = None,
) -> Scores:
    """Score the weights of a model on prompts.

    The model runs in evaluation mode on the device it is on. Modes, `requires_grad` and `grad` of
    all parameters are as before afterwards, also after an error. Beside the activations, gradient
    scorers keep one float32 buffer per scored weight and never a full set of gradients.

    Several processes: all call this together, and all raise if one of them cannot go on. Of a model
    sharded by FSDP2 (`fully_shard`), each rank scores its own part, from gradients after their
    reduction, and every rank is given the same batches. Of a model that every rank has whole (DDP),
    `group` says that each rank has its own share of the batches: sums are added up over the ranks
    before anything else is done with them, so scores are those of one process up to the order of
    float32 additions. Both at once, a sharded model and shares, is for ESI(reduction="sum") with as
    many batches on every rank. An objective of your own must then run the model equally often on
    every rank. Nothing that is sharded is gathered, but for the fingerprint, once and singly.

    Args:
        model: called as model(input_ids=..., attention_mask=...). The module inside DDP is scored.
        batches: made by `safeopt.data.batches`, or any mappings like those; read once, in order.
        scorer: such as `safeopt.methods.esi.ESI()`. Several processes: ESI, Fisher and SNIP.
        progress: show a bar on stderr (of one rank), if tqdm is installed.
        group: of ranks with different batches; their prompts are counted in rank order.

    Raises:
        ValueError: no batches, no weights to score, or what the scorer objects to; batches, weights
            or settings that do not fit together across ranks; DDP without `group`.
        FloatingPointError: a loss or gradient is NaN or infinite; the message names the prompt.
        NotImplementedError: a sharded model that is not cut by `fully_shard` along rows, or a
            scorer that needs whole matrices.
    """
    model, ranks = parties(model, scorer, group)
    prompts: list[str] = []
    with _undisturbed(model):
        with ranks.together():
            targets = scorer.targets(model)
            if not targets:
                kind = type(model).__name__
                raise ValueError(f"{kind} has no weight that {scorer.method} can score")
        ranks.meet(scorer, targets)
        observation = scorer.start(model, targets)
        if ranks.differ:
            observation.sums.differ = True  # type: ignore[attr-defined]
        try:
            with ranks.together():
                device = _device(model)
                # Refused when read, as the other ranks wait for this one by then.
                given = _single() if isinstance(batches, Mapping) else batches
                shown = bar(given, progress and ranks.shows, _title(scorer), "batch")
                for batch in ranks.agreed(shown, getattr(observation, "check", texts)):
                    prompts.extend(texts(batch))
                    observation.observe(_to(batch, device))
                if not prompts:
                    raise ValueError("batches is empty: give at least one prompt to score on")
            prompts = ranks.merge(observation, prompts)
            parts = observation.finish()
        finally:
            observation.close()
    fingerprint = artifact.fingerprint(model)
    ranks.require_same_weights(fingerprint)
    provenance = {
        "model": fingerprint,
        "method": scorer.method,
        "arguments": scorer.arguments(),
        "prompts": artifact.digest(prompts),
        "n": len(prompts),
        "torch": torch.__version__,
    }
    return Scores({name: wrap(part, targets[name]) for name, part in parts.items()}, provenance)


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


def _extremes(tensor: Tensor) -> tuple[float, float]:
    low, high = tensor.aminmax() if tensor.numel() else (tensor.new_zeros(()),) * 2
    return float(low), float(high)


def _title(scorer: Scorer) -> str:
    return f"score ({scorer.method})"


def _single() -> Iterator[Batch]:
    raise ValueError("batches is a single batch; pass a list of batches: [batch]")
    yield


def _device(model: nn.Module) -> torch.device:
    """Where the model works; offloaded weights of FSDP2 lie elsewhere."""
    weight = next(model.parameters())
    return device_of(weight.device_mesh) if is_sharded(weight) else weight.device  # type: ignore[attr-defined]


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
        reshard(model)
        for module, training in modes.items():
            module.training = training
        for weight, (requires_grad, grad) in flags.items():
            weight.requires_grad_(requires_grad)
            weight.grad = grad
