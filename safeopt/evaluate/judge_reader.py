"""What a judge model reads: its template, filled with a prompt and an answer, as token ids."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Span: TypeAlias = tuple[int, int]

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer\N{OBJECT REPLACEMENT CHARACTER}"  # in no real text


class Reader:
    """A frozen judge model, its tokenizer and its template.

    The template is filled with the answer, and tokenised once, as a whole; the answer's tokens are
    found by character offsets. So special tokens stand where the judge's own template has them.

    Args:
        model: a Hugging Face sequence classifier or causal language model. Frozen and set to
            evaluation mode, here and for good.
        tokenizer: the judge's; must be a fast one (character offsets).
        template: what the judge reads, with {response} and maybe {prompt}. None is the judge's chat
            template (prompt as user, answer as assistant), or without one "{prompt}\\n{response}".
        compat: the answer alone, in the user slot, as ESI's authors have it.

    Raises:
        ValueError: a slow tokenizer, a template without {response}.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, template: str | None = None, compat: bool = False
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

    def read(self, prompt: str, answer: str) -> tuple[Tensor, Tensor, list[Span]]:
        """Ids of what the judge reads, where in it the answer's tokens are, their characters."""
        before, after, bare = self._frame(prompt)
        encoded = self.tokenizer(
            before + answer + after, add_special_tokens=not bare, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        limit = getattr(self.model.config, "max_position_embeddings", None) or len(ids)
        # RoBERTa has two positions more than it can read.
        limit = min(limit, self.tokenizer.model_max_length)
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

    Nothing is downloaded, no code of the folder is run and no pickle is read.

    Raises:
        ValueError: no such folder, neither a sequence classifier nor a causal model in it, or
            weights that are missing or cannot be read.
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
            return _model(folder, loader), hf.AutoTokenizer.from_pretrained(folder, **local)
    raise ValueError(f"{folder} holds {architectures}; a judge is one of {tuple(kinds)}")


def _model(folder: str | PathLike[str], loader: Any) -> Any:
    try:
        model, found = loader.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, OSError, RuntimeError: the weights cannot be read
        raise ValueError(
            f"{folder}: cannot read the judge's weights ({error}); give complete .safetensors files"
        ) from error
    wrong = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if wrong:  # they would be random, and so would be the verdicts
        raise ValueError(
            f"{folder}: {len(wrong)} of the judge's weights are missing, or shaped unlike"
            f" config.json says, among them {', '.join(wrong[:3])}; copy the whole folder again"
        )
    return model


def labels_of(model: Any, wanted: str | int, argument: str = "safe") -> tuple[int, list[int]]:
    """Index of one of a classifier's labels, and those of the labels it stands against.

    None stand against it where every label has a yes or no of its own: multi-label classifiers, and
    those with one label.

    Raises:
        ValueError: not one label of this name or index; the message names `argument`.
    """
    labels = {int(i): str(label) for i, label in model.config.id2label.items()}
    named = str(wanted).lower()
    found = [i for i, label in labels.items() if wanted == i or named == label.lower()]
    if len(found) != 1:
        raise ValueError(
            f"{argument} is {wanted!r}; the judge's labels are {labels}: give one of them"
        )
    if model.config.problem_type == "multi_label_classification":
        return found[0], []
    return found[0], [i for i in labels if i != found[0]]


def log_odds(logits: Tensor, chosen: int, others: list[int]) -> Tensor:
    """Of one logit against those of all others, or of yes against no without others: scalar."""
    return logits[chosen] - logits[others].logsumexp(0) if others else logits[chosen]
