"""The benchmarks: they measure what they say, and the report holds what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safeopt import SafeAdamW, SafetyMask

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not installed")
HYPER = {"lr": 0.05, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)))


def trained(p: torch.nn.Parameter, optimizer: object, steps: int = 3) -> torch.Tensor:
    chance = torch.Generator().manual_seed(1)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=chance)
        optimizer.step()
    return p.detach()


FROZEN = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) < 0.3


def ours(steps: int = 3, **options: float) -> torch.Tensor:
    p, mask = weight(), SafetyMask.from_bool({"p": FROZEN})
    return trained(p, SafeAdamW([("p", p)], freeze=mask, **{**HYPER, **options}), steps)


@pytest.mark.parametrize("keep", ["values", "weights"])
def test_the_mask_by_hand_does_what_ours_does(keep: str) -> None:
    from competitors import ByHand

    p = weight()
    optimizer = ByHand(torch.optim.AdamW([p], fused=True, **HYPER), [(p, FROZEN)], keep)
    found = trained(p, optimizer)
    assert torch.equal(found[FROZEN], weight()[FROZEN])
    torch.testing.assert_close(found, ours())
    optimizer.refill()
    assert (p.grad[FROZEN] == 0.5).all()


def test_the_authors_optimizer_freezes_and_decays_ten_times_as_much_at_first() -> None:
    from competitors import ESIAuthors

    def authors(steps: int, **options: float) -> torch.Tensor:
        p = weight()
        return trained(p, ESIAuthors([(p, FROZEN)], **{**HYPER, **options}), steps)

    start = weight().detach()
    assert torch.equal(authors(3)[FROZEN], start[FROZEN])
    torch.testing.assert_close(authors(3, weight_decay=0), ours(3, weight_decay=0))
    decay = authors(1) - authors(1, weight_decay=0)
    torch.testing.assert_close(
        decay, 10 * (ours(1) - ours(1, weight_decay=0)), atol=1e-5, rtol=1e-4
    )
    optimizer = ESIAuthors([(weight(), FROZEN)])
    p = optimizer.live[0][0]
    trained(p, optimizer, 1)
    assert (optimizer.state[p]["exp_avg"][FROZEN] != 0).all()  # moments of frozen weights too


def test_sampling_misses_the_count_and_sorting_does_not() -> None:
    from competitors import top_by_sampling, top_by_sorting

    torch.manual_seed(0)
    scores = [torch.rand(100, 30), torch.rand(20, 100)]
    best = top_by_sorting(scores, 0.1)
    joined = torch.cat([tensor.flatten() for tensor in scores])
    assert len(best) == 500
    assert joined[best].min() >= joined.sort().values[-500]
    assert 400 < sum(int(mask.sum()) for mask in top_by_sampling(scores, 0.1)) < 600


def test_every_case_runs_each_round_and_ratios_are_those_of_the_rounds() -> None:
    from interleave import Case, interleave, quartiles, ratio

    ran: list[str] = []
    cases = [Case(n, lambda n=n: ran.append(n) or torch.randn(2_000_000)) for n in "ab"]
    seconds = interleave(cases, rounds=3)
    assert ran[:4] == ["a", "a", "b", "b"]
    rounds = [sorted(ran[i : i + 2]) for i in (4, 6, 8)]
    assert rounds == [["a", "b"]] * 3
    assert len(seconds["a"]) == len(seconds["b"]) == 3
    assert len(interleave(cases, rounds=50, budget=0)["a"]) == 3
    assert ratio([1, 20, 3], [1, 10, 1]) == (1.5, 2, 2.5)  # a busy second round changes nothing
    assert quartiles([4.0]) == (4, 4, 4)


def test_the_shared_moments_are_those_the_optimizer_uses() -> None:
    from bed import Bed

    bed = Bed(10_000, "cpu")
    optimizer = torch.optim.AdamW(bed.parameters.values(), fused=True)
    own = bed.adopt(optimizer)
    assert own == 8 * bed.weights + 4 * len(bed.parameters)
    before = {n: m.clone() for n, m in bed.moments["exp_avg"].items()}
    optimizer.step()
    assert all((bed.moments["exp_avg"][n] != m).any() for n, m in before.items())
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


def test_least_bytes_count_whole_lines_of_weights_and_gradients() -> None:
    from bed import Bed, least_bytes

    bed = Bed(50_000, "cpu")
    assert least_bytes(None, True, bed) == (28 * bed.weights, 1.0)
    one = {n: torch.zeros(s, dtype=torch.bool) for n, s in bed.shapes.items()}
    one["layers.3.mlp.weight"][1, 4] = True  # alone in its line
    bits = bed.parameters["layers.3.mlp.weight"].numel() // 8
    assert least_bytes(SafetyMask.from_bool(one), True, bed)[0] == 3 * 64 + 16 + bits
    for density in (0.01, 0.5, 0.99):
        found = least_bytes(bed.mask(density, "layer"), True, bed)[1]
        assert abs(found - density) < 0.02


def test_what_does_not_fit_into_memory_is_left_out_and_said() -> None:
    from step_cases import Recipe, plan

    names = {"a": Recipe(None, 10, 5), "b": Recipe(None, 0, 50), "c": Recipe(None, 20, 0)}
    fit, left_out = plan(names, need=100, free=135)
    assert (fit, list(left_out)) == (["a", "c"], ["b"])
    assert plan(names, need=140, free=135)[0] == []


def test_a_tiny_run_and_its_report(tmp_path: Path) -> None:
    path = tmp_path / "cpu-float32.json"
    words = "--weights 1e4 --scores 1e4 --rounds 3 --memory-weights 0 -q -p no:cacheprovider"
    shrink = "import step_cases, sys, pytest; step_cases.COPIED['cpu'] = 1 << 20;"
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {shrink}"
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(FOLDER), *words.split(), f"--benchmark-json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    from interleave import ratio
    from speed_report import spread, write
    from speed_run import Run
    from step_cases import REFERENCE, recipes

    data = json.loads(path.read_text())
    write(tmp_path, tmp_path / "speed.md")
    text = (tmp_path / "speed.md").read_text()
    times = {
        b["extra_info"]["case"]: b["stats"]["data"]
        for b in data["benchmarks"]
        if b["extra_info"]["kind"] == "step"
    }
    assert set(times) == {*recipes(), "copy"}
    rows = text.partition("### Step, 1e+04")[2].splitlines()
    for name in recipes():
        expected = spread(ratio(times[name], times[REFERENCE]))
        detail = next(row for row in rows if row.startswith(f"| {name} | ") and "[" in row)
        assert expected in detail
    assert data["command"] in text and data["commit_info"]["id"] in text
    halved = [b for b in data["benchmarks"] if b["extra_info"]["case"] != "copy"]
    with pytest.raises(ValueError, match=r"step 1e\+04 holds half a table"):
        Run(data | {"benchmarks": halved})
    (tmp_path / "broken.json").touch()
    with pytest.raises(ValueError, match=r"broken\.json holds no measurement"):
        write(tmp_path, tmp_path / "speed.md")


def test_brief_reads_each_arm_at_each_level() -> None:
    import brief
    from test_report import make_results, make_run

    slow = ((10, 5, 60), (20, 10, 60))
    results = make_results(
        [
            make_run("adamw", 0, (10, 50, 60), (20, 90, 80)),
            make_run("adamw", 1, (10, 70, 80), (20, 100, 80)),
            *(make_run("spa:0.1", seed, *slow) for seed in (0, 1)),
        ]
    )
    header, _, start, adamw, spa = brief.table(results, [1.0, 0.75]).splitlines()
    assert header.endswith("| at 80 %: step, one, two | at 60 %: step, one, two |")
    assert start.startswith("| (before training) | 0 | 0 | 0 | 0 | 10.0 | - | - | - |")
    assert adamw.startswith("| adamw | 80 | 95 | 95 |")
    assert adamw.endswith("| 15: 80, 80 | 10: 60, 60 |")
    assert spa.endswith("| not reached | 10: 5, 5 |")


def test_the_speed_of_locating_is_printed_for_every_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On tiny models; what is held is two vectors for each channel, or a number for each weight."""
    pytest.importorskip("transformers")
    import locate_speed

    sizes = "--hidden 32 --layers 2 --vocab 60 --rows 4 --batch 2 --tokens 24 --rounds 3"
    sizes += f" --experts 3 --threads {torch.get_num_threads()}"
    monkeypatch.setattr(sys, "argv", ["/somewhere/locate_speed.py", *sizes.split()])
    locate_speed.main()
    out = capsys.readouterr().out
    assert f"`python benchmarks/locate_speed.py {sizes}`" in out and "somewhere" not in out
    assert "LlamaForCausalLM" in out and "MixtralForCausalLM" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    found = {(row[0].removeprefix("| "), row[2]): row for row in rows[: len(rows) // 2]}
    compared = {(name.partition(",")[0], to) for name, to in locate_speed.AGAINST.items()}
    assert {(name.partition(",")[0], to) for name, to in found} >= compared
    channels, weights = 2 * (85 + 32), 2 * (3 * 32 * 85 + 2 * 32 * 32 + 2 * 16 * 32)
    held = {name: float(row[4]) for (name, _), row in found.items() if row[4][:1].isdigit()}
    assert held["ESI"] == pytest.approx(4 * weights / 1e6, rel=0.05)
    assert held["SSAH"] == pytest.approx(2 * 8 * channels / 1e6, rel=0.1)
    assert held["hidden states"] == 0
