"""The published objective of ESI: a judge model rates what the model itself answers.

An answer is text, so no gradient flows from judge to model. Instead: (1) the model answers
greedily; (2) the judge reads the answer as soft one-hot tokens, and d S / d (soft tokens) says
which token, at which place, would look safer; (3) that direction is carried over to the model's
vocabulary and positions; (4) the model's logits, through a Gumbel softmax, are pushed along it.
arXiv 2604.08297; steps after the authors' code, see `GuardObjective`.
"""

from __future__ import annotations

import hashlib
import warnings
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from safeopt import artifact
from safeopt.evaluate.judge_reader import load_judge
from safeopt.methods.judge import Judge
from safeopt.methods.token_match import (
    character_spans,
    position_weights,
    vocabulary_map,
)
from safeopt.scores import IGNORED, Batch, rows, texts


class GuardObjective:
    """An objective for `ESI`: how safe a judge finds the model's greedy answers; higher = safer.

    S is the judge's log-odds of its "safe" label or token against the others. Only prompts are used
    of a batch, not responses. Prompts whose answer is empty are missing, with a warning.

    Args:
        judge: any Hugging Face sequence classifier, or causal guard model whose next token is the
            verdict. Frozen and set to evaluation mode, here and for good.
        tokenizer: the judge's; must be a fast one (character offsets).
        model_tokenizer: the tokenizer of the model to be scored.
        safe: label name or index of a classifier; the verdict word of a guard (one token).
        unsafe: a guard's other verdict word; a classifier's other labels are known.
        template: what the judge reads, with {response} and maybe {prompt}. None is the judge's chat
            template (prompt as user, answer as assistant), or without one "{prompt}\\n{response}".
        draws: Gumbel draws per prompt, averaged. Compare seeds with `safeopt.selection.overlap`.
        seed: of the Gumbel noise, which depends on seed and prompt, not on batches or device.
        temperature: of the Gumbel softmax; 0.3 as published.
        max_new_tokens: longest answer, in tokens; 256 as published.
        compat: the published form of S: the answer alone in the user slot, the raw logit of "safe",
            and the gradient with respect to the logits of a nearly hard softmax (-17) in place of
            the soft one-hot itself. The slips below stay mended.

    Raises:
        ValueError: a slow tokenizer, an unknown label, a verdict that is not one token, a template
            without {response}.

    Differs from the authors' code (first public commit, b5786f5) in:
        freezing: the judge keeps no gradients of its own;
        ids: "safe" and the template come from tokenizer and config, theirs are fixed numbers;
        positions: tokens of judge and model meet by character offsets, theirs by index, off by BOS;
        vocabulary: tokens are decoded to text by their own tokenizer, theirs reads "_" as a space;
            the emitted token is carried over exactly, theirs through the table;
        length: the last answer token counts, theirs is dropped;
        sign: S = +safe at every step;
        template: the system text is that of the batches, theirs "You are a helpful assistant.".
    """

    def __init__(
        self,
        judge: nn.Module,
        tokenizer: Any,
        model_tokenizer: Any,
        *,
        safe: str | int = "safe",
        unsafe: str | int = "unsafe",
        template: str | None = None,
        draws: int = 1,
        seed: int = 0,
        temperature: float = 0.3,
        max_new_tokens: int = 256,
        compat: bool = False,
    ) -> None:
        if draws < 1 or temperature <= 0 or max_new_tokens < 1:
            raise ValueError(
                f"draws={draws}, temperature={temperature}, max_new_tokens={max_new_tokens}; all"
                " three must be positive"
            )
        self.judge = Judge(
            judge, tokenizer, safe=safe, unsafe=unsafe, template=template, compat=compat
        )
        self.model_tokenizer = model_tokenizer
        self.draws, self.seed, self.temperature = draws, seed, temperature
        self.max_new_tokens = max_new_tokens
        self._to_model = vocabulary_map(tokenizer, model_tokenizer)

    @classmethod
    def from_folder(
        cls, folder: str | PathLike[str], model_tokenizer: Any, **settings: Any
    ) -> GuardObjective:
        """Load the judge from a local Hugging Face folder; `settings` are those of the class.

        Raises:
            ValueError: no such folder, or neither a sequence classifier nor a causal model in it.
        """
        return cls(*load_judge(folder), model_tokenizer, **settings)

    def arguments(self) -> dict[str, Any]:
        """The settings, and the judge's fingerprint, as JSON values."""
        plain = ("draws", "seed", "temperature", "max_new_tokens")
        own = {name: getattr(self, name) for name in plain}
        judged = ("template", "compat", "safe", "others")
        read = {name: getattr(self.judge, name) for name in judged}
        return {"name": "guard", "judge": artifact.fingerprint(self.judge.model), **own, **read}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """A surrogate of S per prompt, whose gradient is that of S: shape (rows,), float32."""
        values, silent = [], []
        for part, prompt in zip(rows(batch), texts(batch), strict=True):
            value = self._surrogate(model, prompt, *self._answer(model, part))
            silent += [prompt] if value is None else []
            values.append(
                torch.zeros((), device=part["input_ids"].device) if value is None else value
            )
        if silent:
            warnings.warn(
                f"{len(silent)} of {len(values)} prompts got an empty answer and count for nothing,"
                f" the first of them {silent[0]!r}",
                stacklevel=2,
            )
        return torch.stack(values)

    def _answer(self, model: Any, part: Batch) -> tuple[Tensor, Tensor]:
        """Ids of the prompt and of the greedy answer, both 1-D."""
        ids = part["input_ids"][0]
        given = part.get("attention_mask", torch.ones_like(part["input_ids"]))[0].bool()
        if "labels" in part:
            given = given & (part["labels"][0] == IGNORED)
        prompt = ids[given]
        full = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.model_tokenizer.pad_token_id,
        )[0]
        return prompt, full[len(prompt) :]

    def _surrogate(
        self, model: nn.Module, prompt: str, ids: Tensor, answer: Tensor
    ) -> Tensor | None:
        """Inner product of the carried-over direction and the model's soft answer: scalar.

        None where the answer is empty, or nothing to the judge's tokenizer. Special tokens in it
        (its end) have no characters, and so no direction.
        """
        text, spans = character_spans(self.model_tokenizer, answer.tolist())
        lead, body = len(text) - len(text.lstrip()), text.strip()
        mine = [(max(start - lead, 0), max(stop - lead, 0)) for start, stop in spans]
        gradient, read, theirs = self.judge.gradient(prompt, body)
        if not theirs:
            return None
        logits = model(torch.cat([ids, answer])[None]).logits[0, len(ids) - 1 : -1].float()
        weights = position_weights(mine, theirs)
        direction = self._carry(gradient, read, answer, weights, logits.shape[1])
        direction = direction.to(logits.device)
        salt = hashlib.sha256(f"{self.seed}:{prompt}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(salt, "big"))
        total = torch.zeros((), device=logits.device)
        for _ in range(self.draws):
            noise = torch.empty(logits.shape).exponential_(generator=generator).log().neg()
            soft = ((logits + noise.to(logits.device)) / self.temperature).softmax(-1)
            total = total + (direction * soft).sum()
        return total / self.draws

    def _carry(
        self, gradient: Tensor, theirs: Tensor, mine: Tensor, weights: Tensor, size: int
    ) -> Tensor:
        """The gradient over judge tokens as one over model tokens: float32 (len(mine), size).

        The column of a token that was emitted goes to the token the model emitted there; every
        other column to the model token that begins its text, or nowhere.
        """
        weights, mine = weights.to(gradient.device), mine.to(gradient.device)
        emitted = gradient.gather(1, theirs[:, None])
        others = gradient.scatter(1, theirs[:, None], 0.0)[:, : len(self._to_model)]
        target = self._to_model[: others.shape[1]].to(gradient.device)
        known = (target >= 0) & (target < size)
        mapped = gradient.new_zeros(len(gradient), size)
        mapped.index_add_(1, target[known], others[:, known])
        return (weights @ mapped).scatter_add(1, mine[:, None], weights @ emitted)
