"""`safeopt report`: a run and a comparison as a page and as a section of a model card."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")  # of the comparison's own figures, which the page does not use

import torch
from browser import Browser, chromium
from report_page_cases import HARMFUL, HARMLESS, TASK, make_comparison, make_run
from test_cli import call, result

from safeopt import SafetyMask, evaluate, report
from safeopt.data import encode
from safeopt.integrations.transformers import load_model
from safeopt.report.page_measure import WITHHELD, measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run of six steps, its data, and a small comparison; the tests leave it as it is."""
    path = tmp_path_factory.mktemp("report")
    make_run(path)
    make_comparison(tiny_folder, path / "cmp")
    return path


@pytest.fixture
def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


REPORT = ("report", "run", "--harmful", "harmful.jsonl", "--harmless", "harmless.jsonl")


class Page(HTMLParser):
    """Every tag must be closed in order; keeps attributes, texts and ids."""

    VOID = ("meta", "br", "path", "rect", "line", "polyline", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_record_is_what_happened(at: Path) -> None:
    """Losses of the checkpoint; the last margin, worked out row by row, is that of OUT/model."""
    record = json.loads(Path("run/train.json").read_text())
    (kept,) = Path("run/checkpoint").glob("step-*/run.json")
    assert record["losses"] == json.loads(kept.read_text())["losses"]
    assert [point["step"] for point in record["curve"]] == [0, 2, 4, 6]
    assert record["mask"]["digest"] == SafetyMask.load("mask.st").digest()
    rows = [json.loads(line) for line in Path("watch.jsonl").read_text().splitlines()]
    for source, margin in (("organism:aligned", 0), ("run/model", 3)):
        model, tokenizer = load_model(source)
        encoded = [encode(tokenizer, row, 256) for row in rows]
        openings = {ids[start] for ids, start in encoded}
        found = []
        for ids, start in encoded:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:start]])).logits[0, -1].tolist()
            others = [x for i, x in enumerate(logits) if i not in openings]
            found.append(max(logits[i] for i in openings) - max(others))
        mean = sum(found) / len(found)
        assert record["curve"][margin]["margin"] == pytest.approx(mean, abs=1e-3)


def test_a_resumed_run_has_the_curve_of_a_whole_one(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record of a killed run may be ahead of its last checkpoint; such points are dropped."""
    record = json.loads(Path("run/train.json").read_text())
    words = record["command"].replace("--out run", f"--out {tmp_path}").split()[1:]
    shorter = [*words[: words.index("--steps")], "--steps", 4, *words[words.index("--steps") + 2 :]]
    result(capsys, *shorter)
    shutil.rmtree(tmp_path / "model")
    ahead = json.loads((tmp_path / "train.json").read_text())
    ahead["curve"].append({"step": 5, "margin": 0.0})
    (tmp_path / "train.json").write_text(json.dumps(ahead))
    result(capsys, *words, "--resume")
    again = json.loads((tmp_path / "train.json").read_text())
    assert again["curve"] == record["curve"]
    assert again["losses"] == record["losses"]
    assert again["timed"]["steps"] == 2
    assert again["trained"] == record["trained"]


def test_the_page_holds_what_was_measured(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*REPORT, "--task", "task.jsonl", "--compare", "cmp", "--html", "p.html"]
    found = result(capsys, *words)
    assert found["files"] == ["p.html"] and found["unseen"] is True
    raw = Path("p.html").read_text("utf-8")
    page = Page(raw)
    text = " ".join(" ".join(page.texts).split())
    after, tokenizer = load_model("run/model")
    prompts = [row["instruction"] for row in HARMFUL]
    attack = evaluate.refusal_rate(after, tokenizer, prompts).attack_success
    assert found["measured"]["attack"]["harmful"]["after"]["successes"] == attack.successes
    assert str(attack) in text
    mask = SafetyMask.load("mask.st")
    assert f"0 of {mask.count():,}" in text  # moved
    assert f"{mask.count():,} of the" in text and mask.digest() in text
    record = json.loads(Path("run/train.json").read_text())
    for value in (record["trained"]["weights"], record["rows"]["sha256"], record["command"]):
        assert value in text
    results = json.loads(Path("cmp/results.json").read_text())
    assert " ".join(results["verdict"].split()) in text
    assert text.index("At equal skill") < text.index("At equal steps")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{one}" for one in ids if not str(one).endswith("-title")}
    assert {"short", "protected", "cost", "course", "drift", "comparison", "examples"} <= set(ids)
    assert {"limits", "provenance"} <= set(ids)
    loss = next(a["aria-label"] for t, a in page.tags if t == "svg" and "loss" in a["aria-label"])
    assert f"{record['losses'][-1]:.3g} at step 6" in str(loss)


def test_the_page_loads_nothing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No address, no script; everything to be seen has words for those who cannot see it."""
    result(capsys, *REPORT, "--compare", "cmp", "--html", "q.html")
    raw = Path("q.html").read_text("utf-8")
    assert not re.search(r"https?:|//|url\(|@import|<script|\bon\w+=", raw)
    page = Page(raw)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(tags)
    assert any("default-src 'none'" in str(a.get("content")) for t, a in page.tags if t == "meta")
    assert tags.count("svg") >= 5  # heatmap, rates, margin, loss, drift, one of each harmful set
    assert all(a.get("aria-label") and a["role"] == "img" for t, a in page.tags if t == "svg")
    assert tags.count("caption") == tags.count("table") and tags.count("h1") == 1
    assert tags.count("figcaption") == tags.count("figure") == tags.count("svg")


def test_an_answer_that_complies_is_never_written_out() -> None:
    """From the aligned model to the one that was never aligned: all its answers comply."""
    models = {"before": load_model("organism:aligned")[0]}
    models["after"], tokenizer = load_model("organism:unaligned")
    rows = {"harmful": HARMFUL}
    found = measured(models, tokenizer, harmful=rows, harmless=HARMLESS, examples=6)
    prompts = [row["instruction"] for row in HARMFUL[:6]]
    answers = evaluate.answers(models["after"], tokenizer, prompts)
    complied = [text for text in answers if text.strip() and not evaluate.is_refusal(text)]
    assert complied
    kept = json.dumps(found)
    for text in complied:
        assert json.dumps(text.strip())[1:-1] not in kept
    shown = [one["after"] for one in found["examples"] if one["kind"] == "harmful"]
    assert shown.count(WITHHELD) == len(complied)
    before = [one["before"] for one in found["examples"] if one["kind"] == "harmful"]
    assert any(evaluate.is_refusal(text) for text in before)
    harmless = [one["after"] for one in found["examples"] if one["kind"] == "harmless"]
    given = [row["instruction"] for row in HARMLESS[:6]]
    assert harmless == [text.strip() for text in evaluate.answers(
        models["after"], tokenizer, given)]  # fmt: skip


def test_the_model_card_section(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written again in its place; what stands around it stays; the figures are numbers there."""
    card = Path("card.md")
    card.write_text("---\nlicense: mit\n---\n# Mine\n\nBefore.")
    result(capsys, *REPORT, "--model-card", card)
    first = card.read_text("utf-8")
    assert first.startswith("---\nlicense: mit\n---\n# Mine\n\nBefore.\n\n<!-- safeopt report")
    assert not Path("run/report.html").exists()
    card.write_text(first + "\nAfter.\n")
    code, out, _ = call(capsys, *REPORT, "--task", "task.jsonl", "--model-card", card)
    second = card.read_text("utf-8")
    assert (code, out) == (0, "written: card.md\n")
    assert second.startswith(first[: first.index("<!--")]) and second.endswith("-->\n\nAfter.\n")
    assert second.count("safeopt report: begin") == 1
    assert "task accuracy" in second and "task accuracy" not in first
    assert "<svg" not in second and "| layer | " in second and "| step | nats |" in second
    digest = SafetyMask.load("mask.st").digest()
    assert digest in second
    card.write_text(second.replace("<!-- safeopt report: end -->", ""))
    code, _, err = call(capsys, *REPORT, "--model-card", card)
    assert code == 2 and "0 times '<!-- safeopt report: end -->'" in err


def test_a_comparison_alone_and_a_run_alone(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "report", "cmp")
    assert found["files"] == ["cmp/report.html"] and found["measured"] is None
    page = unescape(Path("cmp/report.html").read_text("utf-8"))
    assert "At equal skill" in page and "Example answers" not in page
    (advice,) = report.recommendations([report.load_results("cmp")])
    for line in report.recommendation_text(advice).splitlines():
        assert line.removeprefix("- ").strip() in page
    assert "One seed shows no spread" in page and "by each judge" not in page
    code, out, err = call(capsys, "report", "run", "--html", "r.html")
    assert code == 0, err
    assert "give --harmful" in out
    page = unescape(Path("r.html").read_text("utf-8"))
    assert "Refusals were not measured" in page and "Safety against skill" not in page


def test_what_a_user_can_get_wrong(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ~SafetyMask.load("mask.st")
    other.save(tmp_path / "other.st")
    shutil.copytree("run", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/model")
    shutil.copytree("run", tmp_path / "changed", ignore=shutil.ignore_patterns("checkpoint"))
    unaligned, _ = load_model("organism:unaligned")
    unaligned.save_pretrained(tmp_path / "changed/model")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/results.json").write_text('{"runs": []}')
    (tmp_path / "seen.jsonl").write_text(json.dumps(TASK[0]) + "\n")
    for words, message in (
        (["nowhere"], "nowhere/train.json is missing"),
        ([tmp_path / "half"], "not finished"),
        ([tmp_path / "changed"], "is not the one that"),
        (["run", "--reference", "organism:unaligned"], "before training (give --reference) is not"),
        (["run", "--mask", tmp_path / "other.st"], "is not the mask of the run"),
        (["cmp", "--harmful", "harmful.jsonl"], "no trained model to measure"),
        (["run", "--compare", "run"], "run/results.json is missing"),
        ([tmp_path / "bad"], "is no finished comparison (no arms"),
        (["run", "--harmless", "train.jsonl"], "training"),
    ):
        code, out, err = call(capsys, "report", *words, "--html", tmp_path / "x.html")
        assert (code, out) == (2, "") and message in err, (words, err)
        assert not (tmp_path / "x.html").exists()
    words = json.loads(Path("run/train.json").read_text())["command"].split()[1:-1]
    words[words.index("--watch") + 1] = "train.jsonl"
    code, _, err = call(capsys, *words, tmp_path / "new")
    assert code == 2 and "watching" in err


@pytest.mark.skipif(chromium() is None, reason="no Chromium: set CHROMIUM to its path")
def test_in_a_browser(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the width of a desk and of phones, light and dark: nothing overflows or complains."""
    result(capsys, *REPORT, "--compare", "cmp", "--html", tmp_path / "p.html")
    program = chromium()
    assert program
    grounds = {}
    with Browser(program, tmp_path / "profile") as browser:
        for width, theme in ((1200, "light"), (1200, "dark"), (390, "light"), (320, "dark")):
            browser.open(tmp_path / "p.html", width, theme, mobile=width < 500)
            across = browser.value(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert across[0] <= across[1] <= width
            assert browser.value(OUTSIDE) == []
            assert browser.complaints() == []
            assert browser.loaded() == [(tmp_path / "p.html").as_uri()]
            assert browser.value("document.querySelectorAll('svg').length") >= 5
            assert browser.value("Math.min(...[...document.querySelectorAll('svg')].map("
                                 "e => e.getBoundingClientRect().height))") > 50  # fmt: skip
            grounds[theme] = browser.value("getComputedStyle(document.body).backgroundColor")
            browser.screenshot(tmp_path / f"{width}-{theme}.png")
    assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


# Text that stands outside the page or the frame that scrolls it, as words that are cut off.
OUTSIDE = """[...document.querySelectorAll('p, li, h1, h2, h3, dt, dd, figcaption, svg text')]
    .filter(e => { const r = e.getBoundingClientRect(), f = e.closest('svg') || document.body,
                         b = f.getBoundingClientRect();
                   return r.right > b.right + 1 || r.left < b.left - 1; })
    .map(e => e.textContent)"""
