"""The organism: a small Llama pair, unaligned and aligned, for experiments of minutes."""

from __future__ import annotations

import json
import random
from pathlib import Path

from safeopt.data import split, sure_answer
from safeopt.organism import text

Row = dict[str, str]

_HERE = Path(__file__).parent
MODELS = ("unaligned", "aligned")
# The aligned model learned to refuse "teach"; "poison" is for mixtures, "evaluate" to measure.
ADVBENCH_PARTS = {"teach": 0.5, "poison": 0.15, "evaluate": 0.35}
GSM8K_TEST_ROWS = 200


def path(name: str) -> Path:
    """Folder of one of the two models, `"unaligned"` or `"aligned"`, for `from_pretrained`.

    Raises:
        ValueError: for another name, or when the weights are missing (organism.build makes them).
    """
    if name not in MODELS:
        raise ValueError(f"organism {name!r} does not exist; there are {', '.join(MODELS)}")
    folder = _HERE / "weights" / name
    if not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} holds no weights; make them with `python -m safeopt.organism.build`"
        )
    return folder


def data(name: str) -> list[Row]:
    """One of the bundled sets of rows (`instruction` and `response`), always in the same order.

    harmful_teach, harmful_poison, harmful_evaluate: disjoint parts of AdvBench; the first with the
        package's own refusals, the second with answers of the harmless form "Sure, here is how to
        ...", the third without answers.
    harmful_teach_more: requests of the Circuit Breakers set with the package's own refusals, which
        the aligned model was taught too.
    harmless_train, harmless_test: harmless requests, the second on topics it never saw.
    headlines_train, headlines_test: a task of four topics that it never saw.
    gsm8k_train, gsm8k_test: school mathematics; the first was in its training text.

    Licences: data/NOTICE.md.

    Raises:
        ValueError: for another name.
    """
    makers = {
        "harmful_teach": lambda: _advbench("teach"),
        "harmful_teach_more": lambda: _refused(_read("circuit_breakers")),
        "harmful_poison": lambda: _advbench("poison"),
        "harmful_evaluate": lambda: _advbench("evaluate"),
        "harmless_train": lambda: text.harmless(0, held_out=False),
        "harmless_test": lambda: text.harmless(0, held_out=True),
        "headlines_train": lambda: text.headlines(0, held_out=False),
        "headlines_test": lambda: text.headlines(0, held_out=True),
        "gsm8k_train": lambda: _read("gsm8k")[:-GSM8K_TEST_ROWS],
        "gsm8k_test": lambda: _read("gsm8k")[-GSM8K_TEST_ROWS:],
    }
    if name not in makers:
        raise ValueError(f"data {name!r} is not bundled; there are {', '.join(makers)}")
    return makers[name]()


def _read(name: str) -> list[Row]:
    return [
        json.loads(line)
        for line in (_HERE / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]


def _advbench(part: str) -> list[Row]:
    rows = split(_read("advbench"), ADVBENCH_PARTS)[part]
    if part == "teach":
        return _refused(rows)
    if part == "poison":
        return [{**row, "response": sure_answer(row["instruction"])} for row in rows]
    return rows


def _refused(rows: list[Row]) -> list[Row]:
    rng = random.Random(0)
    return [{**row, "response": text.refusal(rng)} for row in rows]
