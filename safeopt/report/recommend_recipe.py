"""What to write to get what an arm of a comparison did."""

from __future__ import annotations

from typing import Any

_PARAMETERS = "model.named_parameters(), lr={lr:g}"
_SAFE = f"SafeAdamW({_PARAMETERS}, "
_SCORE = "safeopt score MODEL --refusals ROWS --method {method} --out scores.safetensors"
_SELECT = "safeopt select scores.safetensors --fraction {value} --out mask.safetensors"
_TRAIN = "safeopt train MODEL --data TASK --steps {step} --lr {lr:g} --out tuned "
_BETWEEN = "AlignmentDirection.between(aligned, unaligned"
_DIRECTION = (
    "safeopt direction --aligned MODEL --unaligned UNALIGNED --operator {operator}"
    " --out direction.safetensors"
)


def _masked(use: str) -> tuple[str, list[str]]:
    return (
        f"{_SAFE}{use}=select(scores, {{value}}))",
        [_SCORE, _SELECT, f"{_TRAIN}--{use} mask.safetensors"],
    )


def _anchored(mode: str) -> tuple[str, list[str]]:
    given = ', anchor_mode="decoupled"' if mode == "decoupled" else ""
    option = " --anchor-mode decoupled" if given else ""
    return (
        f"{_SAFE}anchor=scores, anchor_strength={{value}}{given})",
        [_SCORE, f"{_TRAIN}--anchor scores.safetensors --anchor-strength {{value}}{option}"],
    )


def _asft(operator: str, mode: str = "") -> tuple[str, list[str]]:
    rank = ", rank={rank}" if operator == "subspace" else ""
    given = f', mode="{mode}"' if mode else ""
    made = f'{_BETWEEN}, operator="{operator}"{rank})'
    option = f" --direction-mode {mode}" if mode else ""
    return (
        f"AsFTAdamW({_PARAMETERS}, direction={made}, lam={{value}}{given})",
        [
            _DIRECTION.replace("{operator}", operator) + (" --rank {rank}" if rank else ""),
            f"{_TRAIN}--direction direction.safetensors --lam {{value}}{option}",
        ],
    )


def _within(option: str = "") -> tuple[str, list[str]]:
    """Null-space training; option: the one that names the task, where the task chooses."""
    task = ", input_moments(model, task{parameters})" if option else ""
    code = (
        f"space = null_space(input_moments(model, refusals{{parameters}}){task}, leak={{value}})"
        "{before}",
        "space.freeze_rest(model)",
        "live = [p for p in model.parameters() if p.requires_grad]",
        "optimizer = torch.optim.AdamW(live, lr={lr:g})",
        "project_step(optimizer, space, model)",
    )
    made = f"safeopt space MODEL --refusals ROWS{option} --leak {{value}} --out space.safetensors"
    return "\n".join(code), [made, f"{_TRAIN}--space space.safetensors"]


RECIPES: dict[str, tuple[str, list[str]]] = {
    "spa": _masked("freeze"),
    "set": _masked("train"),
    "anchor": _anchored("coupled"),
    "anchor-decoupled": _anchored("decoupled"),
    "asft": _asft("safelora"),
    "asft-decoupled": _asft("safelora", "decoupled"),
    "asft-subspace": _asft("subspace"),
    "asft-vector": _asft("vector"),
    "sppft": (
        f"{_SAFE}freeze=layer_mask(model, ({{pair}})))",
        [
            "safeopt select --layers {layers} --model MODEL --out mask.safetensors",
            f"{_TRAIN}--freeze mask.safetensors",
        ],
    ),
    "project": (
        f'project_step(optimizer, {_BETWEEN}, operator="subspace", rank={{rank}}), model)',
        [],
    ),
    "null-space": _within(),
    "task-space": _within(" --task TASK"),
}
"""Code and commands by the name of an arm; an arm that is not here is described by its summary."""


def recipe(results: dict[str, Any], arm: str, step: int) -> list[str]:
    """Lines that say how to train as the arm did, up to the step: code first, then commands.

    MODEL, ROWS (harmful prompts with refusals) and TASK stand for the user's own.
    """
    name, _, value = arm.partition(":")
    settings = results["settings"]
    if name not in RECIPES or len(_names(arm)) > 1:
        return [_described(arm)]
    code, commands = RECIPES[name]
    adapted = settings.get("lora_targets") if settings.get("lora_rank") else None
    facts = {
        "value": value, "pair": value.replace("-", ", "), "layers": value, "step": step,
        "parameters": f", parameters={list(adapted)}" if adapted else "",
        "before": "  # before get_peft_model" if adapted else "",
        "lr": settings["lr"], "rank": settings.get("direction_rank", 32),
        "method": settings.get("method", "esi"),
    }  # fmt: skip
    if settings.get("lora_rank"):
        commands = []  # safeopt train moves all weights
    return [line.format(**facts) for line in [*code.splitlines(), *commands]]


def _described(arm: str) -> str:
    from safeopt.compare.arms import ARMS, parse_arm

    try:
        kind = parse_arm(arm).kind
    except ValueError:
        return f"as arm {arm} of the comparison does"
    known = kind.summary if kind.summary != arm else "; ".join(
        f"{name}: {one.summary}" for name, one in ARMS.items() if name in _names(arm)
    )  # fmt: skip
    return f"as arm {arm} of the comparison does: {known}"


def _names(arm: str) -> list[str]:
    parts = arm.replace("+", "|").replace("&", "|").split("|")
    return [part.partition(":")[0] for part in parts]
