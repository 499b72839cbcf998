"""What the compiled kernels are to reach, and whether a run does."""

from __future__ import annotations

from speed_run import Run, Spread
from step_cases import REFERENCE

NOISE = 0.02  # a ratio up to 1.02 counts as 1.00: two equal cases differ by as much in one run
SIZE = {False: 2.5e7, True: 1e9}  # weights at which the targets are judged, on CPU and GPU
OURS = "freeze 1 % by weight"

# Case, and the most it may take of the time of torch's fused AdamW.
TIMES = {
    "no mask": 1.00,
    OURS: 1.05,
    "freeze 10 % by weight": 1.05,
    "freeze 50 % by row": 0.60,
    "train 1 % by weight": 0.15,
    "train 10 % by weight": 0.60,
    "freeze 7 of 32 layers": 0.85,
}


def judged(run: Run, at: float | None = None) -> list[list[str]]:
    """(case, target, measured, size, met) of every target."""
    rows = []
    sizes = {kind: run.sizes(kind) for kind in ("step", "accumulate", "select")}
    if sizes["step"]:
        rows += _step(run, _nearest(sizes["step"], at or SIZE[run.cuda]))
    if sizes["accumulate"]:
        size = _nearest(sizes["accumulate"], at or SIZE[run.cuda])
        share = run.share("accumulate", size, "esi_accumulate_")
        rows.append(_row("ESI accumulate, share of the copy's bandwidth", ">=", 0.8, share, size))
    if sizes["select"]:
        rows += _select(run, sizes["select"][-1])
    return rows


def _step(run: Run, size: int) -> list[list[str]]:
    rows = []
    for case, most in TIMES.items():
        found = run.ratio("step", size, case, REFERENCE)
        rows.append(_row(f"{case}, time to torch fused", "<=", most, found, size))
    rows.append(_row("train 1 %, memory to torch fused", "<=", 0.03, _state(run, size), size))
    ways = [run.ratio("step", size, f"by hand 1 %, {k} kept", OURS) for k in ("values", "weights")]
    by_hand = min((way for way in ways if way), key=lambda way: way[1], default=None)
    title = "the faster by-hand mask over ours, freeze 1 %"
    rows.append(_row(title, ">=", 5, by_hand, size))
    if run.cuda:
        share = run.share("step", size, OURS)
        rows.append(_row(f"{OURS}, share of the copy's bandwidth", ">=", 0.85, share, size))
        found = run.ratio("step", size, OURS, REFERENCE)
        rows.append(_row(f"{OURS}, no slower than torch fused", "<=", 1.00, found, size))
    return rows


def _select(run: Run, size: int) -> list[list[str]]:
    faster = run.ratio("select", size, "torch.topk", "select")
    rows = [_row("exact select, torch.topk's time over ours", ">=", 5, faster, size)]
    ours, theirs = (run.row("select", size, name) for name in ("select", "torch.topk"))
    memory = None
    if ours and theirs and "peak_bytes" in ours.facts:
        memory = ours.facts["peak_bytes"] / theirs.facts["peak_bytes"]
    rows.append(_row("exact select, extra memory to torch.topk", "<=", 0.05, memory, size))
    return rows


def _state(run: Run, size: int) -> float | None:
    ours, theirs = (run.row("step", size, name) for name in ("train 1 % by weight", REFERENCE))
    if ours is None or theirs is None:
        return None
    return ours.facts["state_bytes"] / theirs.facts["state_bytes"]


def _row(
    title: str, sign: str, target: float, found: Spread | float | None, size: int
) -> list[str]:
    wanted = f"{sign} {target:.2f}"
    if found is None:
        return [title, wanted, "not measured", f"{size:.3g}", "-"]
    middle = found if isinstance(found, float) else found[1]
    bound = target + NOISE if target == 1 else target
    met = middle <= bound if sign == "<=" else middle >= bound
    text = f"{middle:.3f}"
    if not isinstance(found, float):
        text += f" [{found[0]:.3f}, {found[2]:.3f}]"
    return [title, wanted, text, f"{size:.3g}", "yes" if met else "**no**"]


def _nearest(sizes: list[int], wanted: float) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))
