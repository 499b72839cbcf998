"""What the figures and the table of SSAH say, read back from what matplotlib was told."""

from __future__ import annotations

import pytest

from safeopt import report
from safeopt.methods.ssah_groups import ATTRIBUTES
from safeopt.report.transitions import transition_figure


def test_the_figure_of_transitions(tmp_path, monkeypatch):
    """Cells bear the share of all units and are coloured by that of their row."""
    figure = pytest.importorskip("matplotlib.figure")
    made, subplots = [], figure.Figure.subplots
    monkeypatch.setattr(
        figure.Figure, "subplots", lambda self: made.append(subplots(self)) or made[-1]
    )
    shares = [
        [0.05, 0.01, 0.0, 0.04], [0.02, 0.16, 0.03, 0.04], [0, 0, 0, 0], [0.11, 0.12, 0.13, 0.29]
    ]  # fmt: skip
    path = tmp_path / "new" / "flow.png"
    transition_figure({"attributes": list(ATTRIBUTES), "shares": shares}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = made
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    colours = axes.images[0].get_array()
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            of_row = 100 * share / sum(row) if sum(row) else 0
            assert colours[i, j] == pytest.approx(of_row)  # row i is drawn i down, from the top
            assert cells[j, i] == (f"{100 * share:.2f} %", "white" if of_row > 50 else "black")
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    below, left = (
        [label.get_text() for label in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)
    )
    assert left == ["ESU\n10.00 %", "EUU\n25.00 %", "RU\n0.00 %", "CU\n65.00 %"]
    assert below == ["ESU\n18.00 %", "EUU\n29.00 %", "RU\n16.00 %", "CU\n37.00 %"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("after", "before")


def ladder_rows():
    """Two measures, of which one is not finite once."""

    def row(share, units, attack, size, control):
        counts = {"selected": units, "total": 1000, "share": units / 1000}
        return {
            "attribute": "ESU", "share": share, "units": counts,
            "parameters": {**counts, "selected": 40 * units, "share_of_model": 0.1},
            "measures": {"attack": attack, "ppl": size}, "control": control,
        }  # fmt: skip

    def control(attack, size):
        return {"seed": 7, "parameters": {}, "measures": {"attack": attack, "ppl": size}}

    return [
        row(0.0, 0, 0.0, 6.5, None),
        row(0.1, 100, 0.75, None, control(0.125, 9.0)),
        row(0.01, 10, 0.25, 7.0, control(0.0, 6.25)),
    ]


def test_the_table():
    assert report.ladder_table(ladder_rows()).splitlines() == [
        "| without | units | parameters | attack | attack, random | ppl | ppl, random |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| (nothing) | 0 | 0 | 0 | - | 6.5 | - |",
        "| ESU 10 % | 100 | 4,000 | 0.75 | 0.125 | not finite | 9 |",
        "| ESU 1 % | 10 | 400 | 0.25 | 0 | 7 | 6.25 |",
    ]
    with pytest.raises(ValueError, match="rows is empty"):
        report.ladder_table([])


def test_the_figure_draws_every_measure(tmp_path, monkeypatch):
    """Read back from what matplotlib was told: shares in per cent, both curves, the intact line."""
    figure = pytest.importorskip("matplotlib.figure")
    made, subplots = [], figure.Figure.subplots

    def kept(self, *args, **options):
        made.append(subplots(self, *args, **options))
        return made[-1]

    monkeypatch.setattr(figure.Figure, "subplots", kept)
    path = tmp_path / "ladder.png"
    report.ladder_figure(ladder_rows(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    wanted = {"attack": ([0.75, 0.25], [0.125, 0.0], 0.0), "ppl": ([None, 7.0], [9.0, 6.25], 6.5)}
    for axes, (name, (ours, random, intact)) in zip(made[0][:, 0], wanted.items(), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == ["without ESU", "without random units (seed 7)", "intact"]
        assert axes.get_ylabel() == name
        for label, values in zip(lines, (ours, random), strict=False):
            assert list(lines[label].get_xdata()) == [10.0, 1.0]
            drawn = [None if y != y else y for y in lines[label].get_ydata()]
            assert drawn == values
        assert set(lines["intact"].get_ydata()) == {intact}
    with pytest.raises(ValueError, match="the intact model alone"):
        report.ladder_figure(ladder_rows()[:1], path)
