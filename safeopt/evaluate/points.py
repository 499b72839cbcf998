"""Measured points in a JSON lines file, so that a killed measurement goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Point = dict[str, Any]


class Points:
    """Points by their coordinates; each is on the disk before the next one is measured.

    The first line holds what was measured ("settings"); every further line one point. Without a
    path nothing is written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Open or begin the file.

        Raises:
            ValueError: the file is of another model, other directions, prompts or settings, or is
                no file of points.
        """
        self.path = path
        self.found: dict[str, Point] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._read(path, settings)
        if not self.found and not (path.exists() and path.stat().st_size):
            self._append({"settings": settings})

    @staticmethod
    def key(at: dict[str, float]) -> str:
        """The coordinates as text, zeros left out: the start has one key on every line."""
        return json.dumps({name: value for name, value in sorted(at.items()) if value != 0})

    def get(self, at: dict[str, float]) -> Point | None:
        """The point that was measured there, or None."""
        return self.found.get(self.key(at))

    def add(self, at: dict[str, float], values: Point) -> Point:
        """Keep a point, on the disk too."""
        point = {"at": {name: value for name, value in at.items() if value != 0}, **values}
        self.found[self.key(at)] = point
        self._append(point)
        return point

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            known = lines[0]["settings"] if lines else None
            points = {self.key(point["at"]): point for point in lines[1:]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a file of points, or is damaged ({error!r}); remove it or choose"
                " another folder"
            ) from error
        if known is not None and known != json.loads(json.dumps(settings)):
            other = sorted(k for k in settings if known.get(k) != settings[k])
            raise ValueError(
                f"{path} was begun with another {', '.join(other) or 'configuration'}; repeat that"
                " command to go on, or choose another folder"
            )
        if len(whole) < len(raw):  # killed while it wrote: that point is measured again
            os.truncate(path, len(whole))
        self.found = points

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def described(name: str, measure: Any, cache: Any) -> dict[str, Any]:
    """What the values of a callable depend on: its `arguments()`, which a cache needs; else {}.

    Raises:
        ValueError: a cache for a callable, by its `name`, that has no `arguments`.
    """
    arguments = getattr(measure, "arguments", None)
    if cache is not None and arguments is None:
        raise ValueError(
            f"cache: {name} does not say what its values depend on; give it a method arguments()"
            " that returns its settings as JSON values, as OverRejection has, or no cache"
        )
    return dict(arguments()) if arguments else {}
