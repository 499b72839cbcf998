"""--config: options from a YAML file, with the command line winning."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN = ("config", "help", "json", "debug")


def with_config(words: list[str], subparsers: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The command line with the options of its --config file in front of its own, which win.

    Raises:
        ValueError: the file is not YAML with option names as keys, or a key is no option of the
            command.
        OSError: no such file.
        ImportError: pyyaml is not installed.
    """
    if not words or words[0] not in subparsers:
        return words
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(words[1:])[0].config
    if path is None:
        return words
    tokens = _tokens(_read(path), subparsers[words[0]], path)
    # --config takes exactly one word, so a list before it cannot swallow a positional argument.
    return [words[0], *tokens, "--config", path, *words[1:]]


def _read(path: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--config needs pyyaml; install torch-safeopt[hf]") from error
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"config {path} must hold lines such as `steps: 100`, with long option names as keys"
        )
    return content


def _tokens(content: dict[str, Any], parser: argparse.ArgumentParser, path: str) -> list[str]:
    options = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option.removeprefix("--") not in OWN
    }
    tokens: list[str] = []
    for key, value in content.items():
        if key not in options:
            near = difflib.get_close_matches(str(key), options, 3)
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"there are {', '.join(sorted(options))}"
            )
            raise ValueError(f"config {path}: {key!r} is no option of {parser.prog}; {hint}")
        tokens += _words(key, value, options[key], path)
    return tokens


def _words(key: str, value: Any, action: argparse.Action, path: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"config {path}: {key} is {value!r}; it must be true or false")
        return [f"--{key}"] if value else []
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(each, str | int | float) for each in values):
            raise ValueError(f"config {path}: {key} is {value!r}; it must be a list of values")
        return [f"--{key}", *map(str, values)]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"config {path}: {key} is {value!r}; it must be one value")
    return [f"--{key}={value}"]
