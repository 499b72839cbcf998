"""A report as one HTML file that loads nothing: no scripts, fonts, images or addresses."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from safeopt.report.page_blocks import (
    Block,
    Bullets,
    Cards,
    Code,
    Exchange,
    Figure,
    Section,
    Table,
    Text,
    plain,
)


def html(title: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page; every text in it is escaped."""
    template = resources.files("safeopt.report").joinpath("page.html").read_text("utf-8")
    links = "".join(f'<li><a href="#{one.id}">{_safe(one.title)}</a></li>' for one in sections)
    body = "\n".join(_section(one) for one in sections)
    return Template(template).substitute(
        title=_safe(title), contents=links, body=body, footer=_safe(footer)
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    heading = f'<h2 id="{section.id}-title">{_safe(section.title)}</h2>'
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">\n'
        f"{heading}\n{blocks}\n</section>"
    )


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_safe(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_safe(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{_safe(block.text)}</code></pre>"
    if isinstance(block, Cards):
        cards = "".join(
            f"<div><dt>{_safe(name)}</dt><dd><b>{_safe(value)}</b><small>{_safe(note)}</small></dd>"
            "</div>"
            for name, value, note in block.cards
        )
        return f'<dl class="cards">{cards}</dl>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    return _exchange(block)


def _table(table: Table) -> str:
    """In a frame that scrolls by itself: a wide table must not widen a phone's page."""
    header = "".join(f'<th scope="col">{_safe(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_safe(first)}</th>'
        + "".join(f"<td>{_safe(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    caption = _safe(table.caption)
    kind = ' class="words"' if table.words else ' class="wide"' if len(table.header) > 4 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{kind}>'
        f"<caption>{caption}</caption><thead><tr>{header}</tr></thead><tbody>{rows}</tbody>"
        "</table></div>"
    )


def _figure(figure: Figure) -> str:
    alt = _safe(figure.alt)
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{alt}">'
        f'<svg role="img" aria-label="{alt}" {figure.svg}</svg></div>'
        f"<figcaption>{_safe(figure.caption)}</figcaption></figure>"
    )


def _exchange(one: Exchange) -> str:
    said = "".join(
        f'<dt>{when}</dt><dd dir="auto">{_safe(text)}</dd>'
        for when, text in (("before", one.before), ("after", one.after))
    )
    return (
        f'<article class="exchange"><h3><span>{_safe(one.kind)}</span> '
        f'<bdi dir="auto">{_safe(one.prompt)}</bdi></h3><dl>{said}</dl></article>'
    )


def _safe(text: str) -> str:
    return escape(plain(text), quote=True)
