"""Plans memory and bytes per step of each protection for large models, and checks the plan.

    python benchmarks/scale.py                          # the tables
    python benchmarks/scale.py --meta --measure 3e7     # and what they are worth

The plan is arithmetic on shapes (`scale_plan.py`, `scale_traffic.py`). --meta builds the real
optimizers over the real models on the meta device and counts: three minutes for 8 billion weights.
--measure runs them on this machine, each in a process of its own, and compares the peak of its
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory import peak
from scale_check import DTYPES, Watch, count, optimizer, prepared, reached, sized
from scale_pieces import POLICIES, PROTECTIONS
from scale_plan import Plan, plan
from scale_shapes import MODELS, build, fsdp2_bytes, weights, weights_of
from scale_traffic import scoring, traffic

GPUS = {"llama-3-8b": 8, "llama-3-70b": 32, "mixtral-8x22b": 32}
POLICY_TEXT = {
    "bf16": "weights, gradients and moments in bfloat16",
    "fp32": "weights, gradients and moments in float32, gathered in bfloat16 (MixedPrecision)",
}
PADDING = (1, 7, 8, 16, 32, 64)
META = [name for name, p in PROTECTIONS.items() if p.role != "hold" and p.anchor != "scores"]


@dataclass(frozen=True)
class Check:
    """A number of the plan and the same number counted or measured, in bytes."""

    case: str
    what: str
    planned: float
    found: float

    @property
    def error(self) -> float:
        """Of the plan, in per cent of what was found."""
        return 100 * (self.planned / self.found - 1) if self.found else 0.0


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gigabytes(number: float) -> str:
    """In units of 1e9 bytes, to three digits; "-" for none."""
    if not number:
        return "-"
    value = number / 1e9
    return f"{value:.4f}" if value < 0.1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def plans(model: str, policy: str, gpus: int) -> dict[str, Plan]:
    made = PROTECTIONS.items()
    return {n: plan(weights(model), p, POLICIES[policy], gpus) for n, p in made}


def memory_table(made: dict[str, Plan]) -> str:
    columns = {
        "weights": "weights",
        "gradients": "gradients",
        "moments": "moments",
        "mask": ("bits", "starts"),
        "starting values": "starting_values",
        "shares": "shares",
        "factors, held values": ("factors", "held_values"),
        "all": "held",
        "step, compiled": "peak_compiled",
        "step, plain": "peak_foreach",
        "host": "host",
    }

    def row(name: str, p: Plan) -> list[str]:
        keys = [key if isinstance(key, tuple) else (key,) for key in columns.values()]
        return [name, *(gigabytes(sum(getattr(p, k) for k in key)) for key in keys)]

    return table(["GB on a GPU", *columns], [row(name, p) for name, p in made.items()])


def step_table(made: dict[str, Plan], gpus: int) -> str:
    base, rows = traffic(made["adamw"].pieces, gpus).compiled, []
    for name, p in made.items():
        t = traffic(p.pieces, gpus)
        ratio = f"{t.compiled / base:.2f}"
        cells = [gigabytes(x) for x in (t.compiled, t.plain, t.penalty, t.sent)]
        rows.append([name, cells[0], ratio, *cells[1:], gigabytes(p.spare)])
    header = ["GB per step and GPU", "compiled", "to adamw", "plain", "of it penalty", "sent"]
    return table([*header, "gradients to spare"], rows)


def padding_table(models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for gpus in PADDING:
            p = plan(weights(model), PROTECTIONS["adamw"], POLICIES["bf16"], gpus)
            real = p.weights * gpus - p.padding
            share = f"{100 * p.padding / real:.3g} %"
            rows.append([model, gpus, gigabytes(p.weights), share])
    return table(["model", "GPUs", "weights on a GPU, bf16, GB", "padding"], rows)


def report(model: str, policy: str, gpus: int) -> str:
    made = plans(model, policy, gpus)
    first = made["adamw"]
    s = {key: gigabytes(value) for key, value in scoring(first.pieces).items()}
    numel = sum(w.numel for w in weights(model))
    return "\n\n".join(
        [
            f"## {model}, {policy}, {gpus} GPUs",
            f"{numel:,} weights; {POLICY_TEXT[policy]}. FSDP2 itself gathers about"
            f" {gigabytes(first.gathered)} GB beside this, and activations come to it.",
            memory_table(made),
            step_table(made, gpus),
            f"Scoring: weights {s['weights']}, buffer {s['buffer']}, one gradient"
            f" {s['gradient']} GB; selecting adds {s['select']} GB to the buffer.",
        ]
    )


def check_meta(model: str, policy: str, names: Sequence[str]) -> list[Check]:
    """The real optimizers over the whole model on the meta device, and FSDP2's own split of it."""
    checks = []
    for name in names:
        built, given, made = prepared(MODELS[model], name, policy, "meta")
        made_optimizer = optimizer(built, PROTECTIONS[name], given, fused=False)
        made_optimizer.step()
        found = count(made_optimizer)
        kept = sum(found.get(key, 0) for key in (*Plan.KEPT, "weights", "gradients"))
        with torch.no_grad(), Watch(plain=True).known(reached(made_optimizer)) as watch:
            made_optimizer.step()
        checks.append(Check(f"{model}, {name}", "held", made.held, kept))
        checks.append(Check(f"{model}, {name}", "step, plain", made.peak_plain, watch.peak))
        print(json.dumps(asdict(checks[-1])), file=sys.stderr)
    for gpus in (7, 8, 32):
        wanted = plan(weights(model), PROTECTIONS["adamw"], POLICIES[policy], gpus).weights
        found_bytes = fsdp2_bytes(MODELS[model], DTYPES[policy], gpus)
        checks.append(Check(f"{model}, FSDP2 on {gpus}", "weights", wanted, found_bytes))
    return checks


def check_measured(elements: int, policy: str, names: Sequence[str]) -> list[Check]:
    """Peak of resident memory that optimizer and step add, in a process for each protection.

    Masks, scores and directions are there before; on a CPU the optimizer uses them where they are.
    """
    checks, dtype = [], {"bf16": "bfloat16", "fp32": "float32"}[policy]
    bare = weights_of(build(sized(elements)))
    for name in names:
        made = plan(bare, PROTECTIONS[name], POLICIES[policy], cpu=True)
        own = made.kept - made.bits - made.factors
        for kernel, most in (("compiled", made.peak_compiled), ("plain", made.peak_plain)):
            os.environ["SAFEOPT_NO_EXT"] = str(int(kernel == "plain"))
            found = peak.__wrapped__("scale_check", name, elements, "cpu", dtype) * elements
            checks.append(Check(f"{name}, {policy}", f"{kernel} kernels", own + most, found))
            print(json.dumps(asdict(checks[-1])), file=sys.stderr)
    return checks


def check_table(checks: Sequence[Check]) -> str:
    rows = [
        [c.case, c.what, *(f"{x / 1e6:,.2f}" for x in (c.planned, c.found)), f"{c.error:+.2f}"]
        for c in checks
    ]
    return table(["case", "what", "planned, MB", "found, MB", "error of the plan, %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--only", nargs="+", choices=PROTECTIONS, default=list(PROTECTIONS))
    parser.add_argument("--gpus", type=int, help=f"of each model; default {GPUS}")
    parser.add_argument("--meta", nargs="*", choices=MODELS, help="models; default llama-3-8b")
    parser.add_argument("--measure", type=float, metavar="WEIGHTS", help="3e7 takes 5 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    args = parser.parse_args()
    words = " ".join(["python benchmarks/scale.py", *sys.argv[1:]])
    print(f"`{words}`, torch {torch.__version__}. GB are 1e9 bytes.\n")
    found: dict[str, Any] = {"command": words, "plans": {}, "checks": []}
    for model in args.models:
        for policy in args.policies:
            gpus = args.gpus or GPUS[model]
            print(report(model, policy, gpus), end="\n\n")
            for name, p in plans(model, policy, gpus).items():
                numbers = {**p.to_json(), "traffic": asdict(traffic(p.pieces, gpus))}
                found["plans"][f"{model}, {policy}, {gpus} GPUs, {name}"] = numbers
    print("## Padding\n\n" + padding_table(args.models), end="\n\n")
    checks: list[Check] = []
    for model in () if args.meta is None else args.meta or ["llama-3-8b"]:
        checks += check_meta(model, "bf16", [name for name in args.only if name in META])
    for policy in args.policies if args.measure else ():
        checks += check_measured(int(args.measure), policy, args.only)
    if checks:
        print("## Checks\n\n" + check_table(checks))
    found["checks"] = [{**asdict(c), "error_percent": c.error} for c in checks]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
