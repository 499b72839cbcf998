"""A judge: how safe a model says an answer is, and which other tokens would have looked safer."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.methods.token_match import Span

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer\N{OBJECT REPLACEMENT CHARACTER}"  # in no real text
HARD = -17.0  # logit of every other token in the published soft input, 0 at the token itself


class Judge:
    """A frozen judge model and what it reads; the arguments are those of `GuardObjective`.

    The template is filled with the answer, and tokenised once, as a whole; the answer's tokens are
    found by character offsets. So special tokens stand where the judge's own template has them.
    """

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
        if not tokenizer.is_fast:
            raise ValueError(
                "the judge's tokenizer has no character offsets (it is a slow one); load a fast one"
            )
        if template is not None and "{response}" not in template:
            raise ValueError(f"template is {template!r}; it must contain {{response}}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.template, self.compat = tokenizer, template, compat
        self.classifies = model.get_output_embeddings() is None
        if self.classifies:
            self.safe, self.others = _labels(model, safe)
        else:
            self.safe, self.others = _token(tokenizer, safe), [_token(tokenizer, unsafe)]

    def rate(self, prompt: str, answer: str) -> Tensor:
        """S of an answer: scalar, float32, in logits; higher = safer."""
        ids, _, _ = self._read(prompt, answer)
        return self._safety(self.model.get_input_embeddings()(ids[None]))

    def gradient(self, prompt: str, answer: str) -> tuple[Tensor, Tensor, list[Span]]:
        """How S changes with every token of the answer.

        Returns:
            dS / d(soft token), float32 of shape (tokens, embedding rows); the tokens' ids, int64;
            and the characters of the answer that each token covers.
        """
        ids, slots, spans = self._read(prompt, answer)
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
        if self.compat or not self.others:
            return verdict[self.safe]
        return verdict[self.safe] - verdict[self.others].logsumexp(0)

    def _read(self, prompt: str, answer: str) -> tuple[Tensor, Tensor, list[Span]]:
        """Ids of what the judge reads, where in it the answer's tokens are, their characters."""
        before, after, bare = self._frame(prompt)
        encoded = self.tokenizer(
            before + answer + after, add_special_tokens=not bare, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        limit = getattr(self.model.config, "max_position_embeddings", None) or len(ids)
        if len(ids) > limit:
            raise ValueError(
                f"the judge reads {limit} tokens at most, and {len(ids)} are needed for the prompt"
                f" {prompt!r} and its answer; lower max_new_tokens, or leave the prompt out"
            )
        slots, spans = [], []
        # Byte tokens of one character all have its offsets; as in character_spans, the last counts.
        for i, (here, further) in enumerate(zip(offsets, [*offsets[1:], None], strict=True)):
            start, stop = max(here[0] - len(before), 0), min(here[1] - len(before), len(answer))
            if start < stop and here != further:
                slots.append(i)
                spans.append((start, stop))
        place = next(self.model.parameters()).device
        where = torch.tensor(slots, dtype=torch.int64, device=place)
        return torch.tensor(ids, device=place), where, spans

    def _frame(self, prompt: str) -> tuple[str, str, bool]:
        """The text before and after the answer, and whether it holds its special tokens already."""
        chat = self.template is None and bool(self.tokenizer.chat_template)
        if chat:
            talk = [("user", prompt), ("assistant", ANSWER)]
            text = self.tokenizer.apply_chat_template(
                [
                    {"role": role, "content": content}
                    for role, content in ([("user", ANSWER)] if self.compat else talk)
                ],
                tokenize=False,
                add_generation_prompt=not self.classifies,
            )
        else:
            text = self.template or ("{response}" if self.compat else "{prompt}\n{response}")
            text = text.replace("{response}", ANSWER).replace("{prompt}", prompt)
        before, *rest = text.split(ANSWER)
        if len(rest) != 1:
            raise ValueError(
                f"the judge's template shows the answer {len(rest)} times, and must show it once;"
                " pass template='...{prompt}...{response}...'"
            )
        return before, rest[0], chat


def load_judge(folder: str | PathLike[str]) -> tuple[Any, Any]:
    """The model and tokenizer of a local Hugging Face folder that holds a judge.

    Raises:
        ValueError: no such folder, or neither a sequence classifier nor a causal model in it.
    """
    import transformers as hf

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a local Hugging Face model folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    kinds = {
        "ForSequenceClassification": hf.AutoModelForSequenceClassification,
        "ForCausalLM": hf.AutoModelForCausalLM,
    }
    architectures = hf.AutoConfig.from_pretrained(folder, **local).architectures or []
    for ending, loader in kinds.items():
        if any(name.endswith(ending) for name in architectures):
            model = loader.from_pretrained(folder, dtype="auto", **local)
            return model, hf.AutoTokenizer.from_pretrained(folder, **local)
    raise ValueError(f"{folder} holds {architectures}; a judge is one of {tuple(kinds)}")


def _labels(model: Any, safe: str | int) -> tuple[int, list[int]]:
    """Index of a classifier's safe label, and those of all others."""
    labels = {int(i): str(label) for i, label in model.config.id2label.items()}
    found = [i for i, label in labels.items() if safe == i or str(safe).lower() == label.lower()]
    if len(found) != 1:
        raise ValueError(f"safe is {safe!r}; the judge's labels are {labels}: give one of them")
    return found[0], [i for i in labels if i != found[0]]


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
