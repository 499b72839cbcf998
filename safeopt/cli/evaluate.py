"""Measure refusals, over-refusal, task skill and drift of a model."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from safeopt import artifact
from safeopt.cli.judging import (
    add_judges,
    described,
    judges_text,
    load_judges,
    with_model,
)
from safeopt.cli.options import (
    MODEL,
    ROWS,
    WITH_RESPONSE,
    add_model,
    add_number,
    harmful_sets,
    proportion,
)
from safeopt.compare.sets import load_rows
from safeopt.data import Row, require_disjoint
from safeopt.environment import pick_device
from safeopt.evaluate import (
    Judge,
    PhraseJudge,
    Verdicts,
    accuracy,
    drift,
    judged,
    perplexity,
    records_of,
    refusal_rate,
    write_answers,
)
from safeopt.evaluate.refusal import NOTE, PHRASES_VERSION, phrases_hash
from safeopt.mask import SafetyMask
from safeopt.methods import prune

EXAMPLE = (
    "  safeopt evaluate ./tuned/model --harmful r.jsonl@evaluate --identified-on r.jsonl@identify"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt evaluate`."""
    add_model(parser)
    parser.add_argument(
        "--harmful", nargs="+", metavar="ROWS", help=f"harmful prompts, NAME=FILE or FILE: {ROWS}"
    )
    parser.add_argument(
        "--harmless", metavar="ROWS", help="harmless prompts, which should be answered"
    )
    parser.add_argument("--task", metavar="ROWS", help="task rows with the right response")
    parser.add_argument("--text", metavar="ROWS", help="general rows, for perplexity")
    parser.add_argument(
        "--reference", metavar="MODEL0", help=f"model before training, for drift: {MODEL}"
    )
    parser.add_argument("--mask", metavar="MASK", help="mask made for MODEL0, to split drift by")
    parser.add_argument(
        "--prune", metavar="MASK",
        help="measure the model with these weights set to 0: what does the region carry?",
    )  # fmt: skip
    parser.add_argument(
        "--identified-on", nargs="+", metavar="ROWS",
        help="rows on which the mask or direction was identified: a row of the evaluation that is "
        f"among them is refused, by name; {ROWS}",
    )  # fmt: skip
    add_judges(parser, margin=True)
    parser.add_argument(
        "--answers", metavar="FILE",
        help="write harmful prompts, answers and verdicts to FILE (JSONL), for safeopt judge",
    )  # fmt: skip
    add_number(parser, "batch-size", 32, "prompts at a time")
    add_number(parser, "max-new-tokens", 24, "tokens of an answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; what was not is left out."""
    from safeopt.integrations.transformers import load_model

    if not (args.harmful or args.harmless or args.task or args.text or args.reference):
        raise ValueError(
            "nothing to evaluate; give --harmful, --harmless, --task, --text or --reference"
        )
    if args.prune and args.reference:
        raise ValueError(
            f"--prune {args.prune} changes the model for the measurements, and --reference"
            f" {args.reference} asks how far it has drifted; measure one of them at a time"
        )
    if args.mask and not args.reference:
        raise ValueError(
            f"--mask {args.mask} splits the drift from --reference, which is not given; give both"
        )
    if (args.judge or args.answers) and not args.harmful:
        raise ValueError(
            "--judge and --answers are about answers to harmful prompts; give them with --harmful"
        )
    harmful = harmful_sets(args.harmful or [])
    harmless = load_rows(args.harmless) if args.harmless else []
    task = load_rows(args.task, WITH_RESPONSE) if args.task else []
    general = load_rows(args.text, WITH_RESPONSE) if args.text else []
    if args.identified_on:
        named = {f"harmful/{name}": rows for name, rows in harmful.items()}
        _require_unseen(
            args.identified_on, named | {"harmless": harmless, "task": task, "text": general}
        )
    judges = load_judges(args)
    model, tokenizer = load_model(args.model)
    model.to(pick_device(args.device))
    result: dict[str, Any] = {"model": args.model}
    if args.prune:
        result["pruned"] = args.prune
    if args.identified_on:
        result["identified_on"] = args.identified_on
    with prune(model, SafetyMask.load(args.prune)) if args.prune else nullcontext():
        result |= _measured(model, tokenizer, args, harmful, harmless, task, general)
        answers = result.pop("answers", {})
        if args.judge or args.answers:
            asked = with_model(judges, model, tokenizer) or [PhraseJudge()]
            result |= _judged(model, asked, harmful, answers, args.answers)
    if args.reference:
        result["drift"] = _drift(model, args.reference, args.mask)
    result["phrases"] = {"version": PHRASES_VERSION, "sha256": phrases_hash(), "note": NOTE}
    return result


def _measured(
    model: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    harmful: dict[str, list[Row]],
    harmless: list[Row],
    task: list[Row],
    general: list[Row],
) -> dict[str, Any]:
    how = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    result: dict[str, Any] = {}
    if harmful:
        found = {
            name: refusal_rate(model, tokenizer, _prompts(rows), **how)
            for name, rows in harmful.items()
        }
        result["attack"] = {name: one.attack_success.to_json() for name, one in found.items()}
        result["answers"] = {name: one.answers for name, one in found.items()}
    if harmless:
        result["over_refusal"] = refusal_rate(
            model, tokenizer, _prompts(harmless), **how
        ).refusals.to_json()
    if task:
        result["accuracy"] = accuracy(model, tokenizer, task, **how).to_json()
        result["perplexity"] = perplexity(model, tokenizer, task, batch_size=args.batch_size)
    if general:
        result["text_perplexity"] = perplexity(
            model, tokenizer, general, batch_size=args.batch_size
        )
    return result


def _judged(
    model: Any,
    judges: list[Judge],
    harmful: dict[str, list[Row]],
    answers: dict[str, tuple[str, ...]],
    path: str | None,
) -> dict[str, Any]:
    sets: dict[str, dict[str, Verdicts]] = {
        name: {judge.name: judged(judge, _prompts(rows), answers[name]) for judge in judges}
        for name, rows in harmful.items()
    }
    if path:
        weights = artifact.fingerprint(model)["weights"]
        write_answers(
            path,
            [
                record
                for name, rows in harmful.items()
                for record in records_of(
                    name, _prompts(rows), answers[name], sets[name].values(), model=weights
                )
            ],
        )
    return described(sets) | ({"answers": path} if path else {})


def text(result: dict[str, Any]) -> str:
    """One line per measurement."""
    lines = [
        f"attack success, {name}: {proportion(found)}"
        for name, found in result.get("attack", {}).items()
    ]
    if "over_refusal" in result:
        lines.append(f"over-refusal: {proportion(result['over_refusal'])}")
    if "accuracy" in result:
        lines.append(f"task accuracy: {proportion(result['accuracy'])}")
    names = {"perplexity": "perplexity, task", "text_perplexity": "perplexity, text"}
    lines += [
        f"{name}: {result[key]:.4g} per response token"
        for key, name in names.items()
        if key in result
    ]
    for part, found in result.get("drift", {}).items():
        moved = f"{found['moved']:,} of {found['numel']:,} weights moved"
        lines.append(f"drift, {part}: {100 * found['relative']:.3g} % of the norm, {moved}")
    lines += judges_text(result)
    if "answers" in result:
        lines.append(f"prompts, answers and verdicts: {result['answers']}")
    phrases = result["phrases"]
    return "\n".join(
        [*lines, f"{phrases['note']} (list {phrases['version']}, sha256 {phrases['sha256']})"]
    )


def _prompts(rows: list[dict[str, str]]) -> list[str]:
    return [row["instruction"] for row in rows]


def _require_unseen(sources: list[str], evaluation: dict[str, list[Row]]) -> None:
    if not any(evaluation.values()):
        raise ValueError(
            f"--identified-on {' '.join(sources)} is compared with the rows of the evaluation, and"
            " there are none; give --harmful, --harmless, --task or --text"
        )
    identification = {source: load_rows(source) for source in sources}
    require_disjoint({"identification": identification, "evaluation": evaluation})


def _drift(model: Any, folder: str, path: str | None) -> dict[str, Any]:
    from safeopt.integrations.transformers import load_model

    mask = SafetyMask.load(path) if path else None
    reference, _ = load_model(folder)
    if mask is not None:
        mask.check(reference)
    return drift(model, reference, mask)
