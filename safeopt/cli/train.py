"""Fine-tune a model: masks, an anchor, a direction, or updates that an input space confines."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from safeopt import artifact, checkpoint
from safeopt.cli.options import ROWS, WITH_RESPONSE, add_model, add_number
from safeopt.cli.record import Record
from safeopt.cli.train_optimizer import live_count, made, penalties, require_alone, state_bytes
from safeopt.compare.sets import load_rows
from safeopt.data import Row, require_disjoint
from safeopt.environment import pick_device
from safeopt.input_space import InputSpace
from safeopt.mask import SafetyMask
from safeopt.optim.anchor import MODES

EXAMPLE = "  safeopt train ./my-model --data task.jsonl --freeze mask.safetensors --out ./tuned"
RESUME = (
    "run the same command with --resume to continue from the last checkpoint (see --save-every)"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `safeopt train`."""
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="ROWS", help=f"rows to learn: {ROWS}")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--freeze", metavar="MASK", help="weights that must not move (SPA)")
    masks.add_argument("--train", metavar="MASK", help="the only weights that move (SET)")
    parser.add_argument(
        "--anchor", metavar="SCORES", help="draw weights to their start by these scores, or uniform"
    )
    add_number(parser, "anchor-strength", 0.0, "lambda of the penalty lambda s (w - start)^2")
    parser.add_argument(
        "--anchor-mode",
        choices=MODES,
        default="coupled",
        help="in the gradient (default), or beside the weight decay",
    )
    parser.add_argument(
        "--direction",
        metavar="FILE",
        help="hold changes on this direction (AsFT), made by safeopt direction",
    )
    add_number(parser, "lam", 1.0, "with --direction: lambda of its penalty")
    parser.add_argument(
        "--direction-mode",
        choices=MODES,
        default="coupled",
        help="in the gradient (default), or beside the weight decay",
    )
    parser.add_argument(
        "--space",
        metavar="FILE",
        help="confine updates to this input space and freeze the rest, with torch's AdamW; made by "
        "safeopt space with the same model",
    )
    add_number(parser, "steps", 100, "optimizer steps")
    add_number(parser, "lr", 1e-5, "learning rate")
    add_number(parser, "weight-decay", 0.0, "decoupled weight decay")
    add_number(parser, "batch-size", 8, "rows per step")
    add_number(parser, "max-length", 256, "tokens of prompt and response")
    add_number(parser, "max-grad-norm", 1.0, "clip the gradient of the live weights to this norm")
    add_number(parser, "warmup-steps", 0, "steps of linear warm-up")
    add_number(parser, "seed", 0, "order of the rows")
    add_number(parser, "save-every", 0, "steps between checkpoints; 0: at the end only")
    parser.add_argument(
        "--watch", metavar="ROWS",
        help="harmful prompts with refusals, not trained on: record the refusal margin on the way",
    )  # fmt: skip
    add_number(parser, "watch-every", 10, "with --watch: steps between two measurements")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in OUT")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="gets model/, checkpoint/ and train.json"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, save the model, and return what was done."""
    from safeopt.integrations.transformers import load_model, save_model
    from safeopt.train import TrainConfig, train

    out = _checked(args)
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        max_grad_norm=args.max_grad_norm,
        warmup_steps=args.warmup_steps,
        save_every=args.save_every,
    )
    rows = load_rows(args.data, WITH_RESPONSE)
    watched = _watched(args, rows)
    freeze, only = (SafetyMask.load(path) if path else None for path in (args.freeze, args.train))
    space = InputSpace.load(args.space) if args.space else None
    model, tokenizer = load_model(args.model)
    for protection in (freeze, only, space):
        if protection is not None:
            protection.check(model)
    device = pick_device(args.device)
    model.to(device)
    record = Record(args, model, rows, freeze if freeze is not None else only, device, space)
    optimizer = made(model, args, freeze=freeze, train=only, space=space)
    on_step = record.watcher(model, tokenizer, watched, args) if watched else None
    since = time.perf_counter()
    done = _steps_done(out) if args.resume else 0
    losses = train(
        model,
        tokenizer,
        rows,
        optimizer,
        config,
        checkpoint_dir=out / "checkpoint",
        resume=args.resume,
        on_step=on_step,
        made_with=None if space is None else {"space": space.digest()},
    )
    record.seconds += time.perf_counter() - since
    save_model(model, tokenizer, out / "model")
    live, total = live_count(optimizer, model)
    record.write(
        losses=losses,
        live=live,
        total=total,
        state_bytes=state_bytes(optimizer),
        timed={"steps": len(losses) - done, "seconds": record.seconds},
        trained=artifact.fingerprint(model),
    )
    return {
        "out": str(out / "model"),
        "steps": len(losses),
        "loss": losses[-1],
        **penalties(optimizer),
        "live": live,
        "total": total,
        "space": record.content["space"],
    }


def _checked(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    if (out / "model").exists():
        raise ValueError(
            f"--out {out} already holds a model; name another folder or remove {out / 'model'}"
        )
    if args.anchor and not args.anchor_strength:
        raise ValueError(
            f"--anchor is {args.anchor} and --anchor-strength 0, so nothing would be drawn; give a"
            " strength above 0, for example 1, or leave --anchor out"
        )
    require_alone(args)
    return out


def _watched(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    if not args.watch:
        return []
    if args.watch_every < 1:
        raise ValueError(f"--watch-every is {args.watch_every}; it must be at least 1")
    watched = load_rows(args.watch, WITH_RESPONSE)
    require_disjoint({"training": {args.data: rows}, "watching": {args.watch: watched}})
    return watched


def _steps_done(out: Path) -> int:
    newest = checkpoint.newest(out / "checkpoint")
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def text(result: dict[str, Any]) -> str:
    """What was trained and where it is."""
    inputs = f" in {result['space']['free']:.1%} of their inputs" if result["space"] else ""
    return (
        f"{result['steps']} steps, last loss {result['loss']:.4f}, "
        f"{result['live']:,} of {result['total']:,} weights trained{inputs}: {result['out']}"
    )
