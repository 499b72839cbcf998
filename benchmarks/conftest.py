"""Options of the benchmarks, and how interleaved timings reach pytest-benchmark.

pytest-benchmark times one test after the other. Here the first test of a group times all cases of
the group in turn (see interleave.py), and each test hands the timings of its case to the plugin
through a timer that replays them: its table and its JSON then hold what was measured, every round.
"""

from __future__ import annotations

import gc
import itertools
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from interleave import Case, interleave

from safeopt.environment import machine
from safeopt.ops.library import status

LEFT_OUT = pytest.StashKey[dict[str, str]]()
Make = Callable[[int, str, torch.dtype], tuple[list[Case], dict[str, str]]]


def sizes(text: str) -> list[int]:
    return [int(float(size)) for size in text.split(",")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16"])
    group.addoption("--weights", type=sizes, default="1e5,1e6,1e7,2.5e7,1e8,1e9")
    group.addoption("--scores", type=sizes, default="1e6,1e7,1e8")
    group.addoption("--rounds", type=int, default=15)
    group.addoption("--budget", type=float, default=120, help="seconds per group; 3 rounds always")
    group.addoption(
        "--memory-weights", type=lambda text: int(float(text)), default="2.5e7",
        help="at which the peak memory of a step is measured; 0: no peak memory",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("weights", "scores"):
        if name in metafunc.fixturenames:
            wanted = metafunc.config.getoption(name)
            metafunc.parametrize(name, wanted, ids=[f"{size:.3g}" for size in wanted])


@dataclass
class Groups:
    """The timings of each group of cases, measured when they are first asked for."""

    config: pytest.Config
    seconds: dict[tuple[str, int], dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[tuple[str, int], dict[str, dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self, kind: str, size: int, make: Make) -> None:
        if (kind, size) in self.seconds:
            return
        option = self.config.getoption
        torch.manual_seed(0)
        cases, left_out = make(size, option("device"), getattr(torch, option("dtype")))
        self.left_out |= {f"{kind} {size:.3g}: {name}": why for name, why in left_out.items()}
        timed = interleave(cases, option("rounds"), option("device"), option("budget"))
        self.seconds[kind, size] = timed
        self.facts[kind, size] = {case.name: case.facts for case in cases}
        del cases
        gc.collect()  # their caches hold them in a circle, and the next size may need the room


@pytest.fixture(scope="session")
def groups(pytestconfig: pytest.Config) -> Groups:
    made = Groups(pytestconfig)
    pytestconfig.stash[LEFT_OUT] = made.left_out
    return made


@pytest.fixture
def report(request: pytest.FixtureRequest, groups: Groups) -> Callable[..., None]:
    """report(kind, size, case, make, more facts): one row of a group, to pytest-benchmark."""

    def hand_over(kind: str, size: int, name: str, make: Make, **facts: Any) -> None:
        groups.measure(kind, size, make)
        seconds = groups.seconds[kind, size].get(name)
        if seconds is None:
            why = groups.left_out.get(f"{kind} {size:.3g}: {name}", "nothing of this size fits")
            pytest.skip(why)
        readings = itertools.accumulate(itertools.chain(*((0.0, took) for took in seconds)))

        def replay() -> float:
            return next(readings)

        group = pytest.mark.benchmark(group=f"{kind} {size:.3g}", timer=replay)
        request.node.add_marker(group)
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info |= {"kind": kind, "size": size, "case": name, **facts}
        benchmark.extra_info |= groups.facts[kind, size][name]
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return hand_over


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of the plugin's own, which names the host."""
    device = config.getoption("device")
    found = machine(device) | {"torch": torch.__version__, "dtype": config.getoption("dtype")}
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    ours = status()[torch.device(device).type.upper()]
    library = ours["why"].rpartition("/")[2]  # without the folder, which is nobody's business
    compiled = ours["kernel"] == "compiled"
    return found | {"kernel": f"compiled, {library}" if compiled else ours["kernel"]}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True)
        return done.stdout.decode().strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"id": git("rev-parse", "--short=10", "HEAD") or "unknown", "dirty": changed}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    words = ["python", "-m", "pytest", *map(str, config.invocation_params.args)]
    output_json["command"] = shlex.join(words)
    output_json["left_out"] = config.stash.get(LEFT_OUT, {})
