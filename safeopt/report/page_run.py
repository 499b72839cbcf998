"""The sections of a report about one training run: protected, cost, course, drift, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeopt.report.page_blocks import (
    Block,
    Bullets,
    Cards,
    Exchange,
    Figure,
    Section,
    Table,
    Text,
    rate,
)
from safeopt.report.page_svg import bars, heatmap, lines, thinned

Found = Mapping[str, Any]
ROLES = {
    "freeze": "frozen: these weights kept their exact bits while all others were trained",
    "train": "trained: these weights alone could move, and all others kept their exact bits",
    None: "not used by the training: it only divides the drift below",
}


def in_short(run: Found, found: Found | None) -> Section:
    """The figures to be seen first."""
    cards = []
    for name, each in (found or {}).get("attack", {}).items():
        cards.append((f"attack success, {name}", *_before_after(each)))
    for key, name in (("over_refusal", "over-refusal"), ("accuracy", "task accuracy")):
        if found and key in found:
            cards.append((name, *_before_after(found[key])))
    live, total = run["live"], run["total"]
    cards.append(("weights trained", f"{100 * live / total:.3g} %", f"{live:,} of {total:,}"))
    if found:
        moved = found["drift"]["all"]["relative"]
        cards.append(("drift", f"{100 * moved:.3g} %", "of the norm of all weights"))
    said = f"{run['arguments']['model']}, {len(run['losses'])} steps on {run['arguments']['data']}"
    text = " ".join([f"{said}. {_protection(run)}", *_judged(found)])
    return Section("short", "In short", [Text(text), Cards(cards)])


def _judged(found: Found | None) -> list[str]:
    """One sentence for each harmful set; a difference is one whose intervals do not overlap."""
    said = []
    for name, each in (found or {}).get("attack", {}).items():
        before, after = each["before"]["interval"], each["after"]["interval"]
        if after[0] > before[1]:
            said.append(f"Attack success on {name} is higher after training.")
        elif after[1] < before[0]:
            said.append(f"Attack success on {name} is lower after training.")
        else:
            said.append(f"No difference is shown in attack success on {name}.")
    return said or ["Refusals were not measured."]


def _before_after(each: Found) -> tuple[str, str]:
    before, after = each["before"], each["after"]
    low, high = after["interval"]
    return (
        f"{100 * before['rate']:.1f} % → {100 * after['rate']:.1f} %",
        f"n = {after['n']}; after: [{100 * low:.1f}, {100 * high:.1f}] (95 %)",
    )


def _protection(run: Found) -> str:
    said, given = [], run["arguments"]
    if given.get("freeze"):
        said.append("a mask froze part of the weights")
    if given.get("train"):
        said.append("a mask let part of the weights move")
    if given.get("anchor"):
        said.append(f"weights were drawn to their start (strength {given['anchor_strength']:g})")
    if given.get("direction"):
        said.append(f"changes were held on a direction (lambda {given['lam']:g})")
    space = run.get("space")
    if space:
        said.append(
            f"updates kept to {100 * space['free']:.3g} % of the inputs of {space['matrices']}"
            f" matrices, in which {100 * space['leak']:.2g} % of what refusals bring lies"
            if "leak" in space
            else f"updates kept to random inputs, {100 * space['free']:.3g} % of those there are"
        )
    return f"Protection: {'; '.join(said)}." if said else "Nothing was protected."


def protected(run: Found, mask: Found | None) -> Section:
    """Where the mask lies, and what an input space leaves free; or that there was neither."""
    title = "What was protected"
    space = run.get("space") or {}
    blocks: list[Block] = []
    if mask is None:
        none = "No mask was used, so there is no map of protected weights."
        blocks += [Text(_protection(run)), *([] if space else [Text(none)])]
    else:
        total = mask["layout"]["total"]
        share = f"{100 * total['density']:.3g} %"
        said = (
            f"{total['selected']:,} of the {total['total']:,} weights that the mask names ({share})"
            f" are selected, and {ROLES[mask['role']]}."
        )
        blocks += [
            Text(said),
            _map(mask["layout"]["grid"], "density", "Selected share", "weight that the mask names"),
            Text(f"Made by: {mask['made']}."),
        ]
    if "grid" in space:  # records of earlier versions have none
        blocks.append(
            _map(space["grid"], "free", "Share of the inputs left free", "matrix in the space")
        )
    return Section("protected", title, blocks)


def _map(grid: Found, key: str, what: str, lacking: str) -> Figure:
    """A share in [0, 1] of each layer and component, as a heatmap and a table."""
    layers = list(grid)
    parts = list(dict.fromkeys(part for row in grid.values() for part in row))
    values = [
        [100 * grid[n][part][key] if part in grid[n] else float("nan") for part in parts]
        for n in layers
    ]
    rows = [[n, *[_share(v) for v in row]] for n, row in zip(layers, values, strict=True)]
    most = max(((grid[n][part][key], n, part) for n in layers for part in grid[n]), default=None)
    alt = f"Heatmap. {what} of {len(layers)} layers by {len(parts)} components."
    if most:
        alt += f" Most: {most[2]} in layer {most[1]} with {100 * most[0]:.3g} %."
    return Figure(
        heatmap(layers, parts, values),
        alt,
        f"{what} (%) of each layer and component. Layer - stands for weights outside the numbered"
        f" layers; a cell without colour has no {lacking}.",
        Table(f"{what} of each layer and component", ["layer", *parts], rows),
    )


def cost(run: Found, found: Found | None, unseen: bool | None) -> Section:
    """Safety and skill before and after, and what training took."""
    blocks: list[Block] = []
    if found is None or unseen is None:
        blocks.append(Text("Not measured: give --harmful, and --harmless and --task with it."))
    else:
        blocks += _rates(found)
        rows_of = f"the training rows ({run['arguments']['data']})"
        told = f"None of these prompts is among {rows_of}."
        if not unseen:
            told = f"These prompts could not be compared with {rows_of}, which are not there."
        blocks.append(Text(told))
    rows = [["weights trained", f"{run['live']:,} of {run['total']:,}"]]
    rows.append(["optimizer state", f"{run['state_bytes'] / 1e6:.3g} MB"])
    timed = run["timed"]
    if timed["steps"]:
        rows.append(["time of a step", f"{timed['seconds'] / timed['steps']:.3g} s"])
    rows.append(["machine", f"{run['machine']['name']} ({run['machine']['device']})"])
    blocks.append(Table("What training took", ["", "value"], rows, words=True))
    return Section("cost", "What it cost", blocks)


def _rates(found: Found) -> list[Block]:
    named = {f"attack success, {name}": each for name, each in found["attack"].items()}
    for key, name in (("over_refusal", "over-refusal"), ("accuracy", "task accuracy")):
        named |= {name: found[key]} if key in found else {}
    drawn, rows = [], []
    for name, each in named.items():
        for colour, when in enumerate(("before", "after")):
            one = each[when]
            low, high = one["interval"]
            label = f"{100 * one['rate']:.1f} %"
            drawn.append((f"{name}: {when}", label, one["rate"], (low, high), colour))
        rows.append([name, rate(each["before"]), rate(each["after"])])
    if "perplexity" in found:
        each = found["perplexity"]
        rows.append(["perplexity, task", *(f"{each[when]:.4g}" for when in ("before", "after"))])
    table = Table("Before and after training", ["", "before", "after"], rows)
    alt = ". ".join(f"{name}: {before} before, {after} after" for name, before, after in rows)
    caption = "Before and after training; the whiskers are 95 % Wilson intervals."
    notes = [
        "Attack success is the share of harmful prompts that are not refused (an empty answer is no"
        " refusal); over-refusal is the share of harmless prompts that are.",
    ]
    empty = sum(one["empty"] for each in found["attack"].values() for one in each.values())
    if empty:
        notes.append(f"{empty} answers to harmful prompts were empty.")
    return [Figure(bars(drawn, 1.0), f"{alt}.", caption), table, Bullets(notes)]


def course(run: Found) -> Section:
    """Refusal margin and loss over training."""
    blocks: list[Block] = []
    curve, losses = run["curve"], run["losses"]
    if curve:
        points = [(point["step"], point["margin"]) for point in curve]
        first, last = points[0], points[-1]
        low = min(points, key=lambda point: point[1])
        watched = run["watched"]
        rows = [[f"{step}", f"{value:.3f}"] for step, value in points]
        blocks.append(
            Figure(
                lines({"margin": points}, "training steps", "refusal margin (nats)"),
                f"Refusal margin: {first[1]:.3g} nats at step {first[0]}, {last[1]:.3g} at step"
                f" {last[0]}, lowest {low[1]:.3g} at step {low[0]}.",
                f"First-token refusal margin, mean over {watched['rows']} prompts: the best logit"
                " of a token that begins a refusal, less the best of all others. Below 0 a greedy"
                " answer begins otherwise.",
                Table("Refusal margin", ["step", "nats"], rows),
            )
        )
    else:
        blocks.append(Text("The refusal margin was not recorded: train with --watch ROWS."))
    means, size = thinned(losses)
    some = means[:: max(1, len(means) // 12)]
    some = some if some[-1] == means[-1] else [*some, means[-1]]
    each = "Loss of every step" if size == 1 else f"Loss, mean of every {size} steps"
    blocks.append(
        Figure(
            lines({"loss": means}, "training steps", "loss (nats per token)"),
            f"Training loss: {losses[0]:.3g} at step 1, {losses[-1]:.3g} at step {len(losses)}.",
            f"{each}.",
            Table(f"{each} (some)", ["step", "loss"], [[f"{s:g}", f"{v:.4f}"] for s, v in some]),
        )
    )
    return Section("course", "Over training", blocks)


def drifted(found: Found | None) -> Section:
    """How far weights have moved, selected and other ones apart."""
    if found is None:
        return Section("drift", "Drift", [Text("Not measured.")])
    names = {"all": "all weights", "critical": "selected by the mask", "other": "all others"}
    rows, drawn = [], []
    for i, (key, name) in enumerate(names.items()):
        if key not in found["drift"]:
            continue
        one = found["drift"][key]
        share = 100 * one["relative"]
        moved = f"{one['moved']:,} of {one['numel']:,}"
        rows.append([name, f"{share:.3g} %", f"{one['max_abs']:.3g}", moved])
        drawn.append((name, f"{share:.3g} %", share, None, i))
    header = ["", "of their norm", "largest change", "weights that moved"]
    table = Table("Distance from the starting weights", header, rows)
    top = max(value for _, _, value, _, _ in drawn)
    alt = "Drift: " + ", ".join(f"{name} {words}" for name, words, *_ in drawn) + "."
    caption = "Euclidean norm of the change, in per cent of the norm before training."
    return Section("drift", "Drift", [Figure(bars(drawn, top), alt, caption), table])


def examples(found: Found | None) -> Section:
    """Answers before and after."""
    title = "Example answers"
    if not found or not found["examples"]:
        return Section("examples", title, [Text("None: give --harmful or --harmless.")])
    told = (
        "The first prompts of each set, not chosen ones. Of an answer to a harmful prompt a refusal"
        " is shown to the end of the sentence in which it refuses; one that complies is never"
        " written out. What refuses is told by a phrase list, which can err."
    )
    each = [
        Exchange(one["prompt"], one["before"], one["after"], one["kind"])
        for one in found["examples"]
    ]
    return Section("examples", title, [Text(told), *each])


def _share(value: float) -> str:
    return "" if value != value else f"{value:.3g} %"
