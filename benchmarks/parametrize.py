"""What freezing rows or columns inside the model saves: backward time and memory.

    python benchmarks/parametrize.py --rounds 15 --out benchmarks/results/parametrize.md
    python benchmarks/parametrize.py --hidden 64 --layers 1 --tokens 64 --rounds 3     # a trial

A stack of Llama's MLPs (gate, up, down; 2.75 x hidden inside) trains on random activations with
AdamW. `safeopt.parametrize.freeze` freezes a random share of the rows, or columns, of each matrix.
Time: of the backward pass, as ratios to the plain model's within a round (interleave.py). Memory:
bytes of gradients and optimizer state, counted, and the peak of a training step above what the
model itself takes, on a CPU in a process of its own (resident memory, Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from interleave import Case, interleave, ratio
from mask_file import megabytes
from memory import EXACT
from torch import Tensor, nn

from safeopt import SafetyMask, parametrize

SHARES = (0.0, 0.25, 0.5, 0.75, 0.99)
NAMES = ["plain", *(f"{kind} {share:g}" for kind in ("rows", "columns") for share in SHARES[1:])]


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = hidden * 11 // 4
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def build(name: str, given: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Block(given.hidden) for _ in range(given.layers))
    model = nn.Sequential(*blocks).to(given.device, getattr(torch, given.dtype))
    if name != "plain":
        kind, share = name.split()
        dim = ("rows", "columns").index(kind)
        frozen = {n: chosen(p.shape[dim], float(share)) for n, p in model.named_parameters()}
        make = (SafetyMask.from_rows, SafetyMask.from_columns)[dim]
        parametrize.freeze(model, make(frozen, model))
    return model


def chosen(count: int, share: float) -> Tensor:
    return torch.randperm(count) < min(round(share * count), count - 1)


def forward(model: nn.Module, given: argparse.Namespace) -> Tensor:
    dtype = getattr(torch, given.dtype)
    x = torch.randn(given.tokens, given.hidden, device=given.device, dtype=dtype)
    return model(x.requires_grad_()).square().mean()  # as below other layers, x has a gradient


def backward_case(name: str, given: argparse.Namespace) -> Case:
    """Times the backward pass alone: the forward pass of the next one follows untimed."""
    model, ready = build(name, given), []

    def run() -> None:
        (ready.pop() if ready else forward(model, given)).backward()

    def after() -> None:
        model.zero_grad()
        ready.append(forward(model, given))

    return Case(name, run, after)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, given: argparse.Namespace) -> None:
    forward(model, given).backward()
    optimizer.step()


def measure(name: str, given: argparse.Namespace) -> dict[str, float]:
    """MB of gradients, of AdamW's state, and at the peak of two steps, beside the model."""
    torch.set_num_threads(given.threads)
    tiny = argparse.Namespace(**{**vars(given), "hidden": 32, "layers": 1, "tokens": 8})
    warm = build(name, tiny)
    step(warm, torch.optim.AdamW(warm.parameters()), tiny)  # what the first step imports
    model = build(name, given)
    cuda = torch.device(given.device).type == "cuda"
    before = torch.cuda.memory_allocated() / 1e6 if cuda else megabytes("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step(model, optimizer, given)
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else megabytes("VmHWM")
    state = [t for s in optimizer.state.values() for t in s.values()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {"gradients": size(grads), "state": size(state), "peak": peak - before}


def size(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--measure", choices=NAMES, help="one case, in this process, as JSON")
    given = parser.parse_args()
    if given.measure:
        return print(json.dumps(measure(given.measure, given)))
    torch.set_num_threads(given.threads)
    words = [sys.executable, *sys.argv, "--measure"]
    memory = {
        name: json.loads(subprocess.check_output([*words, name], env=os.environ | EXACT))
        for name in NAMES
    }
    cases = [backward_case(name, given) for name in NAMES]
    seconds = interleave(cases, given.rounds, given.device, given.budget)
    text = report(seconds, memory, given)
    print(text)
    return given.out and given.out.write_text(text)


def report(
    seconds: dict[str, list[float]], memory: dict[str, dict[str, float]], given: argparse.Namespace
) -> str:
    lines = [
        "| frozen | backward, to plain | quartiles | gradients, MB | AdamW state, MB | peak, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in NAMES:
        first, middle, third = ratio(seconds[name], seconds["plain"])
        row = memory[name]
        lines.append(
            f"| {name} | {middle:.2f} | {first:.2f} to {third:.2f} | {row['gradients']:.1f} |"
            f" {row['state']:.1f} | {row['peak']:.0f} |"
        )
    settings = {key: v for key, v in vars(given).items() if key not in ("out", "measure")}
    command = " ".join(f"--{key} {value}" for key, value in settings.items())
    rounds = len(seconds["plain"])
    return (
        "# Freezing rows and columns inside the model\n\n"
        f"torch {torch.__version__}; {given.device}, {rounds} rounds, medians of the ratio within a"
        " round. What is measured: the head of `benchmarks/parametrize.py`. Made by\n\n"
        f"    python benchmarks/parametrize.py {command}\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
