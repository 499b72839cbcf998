"""A judge: how safe a model says an answer is, and which other tokens would have looked safer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from safeopt.evaluate.judge_reader import Reader, Span, labels_of, log_odds

HARD = -17.0  # logit of every other token in the published soft input, 0 at the token itself


class Judge(Reader):
    """A reader whose verdict is a label or a token; the arguments are those of `GuardObjective`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        safe: str | int,
        unsafe: str | int,
        template: str | None,
        compat: bool,
    ) -> None:
        super().__init__(model, tokenizer, template=template, compat=compat)
        if self.classifies:
            self.safe, self.others = labels_of(model, safe)
        else:
            self.safe, self.others = _token(tokenizer, safe), [_token(tokenizer, unsafe)]

    def rate(self, prompt: str, answer: str) -> Tensor:
        """S of an answer: scalar, float32, in logits; higher = safer."""
        ids, _, _ = self.read(prompt, answer)
        return self._safety(self.model.get_input_embeddings()(ids[None]))

    def gradient(self, prompt: str, answer: str) -> tuple[Tensor, Tensor, list[Span]]:
        """How S changes with every token of the answer.

        Returns:
            dS / d(soft token), float32 of shape (tokens, embedding rows); the tokens' ids, int64;
            and the characters of the answer that each token covers.
        """
        ids, slots, spans = self.read(prompt, answer)
        embeddings = self.model.get_input_embeddings()
        # Through the module, as some models scale embeddings in its forward.
        table = embeddings(torch.arange(embeddings.num_embeddings, device=ids.device)).detach()
        hard = nn.functional.one_hot(ids[slots], len(table)).float()
        leaf = (HARD * (1 - hard) if self.compat else hard).requires_grad_()
        soft = leaf.softmax(-1) if self.compat else leaf
        embedded = table[ids].index_copy(0, slots, soft.to(table.dtype) @ table)
        (gradient,) = torch.autograd.grad(self._safety(embedded[None]), leaf)
        return gradient, ids[slots], spans

    def _safety(self, embedded: Tensor) -> Tensor:
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64, device=embedded.device)
        logits = self.model(inputs_embeds=embedded, attention_mask=mask).logits[0].float()
        verdict = logits if self.classifies else logits[-1]
        return log_odds(verdict, self.safe, [] if self.compat else self.others)


def _token(tokenizer: Any, word: str | int) -> int:
    if isinstance(word, int):
        return word
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the verdict {word!r} is {len(ids)} tokens for the judge's tokenizer; it must be one,"
            " such as the first token of the judge's answer"
        )
    return int(ids[0])
