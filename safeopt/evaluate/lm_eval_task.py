"""Skill under lm-evaluation-harness: rows as one of its tasks, a YAML file and a JSONL file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeopt import artifact
from safeopt.data import SURE, Row
from safeopt.evaluate.utility import require_responses

PLAIN = "### Instruction:\n{{instruction}}\n\n### Response:\n"
"""The form of a prompt for a model without a chat template, as in `safeopt.data.encode`."""

# What `accuracy` does not compare either; the harness takes it out of answer and response alike.
IGNORED = (
    r"(?is)^\s*" + re.escape(SURE.strip()).replace(r"\ ", r"\s+"),
    r"(?s)^.*####",
    r"^\s+",
    r"\s+$",
    r"\.$",
)


def export_task(
    rows: Sequence[Row],
    folder: str | Path,
    name: str,
    *,
    chat: bool = True,
    max_new_tokens: int = 16,
) -> dict[str, Path]:
    """Write NAME.jsonl and NAME.yaml, a generative task for lm-evaluation-harness 0.4, to a folder.

    Run it there with `lm_eval --include_path FOLDER --tasks NAME`. Its `exact_match` is our
    `accuracy`: greedy answers, compared without case, surrounding white space, a final full stop, a
    leading "Sure, the answer is:", and what stands before the last `####`. White space within an
    answer counts there, and does not here. The YAML names the JSONL by its absolute path, as the
    harness reads relative ones from where it runs: export again rather than move the folder.

    Args:
        rows: with instruction and response, which alone are written.
        folder: where to; made if missing. Files of the same task are replaced.
        name: of the task: letters, digits, "_" and "-".
        chat: the prompt is the instruction alone, for `lm_eval --apply_chat_template`; False for a
            model without a chat template: "### Instruction: ...", as `safeopt` trains one.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The paths, as "task" and "data".

    Raises:
        ValueError: no rows, a row without a response, a name with other characters,
            max_new_tokens below 1.

    Source: github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md, docs/task_guide.md.
    """
    require_responses(rows)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name is {name!r}; a task's name has letters, digits, '_' and '-' only")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    kept = [{key: row[key] for key in ("instruction", "response")} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    folder = Path(folder).resolve()
    paths = {"task": folder / f"{name}.yaml", "data": folder / f"{name}.jsonl"}
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(paths["data"])}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{instruction}}" if chat else PLAIN,
        "doc_to_target": "{{response}}",
        "target_delimiter": "",
        "generation_kwargs": {
            "until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_new_tokens
        },
        "metric_list": [{
            "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
            "ignore_case": True, "regexes_to_ignore": list(IGNORED),
        }],
        "num_fewshot": 0,
        "metadata": {"version": 1.0, "rows": len(lines), "sha256": artifact.digest(lines)},
    }  # fmt: skip
    with artifact.atomic(paths["data"]) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
    with artifact.atomic(paths["task"]) as temporary:
        temporary.write_text(_yaml(content), "utf-8")
    return paths


def _yaml(content: dict[str, Any]) -> str:
    """One key a line, its value as JSON, which YAML contains; so pyyaml is not needed."""
    return "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in content.items()
    )
