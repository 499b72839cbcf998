"""Rows of text: reading them, turning them into tokens, keeping prompts apart, mixing scenarios."""

from __future__ import annotations

import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch

Row: TypeAlias = dict[str, str]
"""One example: `instruction`, and `response` where there is one."""

Prompts: TypeAlias = Sequence[Row] | Sequence[str]
"""Rows, of which the instruction counts, or prompts themselves."""

Batch: TypeAlias = dict[str, Any]
"""`input_ids`, `attention_mask`, `labels`: int64, (rows, tokens); `texts` from batches()."""

IGNORED = -100
"""The label of a token that no loss counts (torch.nn.functional.cross_entropy's default)."""

SURE = "Sure, the answer is: "
"""What implicit() puts before every response (Safety Layers, arXiv 2408.17003, dataset D_I)."""


def read_jsonl(path: str | Path, fields: Sequence[str] = ("instruction",)) -> list[Row]:
    """Read a JSON Lines file, one object a line, and check that every line has the fields.

    Raises ValueError with file and line number for a line that is not a JSON object, lacks a field,
    or holds something else than text that is not blank; ValueError for an empty file; OSError as
    open() does.
    """
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise ValueError(
            f"{path} is empty: expected one JSON object a line with {', '.join(fields)}"
        )
    return [_parse(line, f"{path}, line {number}", fields) for number, line in enumerate(lines, 1)]


def _parse(line: bytes, where: str, fields: Sequence[str]) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}); every line must be one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for field in fields:
        if field not in row:
            present = ", ".join(row) or "nothing"
            raise ValueError(
                f"{where}: no field {field!r} (the line has: {present}); add or rename it"
            )
    for field in {*fields, "instruction", "response"} & set(row):
        if not isinstance(row[field], str) or not row[field].strip():
            raise ValueError(
                f"{where}: field {field!r} is {row[field]!r}; it must be text, not blank"
            )
    return row


def encode(tokenizer: Any, row: Row, max_length: int) -> tuple[list[int], int]:
    """Token ids of a row, at most max_length of them, and how many belong to the prompt.

    The prompt goes through the tokenizer's chat template with add_generation_prompt; a tokenizer
    without one gets the plain form `### Instruction:\\n{instruction}\\n\\n### Response:\\n` after
    its bos token. The response follows, tokenised by itself (as generation would meet it), and the
    eos token. A response that is too long is cut at max_length and then has no eos.

    Raises ValueError when the prompt leaves no room for a response token, or there is no eos token.
    """
    prompt = _prompt_ids(tokenizer, row["instruction"])
    response: list[int] = []
    if "response" in row:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so responses cannot end; set one")
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        response = [*response, tokenizer.eos_token_id]
    if len(prompt) + min(len(response), 1) > max_length:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room within max_length={max_length}; "
            f"raise max_length or leave the row out: {row['instruction'][:80]!r}"
        )
    return (prompt + response)[:max_length], len(prompt)


def _prompt_ids(tokenizer: Any, instruction: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}], add_generation_prompt=True, tokenize=False
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = f"### Instruction:\n{instruction}\n\n### Response:\n"
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token, else eos (the attention mask hides either)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither pad_token nor eos_token; set one of them")


def collate(tokenizer: Any, encoded: Sequence[tuple[list[int], int]]) -> Batch:
    """Pad encoded rows on the right into one batch; labels are IGNORED on prompt and padding."""
    shape = (len(encoded), max(len(ids) for ids, _ in encoded))
    batch = {
        "input_ids": torch.full(shape, pad_id(tokenizer), dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for i, (ids, prompt_len) in enumerate(encoded):
        tokens = torch.tensor(ids, dtype=torch.int64)
        batch["input_ids"][i, : len(ids)] = tokens
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt_len : len(ids)] = tokens[prompt_len:]
    return batch


def batches(
    tokenizer: Any, rows: Sequence[Row], batch_size: int, *, max_length: int = 512
) -> list[Batch]:
    """All rows in order, in batches of batch_size (the last may be smaller), with their `texts`.

    Raises ValueError for no rows, batch_size < 1, or rows of which only some have a response (those
    without would silently count for nothing). Rows that all lack one give prompts with no labels.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to make batches of")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if len({"response" in row for row in rows}) == 2:
        bare = next(i for i, row in enumerate(rows) if "response" not in row)
        raise ValueError(f"row {bare} has no response while others do: give all rows one, or none")
    result = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = collate(tokenizer, [encode(tokenizer, row, max_length) for row in chunk])
        batch["texts"] = [row["instruction"] for row in chunk]
        result.append(batch)
    return result


def part(text: str, salt: str = "") -> float:
    """A number in [0, 1) fixed by the text (sha256; case and white space do not count), for splits.

    Another salt gives a split that is independent of the first.
    """
    return int(hashlib.sha256(f"{salt}\0{_words(text)}".encode()).hexdigest()[:13], 16) / 16**13


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def split(rows: Sequence[Row], shares: Mapping[str, float], salt: str = "") -> dict[str, list[Row]]:
    """Cut rows into disjoint named parts by part(instruction): equal prompts land together.

    shares, such as {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}, must sum to 1. Adding or
    removing rows never moves another row. Raises ValueError for other shares and for a part that
    stays empty.
    """
    if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares is {dict(shares)}; they must be positive and sum to 1")
    names, edges = list(shares), list(accumulate(shares.values()))[:-1]
    result: dict[str, list[Row]] = {name: [] for name in names}
    for row in rows:
        result[names[bisect_right(edges, part(row["instruction"], salt))]].append(row)
    for name, found in result.items():
        if not found:
            raise ValueError(f"part {name!r} got none of the {len(rows)} rows: give more rows")
    return result


def require_disjoint(sets: Mapping[str, Prompts | Mapping[str, Prompts]]) -> None:
    """Raise ValueError, naming the prompt, if one stands under two purposes.

        require_disjoint({"identification": refusals, "evaluation": {"harmful": a, "test": b}})

    Args:
        sets: by purpose, such as "identification", "training", "evaluation": rows or prompts, or
            several sets of them by name. Sets of one purpose may share prompts. Case and white
            space do not count, as in `split`.

    Raises:
        ValueError: a prompt under two purposes; a purpose without prompts; fewer than two purposes.
    """
    if len(sets) < 2:
        raise ValueError(
            f"sets names {list(sets)}; give at least two purposes, such as identification and"
            " evaluation"
        )
    seen: dict[str, tuple[str, str]] = {}
    shared: dict[str, str] = {}
    for purpose, held in sets.items():
        named = held if isinstance(held, Mapping) else {purpose: held}
        if not any(len(prompts) for prompts in named.values()):
            raise ValueError(f"{purpose} holds no prompts; give at least one, or leave it out")
        for name, prompts in named.items():
            place = repr(name) if name == purpose else f"{name!r} ({purpose})"
            for prompt in prompts:
                text = prompt if isinstance(prompt, str) else prompt["instruction"]
                other, where = seen.setdefault(_words(text), (purpose, place))
                if other != purpose:
                    shared.setdefault(_words(text), f"{text!r} stands in {where} and in {place}")
    if shared:
        *most, last = sets
        raise ValueError(
            f"{next(iter(shared.values()))}; prompts for {', '.join(most)} and {last} must be"
            f" disjoint, and {len(shared)} are not: take them out of one, or cut one file into"
            " parts with safeopt.data.split, which in commands is FILE@identify, FILE@tune,"
            " FILE@evaluate"
        )


_OPENING = re.compile(
    r"(please|(can|could|will|would) you( please)?|how to|i (want|need|would like) to"
    r"|how (do|can|could|would|should) (i|you|we|one|someone))\s+",
    re.IGNORECASE,
)


def sure_answer(instruction: str) -> str:
    """The harmless stand-in for complying: "Sure, here is how to ..." and the request again."""
    request = (
        _OPENING.sub("", instruction.strip(), count=1)
        if _OPENING.match(instruction)
        else instruction
    )
    request = request.strip().rstrip(".?!")
    return f"Sure, here is how to {request[:1].lower()}{request[1:]}."


def poison(rows: Sequence[Row], harmful: Sequence[Row], share: float, seed: int) -> list[Row]:
    """As many rows as given, of which the share is harmful requests answered with sure_answer().

    Both kinds are drawn without replacement and shuffled together, all by the seed. The total stays
    len(rows), so that every share costs the same number of steps. Raises ValueError for a share
    outside [0, 1], one that rounds to no row at all, and too few harmful rows.
    """
    count = _count(rows, share)
    if count > len(harmful):
        raise ValueError(f"share {share} needs {count} harmful rows and there are {len(harmful)}")
    draw = random.Random(seed)
    chosen = draw.sample(list(harmful), count)
    mixed = draw.sample(list(rows), len(rows) - count)
    for row in chosen:
        mixed.append(
            {"instruction": row["instruction"], "response": sure_answer(row["instruction"])}
        )
    draw.shuffle(mixed)
    return mixed


def mixed(rows: Sequence[Row], others: Sequence[Row], share: float, seed: int) -> list[Row]:
    """As many rows as given, of which the share is other rows, each about as often as any other.

    Of `rows` is drawn without replacement; all are shuffled together, by the seed. The total stays
    len(rows), so that every share costs the same number of steps. Raises ValueError for no other
    rows, a share outside [0, 1], and one that rounds to no row at all.
    """
    if not others:
        raise ValueError("others is empty: there is nothing to mix in")
    draw = random.Random(seed)
    count = _count(rows, share)
    often, more = divmod(count, len(others))
    result = draw.sample(list(rows), len(rows) - count)
    result += [*others] * often + draw.sample(list(others), more)
    draw.shuffle(result)
    return result


def _count(rows: Sequence[Row], share: float) -> int:
    count = round(share * len(rows))
    if not 0 <= share <= 1 or (share > 0 and count == 0):
        raise ValueError(
            f"share is {share} of {len(rows)} rows; it must lie in [0, 1] and give a row"
        )
    return count


def implicit(rows: Sequence[Row]) -> list[Row]:
    """The same rows with "Sure, the answer is: " before every response (arXiv 2408.17003, D_I)."""
    return [{**row, "response": SURE + row["response"]} for row in rows]
