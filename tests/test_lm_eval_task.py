"""The task for lm-evaluation-harness: its files, and the harness itself where it is installed."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("yaml")
pytest.importorskip("transformers")

import yaml

from safeopt.cli import main
from safeopt.evaluate import accuracy, answers, export_task
from safeopt.evaluate.utility import _final

ROWS = [
    {"instruction": "Name the sky {{ topic }}.", "response": "blue \u2014 \U0001f600", "id": "7"},
    {"instruction": 'Say "hi"\nand go.', "response": "hi"},
]

# Fields of docs/task_guide.md of the harness, and of `exact_match` in its metrics.
DOCUMENTED = {
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "process_docs", "description", "doc_to_text",
    "doc_to_target", "doc_to_choice", "fewshot_delimiter", "target_delimiter", "num_fewshot",
    "metric_list", "output_type", "generation_kwargs", "repeats", "filter_list", "metadata",
}  # fmt: skip
METRIC = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation",
          "ignore_numbers", "regexes_to_ignore"}  # fmt: skip


def scored(metric: dict, answer: str, response: str) -> bool:
    """What exact_match does with one answer, after the harness's documentation."""
    for pattern in metric["regexes_to_ignore"]:
        answer, response = re.sub(pattern, "", answer), re.sub(pattern, "", response)
    return answer.lower() == response.lower()


def test_the_task_has_documented_fields_and_finds_its_rows(tmp_path):
    paths = export_task(ROWS, tmp_path / "new" / "tasks \U0001f600", "my_task-1", max_new_tokens=9)
    task = yaml.safe_load(paths["task"].read_text("utf-8"))
    assert set(task) <= DOCUMENTED and set(task["metric_list"][0]) <= METRIC
    assert (task["task"], task["output_type"]) == ("my_task-1", "generate_until")
    assert task["generation_kwargs"]["do_sample"] is False
    assert task["generation_kwargs"]["max_gen_toks"] == 9
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        task["dataset_path"], cache_dir=str(tmp_path / "cache"), **task["dataset_kwargs"]
    )[task["test_split"]]
    assert list(found) == [{k: row[k] for k in ("instruction", "response")} for row in ROWS]
    assert task["metadata"]["rows"] == 2


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_those_the_model_was_trained_on(tmp_path, chat, tiny_tokenizer):
    import jinja2

    from safeopt.data import encode

    paths = export_task(ROWS, tmp_path, "t", chat=chat)
    task = yaml.safe_load(paths["task"].read_text("utf-8"))
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    text, target = (
        environment.from_string(task[key]).render(**ROWS[0])
        for key in ("doc_to_text", "doc_to_target")
    )
    assert target == ROWS[0]["response"]  # braces in the rows are text, no templates
    if chat:
        talk = [{"role": "user", "content": text}]
        text = tiny_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        tokenizer = tiny_tokenizer
    else:
        tokenizer = type(tiny_tokenizer)(
            tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>"
        )
    assert (
        tokenizer(text)["input_ids"]
        == encode(tokenizer, {"instruction": ROWS[0]["instruction"]}, 200)[0]
    )


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("blue", "Blue."),
        ("Sure, the answer is: blue", " blue\n"),
        ("so\n#### 7", "#### 7."),
        ("6 #### no, \n#### 7", "7"),
        ("blue", "green"),
        ("blues", "blue"),
        ("Sure, the answer is: a", "sure, the  answer is: a ."),
    ],
)
def test_the_metric_compares_as_accuracy_does(tmp_path, answer, response):
    metric = yaml.safe_load(export_task(ROWS, tmp_path, "t")["task"].read_text())["metric_list"][0]
    assert scored(metric, answer, response) == (_final(answer) == _final(response))


def test_the_command_says_how_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["export", "test.jsonl", "--out", "tasks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"].endswith("--include_path tasks --tasks test --apply_chat_template")
    assert yaml.safe_load((tmp_path / "tasks/test.yaml").read_text())["task"] == "test"
    assert main(["export", "test.jsonl", "--out", "tasks", "--plain"]) == 0
    assert "--tasks test\n" in capsys.readouterr().out
    assert "### Response" in (tmp_path / "tasks/test.yaml").read_text()


def test_wrong_rows_and_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\[0\] has no response"):
        export_task([{"instruction": "a"}], tmp_path / "x", "t")
    with pytest.raises(ValueError, match="name is 'a,b'"):
        export_task(ROWS, tmp_path / "x", "a,b")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        export_task(ROWS, tmp_path / "x", "t", max_new_tokens=0)
    assert not (tmp_path / "x").exists()


def test_the_harness_counts_what_accuracy_counts(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from safeopt.integrations.transformers import load_model

    model, tokenizer = load_model(tiny_folder)
    prompts = [f"Say {i}." for i in range(6)]
    own = answers(model, tokenizer, prompts, max_new_tokens=4)
    forms = ["{}", "Sure, the answer is: {}", "x #### {}", "{} no", "{}.", "no"]
    rows = [
        {"instruction": prompt, "response": form.format(answer)}
        for prompt, form, answer in zip(prompts, forms, own, strict=True)
    ]
    export_task(rows, tmp_path, "tiny", max_new_tokens=4)
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tiny_folder},dtype=float32", tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu", apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    want = accuracy(model, tokenizer, rows, max_new_tokens=4)
    assert found["results"]["tiny"]["exact_match,none"] == pytest.approx(want.rate)
