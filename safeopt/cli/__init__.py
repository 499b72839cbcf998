"""The `safeopt` command: one small module per sub-command, each with a parser, a run and a text."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from safeopt._version import __version__
from safeopt.cli import (
    basin,
    compare,
    demo,
    direction,
    env,
    evaluate,
    export,
    inspect,
    judge,
    layers,
    project,
    recommend,
    report,
    score,
    select,
    space,
    train,
)
from safeopt.cli.config import with_config

__all__ = ["main"]

COMMANDS: dict[str, ModuleType] = {
    "score": score,
    "select": select,
    "layers": layers,
    "space": space,
    "inspect": inspect,
    "train": train,
    "evaluate": evaluate,
    "judge": judge,
    "export": export,
    "basin": basin,
    "direction": direction,
    "project": project,
    "compare": compare,
    "recommend": recommend,
    "report": report,
    "demo": demo,
    "env": env,
}
INTERRUPTED = 130
USER_ERROR = 2
# What a user can mend: wrong values and files, missing extras, numbers that ran away in training.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a user's error, 130 after Ctrl-C.

    The result goes to stdout, as text or with --json as one JSON object; progress and errors go to
    stderr.
    """
    parser, subparsers = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args = parser.parse_args(with_config(words, subparsers))
        command = COMMANDS[args.command]
        args.line = " ".join(["safeopt", *words])
        result = command.run(args)
    except KeyboardInterrupt:
        resume = getattr(
            COMMANDS.get(words[0]), "RESUME", "run the same command again to start over"
        )
        print(f"safeopt: interrupted; {resume}", file=sys.stderr)
        return INTERRUPTED
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"safeopt: error: {error}", file=sys.stderr)
        return USER_ERROR
    print(json.dumps(result) if args.json else command.text(result))
    return 0


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="safeopt",
        description="Find what carries a language model's safety, protect it, see what is left.",
    )
    parser.add_argument("--version", action="version", version=f"safeopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers = {}
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(sub)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        sub.add_argument(
            "--config", metavar="FILE", help="YAML file with long option names as keys"
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparsers[name] = sub
    return parser, subparsers
