"""Which arms are controls, and of which arms, by their names; joined arms part by part."""

from __future__ import annotations

import re
from typing import Any

from safeopt.report.summary import runs_of

SIGNS = re.compile(r"([|&+])")
PLAIN = ("adamw", "adamw-lr", "l2", "l2-decoupled")


def is_control(results: dict[str, Any], arm: str) -> bool:
    """Whether an arm is there for others to be read against, and not a protection by itself.

    These are the arms that a comparison calls so (random masks and directions), arms joined of
    parts one of which is such, plain AdamW at any learning rate, and plain L2.
    """
    if runs_of(results, arm)[0]["control"] or is_plain(arm):
        return True
    parts = SIGNS.split(arm)[::2]
    return len(parts) > 1 and any(_known_control(part) for part in parts)


def is_plain(arm: str) -> bool:
    """Whether an arm is AdamW at any learning rate, or L2, and nothing is joined to it."""
    return arm.partition(":")[0] in PLAIN and not SIGNS.search(arm)


def controls_of(results: dict[str, Any], arm: str) -> list[str]:
    """The controls of an arm that were run: ``spa-random:0.01`` for ``spa:0.01``.

    Those of a joined arm have the control of a part in its place. ``mix:100``, refusals mixed into
    the rows of plain AdamW, is one of every arm that ends in ``+mix:100``.
    """
    return [
        other
        for other in results["arms"]
        if (_is_of(other, arm) and is_control(results, other))
        or (other.startswith("mix:") and arm.endswith(f"+{other}"))
    ]


def controls_to_run(arm: str) -> list[str]:
    """The controls that `safeopt compare` knows for an arm; for a joined arm, of one part each."""
    from safeopt.compare import ARMS  # here, as it imports the training code

    words = SIGNS.split(arm)
    found = []
    for at in range(0, len(words), 2):
        base, colon, value = words[at].partition(":")
        names = [
            name for name, kind in ARMS.items() if kind.control and name.rpartition("-")[0] == base
        ]
        for name in names if len(words) == 1 else names[:1]:
            found.append("".join([*words[:at], f"{name}{colon}{value}", *words[at + 1 :]]))
    return found


def _is_of(control: str, arm: str) -> bool:
    theirs, mine = SIGNS.split(control), SIGNS.split(arm)
    if control == arm or len(theirs) != len(mine):
        return False
    return all(one == two or _is_part_of(one, two) for one, two in zip(theirs, mine, strict=True))


def _is_part_of(control: str, arm: str) -> bool:
    name, _, number = control.partition(":")
    base, _, value = arm.partition(":")
    return name.rpartition("-")[0] == base and number == value


def _known_control(part: str) -> bool:
    from safeopt.compare import ARMS

    kind = ARMS.get(part.partition(":")[0])
    return kind is not None and kind.control
