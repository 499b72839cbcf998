"""`safeopt inspect` and its report: cells, tables, figures, what a user can get wrong."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_cli import call, result
from test_mask import model_mask

from safeopt import names
from safeopt.evaluate import stability
from safeopt.mask import SafetyMask
from safeopt.report import masks as drawing
from safeopt.scores import Scores
from safeopt.selection import select

LAYER = "model.layers.{}.mlp.{}_proj.weight"


def rows_mask(model: Any) -> SafetyMask:
    chosen = {LAYER.format(1, part): torch.arange(56) % 3 == 0 for part in ("gate", "up")}
    return SafetyMask.from_rows(chosen, model)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two selections of 10 % and a mask of rows, in the working folder."""
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    for seed in range(2):
        torch.manual_seed(seed)
        scores = {n: torch.rand(s) for n, s in names.shapes(model).items() if len(s) == 2}
        made = {"method": "esi", "arguments": {"seed": seed}, "model": {"weights": f"{seed}" * 64}}
        select(Scores(scores, made), 0.1).save(f"seed{seed}.st")
    rows_mask(model).save("rows.st")
    return tmp_path


def test_cells_are_those_of_a_count_by_hand() -> None:
    """Mixed granularities; q, k, v and the rest of 11 layers; layer 10 comes after 9."""
    model = make_llama(num_hidden_layers=11)
    mask = model_mask(model)
    found = drawing.layout(mask)
    for layer, part, where in (
        ("10", "k", r"\.10\..*k_proj"),
        ("1", "norm", r"\.1\..*norm"),
        ("-", "embed", "embed_tokens"),
        ("-", "norm", r"^model\.norm"),
    ):
        bits = torch.cat([mask.to_bool(n).flatten() for n in mask if re.search(where, n)])
        cell = found["grid"][layer][part]
        assert (cell["selected"], cell["total"]) == (int(bits.sum()), bits.numel())
        assert cell["density"] == pytest.approx(float(bits.double().mean()))
    assert list(found["grid"]) == [*map(str, range(11)), "-"]
    assert "q" not in found["grid"]["-"] and "embed" not in found["grid"]["0"]
    assert {k: v for k, v in found.items() if k != "grid"} == mask.summary()
    for layer, row in found["layers"].items():
        assert sum(cell["selected"] for cell in found["grid"][layer].values()) == row["selected"]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # padded
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_density_table() -> None:
    model = make_llama()
    head = SafetyMask.from_tensors(["lm_head"], model)
    head |= SafetyMask.from_rows({"lm_head.weight": torch.zeros(300, dtype=torch.bool)}, model)
    header, _, *rows = table(drawing.density_table(drawing.layout(rows_mask(model) | head)))
    assert header == ["layer", "gate", "up", "head", "all", "selected", "of"]
    share, selected = f"{100 * 19 / 56:.3g} %", 2 * 19 * 32
    assert rows[0] == ["1", share, share, "", share, f"{selected:,}", "3,584"]
    assert rows[1] == ["-", "", "", "100 %", "100 %", "9,600", "9,600"]
    whole = f"{100 * (selected + 9600) / (3584 + 9600):.3g} %"
    assert rows[2] == ["all", share, share, "100 %", whole, f"{selected + 9600:,}", "13,184"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that were saved, which they still are."""
    pytest.importorskip("matplotlib")
    seen: list[Any] = []
    save = drawing._save
    monkeypatch.setattr(drawing, "_save", lambda f, path: (seen.append(f), save(f, path)))
    return seen


@pytest.mark.parametrize("layers", [3, 50])
def test_density_figure(layers: int, tmp_path: Path, figures: list[Any]) -> None:
    model = make_llama(num_hidden_layers=layers)
    layouts = {"all": drawing.layout(model_mask(model)), "rows": drawing.layout(rows_mask(model))}
    path = tmp_path / "new" / "f.png"
    drawing.density_figure(layouts, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["all", "rows"]
    parts = [label.get_text() for label in panels[0].get_xticklabels()]
    cells = panels[1].images[0].get_array().filled(math.nan)
    assert cells.shape == (layers + 1, len(parts))
    for i, row in enumerate(cells):
        for part, value in zip(parts, row, strict=True):
            if i == 1 and part in ("gate", "up"):
                assert value == pytest.approx(100 * 19 / 56)
            else:
                assert math.isnan(value)
    assert [t.get_text() for t in panels[1].texts] == (["33.9", "33.9"] if layers == 3 else [])
    ticks = {
        int(t): label.get_text()
        for t, label in zip(panels[0].get_yticks(), panels[0].get_yticklabels(), strict=True)
    }
    assert ticks == {
        i: "-" if i == layers else str(i) for i in range(0, layers + 1, 1 + (layers > 40))
    }


def test_density_figure_of_several_models(tmp_path: Path, figures: list[Any]) -> None:
    """Each panel then has its own layers and components, and all stand in one row."""
    deep, flat = make_llama(num_hidden_layers=5), make_llama(num_hidden_layers=2)
    layouts = {
        "deep": drawing.layout(model_mask(deep)),
        **{str(i): drawing.layout(rows_mask(flat)) for i in range(3)},
    }
    drawing.density_figure(layouts, tmp_path / "f.png", across=4, one_model=False)
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    assert [len(axes.get_yticklabels()) for axes in panels] == [6, 1, 1, 1]
    assert [len(axes.get_xticklabels()) for axes in panels[1:]] == [2, 2, 2]
    assert len({axes.get_subplotspec().rowspan.start for axes in panels}) == 1
    assert [t.get_text() for t in panels[1].texts] == ["33.9", "33.9"]


def test_stability_figure(files: Path, figures: list[Any]) -> None:
    masks = {name: SafetyMask.load(f"{name}.st") for name in ("seed0", "seed1", "rows")}
    found = stability(masks)
    drawing.stability_figure(found, "iou.png")
    assert Path("iou.png").read_bytes()[:4] == b"\x89PNG"
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(masks)
    cells = axes.images[0].get_array()
    ious = {(row["first"], row["second"]): row["iou"] for row in found["pairs"]}
    assert len(ious) == len(set(ious.values())) == 3
    for i, one in enumerate(masks):
        assert cells[i, i] == 1
        for j, two in list(enumerate(masks))[i + 1 :]:
            assert cells[i, j] == cells[j, i] == pytest.approx(ious[one, two])
    assert f"{ious['seed0', 'seed1']:.3f}" in axes.texts[1].get_text()


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["inspect", "seed0.st", "other=seed1.st", "rows.st"]
    code, out, err = call(capsys, *words, "--figure", "f.png", "--overlap", "sub/o.png")
    assert (code, err) == (0, "")
    assert Path("f.png").is_file() and Path("sub/o.png").is_file()
    assert "drawn: f.png" in out and "drawn: sub/o.png" in out
    assert "made by: esi, seed 0, fraction 0.1" in out and "model weights 000000000000" in out
    assert "38 of 112 rows in 2 parameters\nmade by: unknown method" in out
    assert "made on different weights" in out
    found = result(capsys, *words)
    assert found["figures"] == []
    masks = {"seed0": "seed0.st", "other": "seed1.st", "rows": "rows.st"}
    assert {name: one["file"] for name, one in found["masks"].items()} == masks
    loaded = {name: SafetyMask.load(file) for name, file in masks.items()}
    assert found["stability"] == stability(loaded)
    for name, mask in loaded.items():
        row = found["masks"][name]
        assert row["total"] == mask.summary()["total"]
        assert row["grid"] == drawing.layout(mask)["grid"]
        assert row["manifest"] == mask.manifest
    assert found["masks"]["rows"]["bits"] == {
        "row": {"selected": 38, "total": 112, "parameters": 2}
    }
    pairs = [line for line in table("\n".join(out.splitlines()[-11:])) if line[0] in masks]
    assert [line[4] for line in pairs] == [f"{r['iou']:.4f}" for r in found["stability"]["pairs"]]


def test_one_mask_and_a_combination(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = SafetyMask.load("seed0.st") - SafetyMask.load("seed0.st")
    empty.save("empty.st")
    assert result(capsys, "inspect", "empty.st")["stability"] is None
    assert "0 of " in call(capsys, "inspect", "empty.st")[1]
    both = SafetyMask.load("seed0.st") | ~SafetyMask.load("rows.st")
    both.save("both=2.st")
    code, out, _ = call(capsys, "inspect", "both=2.st")
    assert code == 0
    assert out.startswith("both=2: ")
    assert "made by: (esi | ~(unknown method))" in out


def test_what_a_user_can_get_wrong(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Scores({"w": torch.ones(2)}).save("scores.st")
    Path("sub").mkdir()
    Path("sub/seed0.st").write_bytes(Path("seed0.st").read_bytes())
    empty = SafetyMask.load("seed0.st") - SafetyMask.load("seed0.st")
    empty.save("empty.st")
    SafetyMask.from_tensors(["lm_head"], make_llama(vocab_size=7)).save("small.st")
    for words, message in (
        (["gone.st"], "gone.st is missing"),
        (["scores.st"], "holds 'scores', and 'mask'"),
        (["seed0.st", "sub/seed0.st"], "name them: one=seed0.st two=sub/seed0.st"),
        (["seed0.st", "empty.st"], "'empty' selects nothing"),
        (["seed0.st", "small.st"], "different models"),
        (["seed0.st", "--overlap", "o.png"], "at least two"),
        (["seed0.st", "--figure", "f.pdf"], "end it in .png"),
    ):
        code, out, err = call(capsys, "inspect", *words)
        assert (code, out) == (2, "") and message in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call(capsys, "inspect", "seed0.st", "--figure", "f.png")
    assert code == 2 and "pip install 'torch-safeopt[plot]'" in err
    assert not Path("f.png").exists()
    assert call(capsys, "inspect", "seed0.st")[0] == 0
    with pytest.raises(ValueError, match="layouts is empty"):
        drawing.density_figure({}, "f.png")
