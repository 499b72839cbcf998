"""benchmarks/organisms.py: densities over a random mask's, and what is said of the claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from safeopt import organism

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not installed")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def found(picked: dict[int, dict[str, int]]) -> dict[str, Any]:
    """Six layers of one v and one up of 100 weights; of each `picked` or 1 are selected."""
    total = {str(n): {"v": 100, "up": 100} for n in range(6)}
    here = {
        str(n): {part: picked.get(n, {}).get(part, 1) for part in ("v", "up")} for n in range(6)
    }
    pair = {"first": "0", "second": "1", "iou": 0.25, "random_in_tensor": 0.0125}
    return {"total": total, "selected": dict.fromkeys(("all", "0", "1"), here), "overlap": [pair]}


def result(family: str, picked: dict[int, dict[str, int]], built: Any = None) -> dict[str, Any]:
    before = {"attack": 0.02, "over_refusal": 0.1, "accuracy": 0.0}
    before |= {"text_ppl": 12.34, "answers_ppl": 1.5}
    one = {"1%": found(picked), "5%": found({})}
    return {
        "family": family, "layers": 6, "parameters": 1_988_640,
        "built": {"unaligned": built, "aligned": built},
        "before": {"unaligned": {**before, "attack": 1.0}, "aligned": before},
        "where": {"ESI": one, "ESI, harmless": {"1%": found({}), "5%": found({})}},
    }  # fmt: skip


def test_the_ratio_is_the_density_over_that_of_all_weights() -> None:
    from organisms_tables import component, ratio

    one = found({2: {"v": 7, "up": 1}, 5: {"up": 7}})  # 24 of 1,200
    assert ratio(one, "all", component("v")) == pytest.approx((12 / 600) / (24 / 1200))
    assert ratio(one, "all", component("up", depth=2)) == pytest.approx((8 / 200) / (24 / 1200))
    assert ratio(one, "all", component("v", "up")) == 1
    assert ratio(one, "all", component("experts")) is None


def test_the_page_says_of_each_claim_whether_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From results that are there, which are not made again."""
    pytest.importorskip("matplotlib")
    import organisms

    settings = {"kind": "small", "seed": 1, "unaligned": {"epochs": 7}, "aligned": {"epochs": 3}}
    some = {
        "bundled": result("Llama", {2: {"v": 9}, 3: {"up": 5}}),
        "other": result("Llama", {5: {"up": 9}}, {"settings": settings, "seconds": 600}),
    }
    (tmp_path / "organisms").mkdir()
    for name, one in some.items():
        (tmp_path / "organisms" / f"{name}.json").write_text(json.dumps(one), "utf-8")
    monkeypatch.setattr(organisms, "look", lambda folder: pytest.fail("it looked again"))
    monkeypatch.setattr(
        sys, "argv", ["organisms.py", "bundled", "other=/there/it/is", "--out", str(tmp_path)]
    )
    organisms.main()
    text = (tmp_path / "organisms" / "tables.md").read_text("utf-8")
    assert "organisms.py bundled other=DIR --out OUT" in text and "/there" not in text
    assert (tmp_path / "organisms" / "density.png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    assert "| bundled | V densest of all matrices | yes, 2 of 2 | no, 0 of 2 | no |" in lines
    assert "| bundled | MLPs densest in the middle third | yes, 2 of 2 | no, 0 of 2 | no |" in lines
    assert "| other | V above random | no, 0 of 2 | no, 0 of 2 | no |" in lines
    assert "| other | MLPs densest in the middle third | no, 0 of 2 | no, 0 of 2 | no |" in lines
    options = "`--kind small --seed 1 --epochs 7 --refusal-epochs 3`"
    assert f"| other | Llama, 6 | 2.0 M | {options} | 1,200 | 100, 2 | 10, 10 | 0, 0 |" in text
    assert "| bundled | ESI | 0.25, 0.013 | 0.25, 0.013 |" in lines


def test_where_counts_what_each_scorer_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers, norms and embeddings by the square root of Fisher only; on the MoE organism."""
    pytest.importorskip("transformers")
    import organisms
    import rows

    from safeopt.organism import build, kinds

    few = organism.data("harmful_teach")[:7]
    monkeypatch.setattr(organism, "data", lambda name: few)
    monkeypatch.setattr(rows, "utility", lambda: few)
    tokenizer = build.make_tokenizer()
    model = kinds.make_model(tokenizer, "moe", 0)
    one = organisms.where(model, tokenizer)
    linear = {"q", "k", "v", "o", "experts"}
    assert set(one["ESI"]["1%"]["total"]["5"]) == linear
    assert set(one["sqrt(Fisher)"]["1%"]["total"]["5"]) == {*linear, "router", "norm"}
    assert set(one["sqrt(Fisher)"]["1%"]["total"]["-"]) == {"embed", "norm"}
    for fraction, share in (("1%", 0.01), ("5%", 0.05)):
        cells = one["ESI"][fraction]
        total = sum(sum(row.values()) for row in cells["total"].values())
        for picked in cells["selected"].values():
            assert sum(sum(row.values()) for row in picked.values()) == round(share * total)
    assert set(cells["selected"]) == {"all", "0", "1", "2"} and len(cells["overlap"]) == 3


def test_the_rank_correlation_lets_ties_share_a_rank() -> None:
    """The value does not depend on the order in which equal cells come."""
    import organisms_tables

    one, two = {"a": 0.0, "b": 0.0, "c": 2.0, "d": 1.0}, {"a": 1.0, "b": 5.0, "c": 9.0, "d": 7.0}
    back = [dict(reversed(cells.items())) for cells in (one, two)]
    found = organisms_tables._spearman(one, two)
    assert found == pytest.approx(organisms_tables._spearman(*back)) == pytest.approx(0.9487, 1e-3)
