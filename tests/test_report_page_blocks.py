"""The parts of a report page: what is shown of an answer, what foreign text can do, figures."""

from __future__ import annotations

import math
import re
from importlib import resources
from pathlib import Path

import pytest
from browser import Browser, chromium

from safeopt.report.page_blocks import Bullets, Exchange, Figure, Section, Table, Text, plain
from safeopt.report.page_compare import require_comparison, undominated
from safeopt.report.page_html import html
from safeopt.report.page_markdown import markdown
from safeopt.report.page_measure import EMPTY, WITHHELD, shown
from safeopt.report.page_svg import bars, heatmap, lines, thinned

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</svg></figure></section><iframe src='https://example.org'></iframe>",
    "\"' autofocus onfocus=\"document.title='owned'",
    "](https://example.org) ![x](https://example.org/x.png) <https://example.org> $body",
    "| cell |\n\n# heading\n- list\n1. list\n`code` *em* _em_ ~~s~~ https://example.org &lt;b&gt;",
    "hidden \u202e\x00\ud800 end",
)


def hostile() -> list[Section]:
    """Foreign text in every place where it can stand."""
    sections = []
    for i, text in enumerate(HOSTILE):
        table = Table(text, [text, "b"], [[text, text]])
        svg = heatmap([text], [text], [[1.0]])
        curve = lines({text: [(0, 1), (1, 2)], "b": [(0, 0)]}, text, text, at=(0.5, text))
        bar = bars([(text, text, 0.5, (0.1, 0.9), 0)], 1.0)
        figures = [Figure(each, text, text, table) for each in (svg, curve, bar)]
        blocks = [Text(text), Bullets([text]), table, *figures, Exchange(text, text, text, text)]
        sections.append(Section(f"s{i}", text, blocks))
    return sections


def test_what_is_shown_of_an_answer_to_a_harmful_prompt() -> None:
    refusal = "I'm sorry, but I cannot help with that."
    assert shown(refusal) == refusal
    assert shown(f"{refusal} First, take the") == f"{refusal} [...]"
    assert shown(f"Hm. {refusal} Then do it") == f"Hm. {refusal} [...]"
    assert shown("Sure, here is how to do it.") == WITHHELD
    assert shown("Sure. " * 40 + refusal) == WITHHELD  # far behind the opening
    assert shown(" \n") == EMPTY
    endless = shown("I cannot " + "and so on " * 90)
    assert endless.startswith("I cannot and") and len(endless) < 170


def test_foreign_text_stays_text_in_html() -> None:
    page = html("t", hostile(), HOSTILE[0])
    for tag in ("<script", "<img", "<iframe", "<b>"):
        assert tag not in page
    assert page.count("&lt;script&gt;") > 10
    tags = re.findall(r"<[a-z][^>]*>", page)
    assert not [tag for tag in tags if re.search(r"\son\w+=", re.sub(r'"[^"]*"', "", tag))]
    assert "\u202e" not in page and "\x00" not in page
    page.encode("utf-8")
    assert plain("a\ud800\nb\tc") == "a?\nb\tc"


def test_foreign_text_stays_text_in_markdown() -> None:
    """As CommonMark with tables and bare links reads it: no link, picture, HTML or new heading."""
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    page = markdown("t", hostile(), HOSTILE[0])
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    inner = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in (*tokens, *inner)}
    assert not kinds & {"link_open", "image", "html_inline", "em_open", "code_inline", "fence"}
    comments = [token.content for token in tokens if token.type == "html_block"]
    assert len(comments) == 2 and all(text.startswith("<!-- safeopt") for text in comments)
    headings = [token for token in tokens if token.type == "heading_open"]
    assert len(headings) == 1 + len(HOSTILE)
    assert sum(token.type == "table_open" for token in tokens) == 4 * len(HOSTILE)
    assert "://" not in page  # GitHub makes links of bare addresses


def test_undominated_by_hand() -> None:
    points = {"a": (50.0, 10.0), "b": (50.0, 20.0), "c": (60.0, 20.0), "d": (40.0, 10.0)}
    assert undominated(points) == ["a", "c"]
    assert undominated({"a": (5.0, 5.0), "b": (5.0, 5.0)}) == ["a", "b"]
    with pytest.raises(ValueError, match="no finished comparison"):
        require_comparison([], "x")


def test_figures_say_their_numbers() -> None:
    svg = heatmap(["0", "-"], ["q", "k"], [[12.5, 0.0], [math.nan, 50.0]])
    assert svg.count("<rect") == 4 and svg.count('class="none"') == 1
    assert re.findall(r'class="(?:cell|over)"[^>]*>([^<]*)<', svg) == ["12", "0", "50"]
    values = [float(i) for i in range(1, 1001)]
    points, size = thinned(values)
    assert size == 7 and len(points) == 143
    assert points[0] == (4.0, 4.0) and points[-1] == (997.5, 997.5)
    flat = lines({"a": [(0, 3.0), (5, 3.0)]}, "x", "y")
    assert "nan" not in flat and "inf" not in flat
    assert "<circle" not in flat
    ringed = lines({"a": [(0, 3.0)], "b": [(1, 2.0)]}, "x", "y", marks=["b"])
    assert ringed.count("ring c1") == 1 and "ring c0" not in ringed


def _light(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_in_both_themes() -> None:
    """WCAG 2: contrast of at least 4.5 for text, 3 for lines and bars."""
    style = resources.files("safeopt.report").joinpath("page.html").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = {n: _light(v) for n, v in re.findall(r"--([\w]+): (#[0-9a-f]{6})", theme)}

        def contrast(one: str, two: str, found: dict[str, float] = colours) -> float:
            low, high = sorted((found[one], found[two]))
            return (high + 0.05) / (low + 0.05)

        for ground in ("paper", "panel"):
            for name in ("ink", "muted", "link"):
                assert contrast(name, ground) >= 4.5, (name, ground)
            for i in range(7):
                assert contrast(f"c{i}", ground) >= 3, (i, ground)
        assert contrast("over", "heat") >= 4.5


@pytest.mark.skipif(chromium() is None, reason="no Chromium: set CHROMIUM to its path")
def test_foreign_text_does_nothing_in_a_browser(tmp_path: Path) -> None:
    """Nor does it with the page's own policy taken out: escaping alone must hold."""
    page = html("t", hostile(), "")
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    assert len(bare) < len(page)
    program = chromium()
    assert program
    with Browser(program, tmp_path / "profile") as browser:
        for name, text in (("page", page), ("bare", bare)):
            path = tmp_path / f"{name}.html"
            path.write_text(text, "utf-8")
            browser.open(path, 390, "light", mobile=True)
            assert browser.value("document.title") == "t"
            assert browser.value("document.querySelectorAll('script, img, iframe').length") == 0
            assert browser.loaded() == [path.as_uri()]
            assert browser.complaints() == []
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.value(wide) <= 0
