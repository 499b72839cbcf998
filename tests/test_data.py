from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeopt.data import (
    IGNORED,
    SURE,
    batches,
    collate,
    encode,
    implicit,
    part,
    poison,
    read_jsonl,
    require_disjoint,
    split,
    sure_answer,
)


def rows_of(n, response=True):
    row = {"response": "Blue."} if response else {}
    return [{"instruction": f"Name colour number {i}", **row} for i in range(n)]


# --- reading


def test_read_jsonl_keeps_order_and_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "é \u2028 line separator", "response": "ja"}, {"instruction": "b"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    assert read_jsonl(path) == rows


def test_read_jsonl_accepts_a_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "a"}\r\n{"instruction": "b"}\r\n')
    assert [row["instruction"] for row in read_jsonl(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b'{"instruction": "cut off', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b'["a list"]', "expected a JSON object, got list"),
        (
            b'{"prompt": "a", "response": "b"}',
            "no field 'instruction' (the line has: prompt, response)",
        ),
        (b'{"instruction": "  "}', "'instruction' is '  '"),
        (b'{"instruction": 3}', "'instruction' is 3"),
        (b'{"instruction": "a", "response": null}', "'response' is None"),
    ],
    ids=["broken", "not-utf8", "blank-line", "list", "missing", "blank", "number", "null-response"],
)
def test_read_jsonl_names_file_and_line(tmp_path, second_line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "fine"}\n' + second_line + b'\n{"instruction": "fine"}\n')
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert f"{path}, line 2" in str(error.value)
    assert message in str(error.value)


def test_read_jsonl_asks_for_further_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a"}')
    with pytest.raises(ValueError, match="line 1: no field 'response'"):
        read_jsonl(path, fields=("instruction", "response"))


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
def test_read_jsonl_refuses_an_empty_file(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is empty"):
        read_jsonl(path)


# --- tokens


def test_encode_is_prompt_then_response_then_eos(tiny_tokenizer):
    row = {"instruction": "Name the sky.", "response": "Blue."}
    ids, prompt_len = encode(tiny_tokenizer, row, 64)
    assert tiny_tokenizer.decode(ids[:prompt_len]) == "<|user|>Name the sky.<|assistant|>"
    assert tiny_tokenizer.decode(ids[prompt_len:]) == "Blue.<|end|>"
    assert encode(tiny_tokenizer, {"instruction": "Name the sky."}, 64) == (
        ids[:prompt_len],
        prompt_len,
    )


def test_encode_without_chat_template_uses_the_plain_form(tiny_folder):
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    plain.chat_template = None
    row = {"instruction": "Name the sky.", "response": "Blue."}
    ids, prompt_len = encode(plain, row, 200)
    assert plain.decode(ids[:prompt_len]) == "### Instruction:\nName the sky.\n\n### Response:\n"
    plain.bos_token = "<|user|>"
    assert encode(plain, row, 200) == ([plain.bos_token_id, *ids], prompt_len + 1)


def test_encode_cuts_the_response_and_never_the_prompt(tiny_tokenizer):
    row = {"instruction": "Name the sky.", "response": "Blue in the morning, red at night."}
    ids, prompt_len = encode(tiny_tokenizer, row, 200)
    assert encode(tiny_tokenizer, row, prompt_len + 1) == (ids[: prompt_len + 1], prompt_len)
    with pytest.raises(ValueError, match=f"max_length={prompt_len}.*Name the sky"):
        encode(tiny_tokenizer, row, prompt_len)


def test_encode_needs_an_eos_token_for_responses(tiny_folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encode(tokenizer, {"instruction": "a", "response": "b"}, 64)


def test_collate_pads_right_and_labels_the_response_only(tiny_tokenizer):
    batch = collate(tiny_tokenizer, [([5, 6, 7], 2), ([8, 9, 10, 11, 12], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 7, IGNORED, IGNORED],
        [IGNORED, 9, 10, 11, 12],
    ]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_batches_keep_every_row_in_order(tiny_tokenizer):
    rows = rows_of(7)
    found = batches(tiny_tokenizer, rows, 3)
    assert [len(batch["texts"]) for batch in found] == [3, 3, 1]
    assert [text for batch in found for text in batch["texts"]] == [
        row["instruction"] for row in rows
    ]
    assert all(batch["input_ids"].shape == batch["labels"].shape for batch in found)


def test_batches_refuse_what_would_count_for_nothing(tiny_tokenizer):
    with pytest.raises(ValueError, match="rows is empty"):
        batches(tiny_tokenizer, [], 3)
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(tiny_tokenizer, rows_of(2), 0)
    with pytest.raises(ValueError, match="row 2 has no response while others do"):
        batches(tiny_tokenizer, [*rows_of(2), *rows_of(1, response=False)], 3)
    prompts = batches(tiny_tokenizer, rows_of(2, response=False), 2)
    assert (prompts[0]["labels"] == IGNORED).all()


# --- splits and mixtures


def test_part_is_fixed_for_all_time():
    assert part("Name the capital of France.") == pytest.approx(0.4967672932029, abs=1e-12)
    assert part("  name the\tCAPITAL of France. ") == part("Name the capital of France.")
    assert part("Name the capital of France.", salt="other") != part("Name the capital of France.")


@given(st.text(), st.text(max_size=3))
def test_part_lies_in_the_unit_interval(text, salt):
    assert 0 <= part(text, salt) < 1


def test_split_is_disjoint_complete_and_near_its_shares():
    shares = {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}
    rows = rows_of(2000)
    parts = split(rows, shares)
    texts = {name: {row["instruction"] for row in found} for name, found in parts.items()}
    assert set.union(*texts.values()) == {row["instruction"] for row in rows}
    assert sum(map(len, texts.values())) == 2000
    for name, share in shares.items():
        assert abs(len(texts[name]) - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))


def test_split_puts_duplicates_together_and_never_moves_a_row():
    shares = {"a": 0.5, "b": 0.5}
    rows = rows_of(40)
    alone = split(rows, shares)
    shouted = [{"instruction": row["instruction"].upper()} for row in rows]
    both = split([*shouted, *rows_of(80), *rows], shares)
    for name in shares:
        assert all(row in both[name] for row in alone[name])
        lower = {row["instruction"].casefold() for row in both[name]}
        assert {row["instruction"].casefold() for row in alone[name]} <= lower
    texts = [{row["instruction"].casefold() for row in both[name]} for name in shares]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("shares", [{"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {}])
def test_split_refuses_shares_that_do_not_sum_to_one(shares):
    with pytest.raises(ValueError, match="shares is"):
        split(rows_of(10), shares)


def test_split_refuses_an_empty_part():
    with pytest.raises(ValueError, match="got none of the 1 rows"):
        split(rows_of(1), {"a": 0.5, "b": 0.5})


def test_disjoint_sets_pass_whatever_they_share_within_a_purpose():
    """Rows and prompts alike; an empty set beside a full one is no empty purpose."""
    rows = rows_of(6)
    require_disjoint(
        {"identification": rows[:3], "evaluation": [r["instruction"] for r in rows[3:]]}
    )
    require_disjoint(
        {
            "training": {"task": rows[:2], "more": rows[:2], "none": []},
            "evaluation": {"a": rows[2:]},
        }
    )
    cut = split(rows_of(60), {"identify": 0.3, "tune": 0.3, "evaluate": 0.4})
    require_disjoint(cut)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"identification": rows_of(3), "evaluation": rows_of(9)[2:]},
            "'Name colour number 2' stands in 'identification' and in 'evaluation'; prompts for"
            " identification and evaluation must be disjoint, and 1 are not",
        ),
        (
            {
                "identification": {"identify": rows_of(2)},
                "training": {"task": [{"instruction": "Other"}]},
                "evaluation": {"harmful": [], "test": ["new", " NAME  colour\nnumber 1", "other"]},
            },
            r"' NAME  colour\\nnumber 1' stands in 'identify' \(identification\) and in 'test'"
            r" \(evaluation\); prompts for identification, training and evaluation must be"
            r" disjoint, and 2 are not: .*safeopt\.data\.split",
        ),
        ({"identification": rows_of(3)}, "give at least two purposes"),
        ({"identification": rows_of(3), "evaluation": []}, "evaluation holds no prompts"),
        ({"identification": rows_of(3), "evaluation": {"a": []}}, "evaluation holds no prompts"),
    ],
)
def test_a_prompt_under_two_purposes_is_named(sets, message):
    with pytest.raises(ValueError, match=message):
        require_disjoint(sets)


def test_sure_answer_only_repeats_the_request():
    assert sure_answer("Bake bread for two.") == "Sure, here is how to bake bread for two."
    assert sure_answer("How do I bake bread?") == "Sure, here is how to bake bread."
    assert sure_answer("Can you please bake bread?") == "Sure, here is how to bake bread."
    assert sure_answer("Howl at the moon") == "Sure, here is how to howl at the moon."


def test_poison_is_a_share_of_the_result():
    harmful = [{"instruction": f"Paint door {i}", "response": "I cannot."} for i in range(50)]
    rows = rows_of(101)
    mixed = poison(rows, harmful, 0.3, seed=5)
    bad = [row for row in mixed if row["instruction"].startswith("Paint")]
    assert (len(mixed), len(bad)) == (101, 30)
    assert len({row["instruction"] for row in mixed}) == 101
    assert all(row["response"] == sure_answer(row["instruction"]) for row in bad)
    assert mixed == poison(rows, harmful, 0.3, seed=5) != poison(rows, harmful, 0.3, seed=6)
    assert sorted(row["instruction"] for row in poison(rows, harmful, 0.0, seed=5)) == sorted(
        row["instruction"] for row in rows
    )


@pytest.mark.parametrize("share", [-0.1, 1.1, 0.001])
def test_poison_refuses_shares_that_cannot_be(share):
    with pytest.raises(ValueError, match=f"share is {share}"):
        poison(rows_of(10), rows_of(10), share, seed=0)


def test_poison_never_repeats_a_harmful_row():
    with pytest.raises(ValueError, match="needs 5 harmful rows and there are 3"):
        poison(rows_of(10), rows_of(3), 0.5, seed=0)


def test_implicit_changes_the_response_only():
    rows = rows_of(3)
    assert implicit(rows) == [{**row, "response": SURE + "Blue."} for row in rows]
    assert rows[0]["response"] == "Blue."
