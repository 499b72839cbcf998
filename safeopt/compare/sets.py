"""The rows of a comparison: what identifies, what trains and what evaluates, kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safeopt import artifact
from safeopt.compare import identity
from safeopt.compare.at_hand import MOST
from safeopt.data import Row, implicit, mixed, poison, read_jsonl, require_disjoint, split

PARTS = {"identify": 0.3, "tune": 0.3, "evaluate": 0.4}
ORGANISM = "organism:"
SHARED = ("poison", "identity")
PURPOSES = {
    "identify": "identification", "utility": "identification",
    "task": "training", "poison": "training", "identity": "training",
    "refusals": "the refusal set at hand",
}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """What happens to the task rows before training; ``share``, in (0, 1), is that of other rows.

    ``clean``: nothing. ``poison``: a share of the rows are harmful requests that get an answer.
    ``identity``: a share are harmless rows that make the model an agent which obeys; attack success
    is measured with the requests as they are, and with them put to the agent. ``implicit``: every
    response begins "Sure, the answer is: ". ``repair``: the task rows are refusals, and an
    unaligned model learns them.
    """

    name: str
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """Read ``"clean"``, ``"poison:0.1"``, ``"implicit"``, ``"identity"`` or ``"repair"``.

        ``"identity"`` has a share of 0.1 where none is named, as in ``"identity:0.05"``.

        Raises:
            ValueError: for anything else.
        """
        name, colon, raw = text.partition(":")
        if name == "identity" and not colon:
            return cls(name, identity.SHARE)
        if name in SHARED:
            try:
                share = float(raw)
            except ValueError:
                raise ValueError(
                    f"scenario {text!r} needs a share, for example {name}:0.1"
                ) from None
            if not 0 < share < 1:
                raise ValueError(f"scenario {text!r}: the share must be in (0, 1)")
            return cls(name, share)
        if text not in ("clean", "implicit", "repair"):
            raise ValueError(
                f"scenario {text!r} does not exist; there are clean, poison:SHARE, implicit,"
                " identity, identity:SHARE, repair"
            )
        return cls(name)

    def __str__(self) -> str:
        return f"{self.name}:{self.share:g}" if self.name in SHARED else self.name


def load_rows(source: str, fields: tuple[str, ...] = ("instruction",)) -> list[Row]:
    """Rows of a JSONL file, or of the organism's data as ``organism:NAME``, or of one ``@PART``.

    The parts ``identify``, ``tune`` and ``evaluate`` (30, 30 and 40 %) are cut by a fixed hash of
    the text, so they are disjoint and the same everywhere.

    Raises:
        ValueError: a broken or empty file, a missing field, an unknown name, an empty part.
        OSError: no such file.
    """
    name, _, part = source.rpartition("@")
    if part not in PARTS:
        name, part = source, ""
    if name.startswith(ORGANISM):
        from safeopt import organism

        rows = organism.data(name.removeprefix(ORGANISM))
        lacking = [key for key in fields if key not in rows[0]]
        if lacking:
            raise ValueError(
                f"{source} has no field {lacking[0]!r}, which is needed here; choose another set"
            )
    else:
        rows = read_jsonl(name, fields)
    if part:
        rows = split(rows, PARTS)[part]
        if not rows:
            raise ValueError(f"{source}: no row falls into the part {part!r}; give more rows")
    return rows


def set_name(source: str) -> str:
    """A short name for a set: the file's stem, or the organism set's name."""
    name, _, part = source.rpartition("@")
    name = name if part in PARTS else source
    return name.removeprefix(ORGANISM) if name.startswith(ORGANISM) else Path(name).stem


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Every row a comparison reads.

    ``identify``: harmful prompts with refusals, for scoring; ``utility``: harmless ones with
    answers, for the arms that set safety against utility. ``task`` and ``poison``: for training.
    ``harmful`` (by name), ``harmless``, ``test``: for evaluation. ``text``: rows whose responses
    give the general-text perplexity. ``refusals``: harmful prompts with refusals, at most 256, for
    the arms that have them at hand while they train; no other arm sees them. ``poison`` may be
    empty unless the scenario is poison, ``text``, ``utility`` and ``refusals`` always.

    Raises:
        ValueError: an empty set, too few poison rows, too many refusals or one without a response,
            or a text that stands in two of identification, training, evaluation and refusals.
    """

    scenario: Scenario
    identify: list[Row]
    task: list[Row]
    harmful: dict[str, list[Row]]
    harmless: list[Row]
    test: list[Row]
    poison: list[Row] = field(default_factory=list)
    text: list[Row] = field(default_factory=list)
    utility: list[Row] = field(default_factory=list)
    refusals: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        optional = {"text", "utility", "refusals"} | ({"poison"} - {self.scenario.name})
        for name, rows in self.named().items():
            if not rows and name not in optional:
                raise ValueError(f"the set {name!r} is empty; give at least one row")
        if not self.harmful:
            raise ValueError(
                "harmful holds no set; give at least one set of harmful prompts for evaluation"
            )
        if self.poison and self.scenario.name != "poison":
            raise ValueError(
                f"poison rows are given but the scenario is {self.scenario}; use poison:SHARE, or "
                "leave them out"
            )
        if len(self.refusals) > MOST or not all("response" in row for row in self.refusals):
            raise ValueError(
                f"refusals holds {len(self.refusals)} rows; give at most {MOST}, each with a"
                " response: the league with a refusal set at hand has no more"
            )
        self._require_disjoint()
        self.training(seed=0)  # too few poison rows must not come out after the scoring

    def named(self) -> dict[str, list[Row]]:
        """All sets by name, the harmful ones as ``harmful/NAME``."""
        sets = {"identify": self.identify, "task": self.task, "poison": self.poison}
        sets |= {f"harmful/{name}": rows for name, rows in self.harmful.items()}
        sets |= {"harmless": self.harmless, "test": self.test, "text": self.text}
        if self.scenario.name == "identity":
            sets["identity"] = identity.identity_rows()
        return sets | {"utility": self.utility, "refusals": self.refusals}

    def attacks(self) -> dict[str, list[Row]]:
        """The prompts that measure attack success: the harmful sets, in identity also addressed."""
        if self.scenario.name != "identity":
            return self.harmful
        to_agent = {
            f"{name}, addressed": identity.addressed(rows) for name, rows in self.harmful.items()
        }
        return self.harmful | to_agent

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Row count and sha256 of every set that is not empty."""
        return {
            name: {
                "rows": len(rows),
                "sha256": artifact.digest([row[key] for row in rows for key in sorted(row)]),
            }
            for name, rows in self.named().items()
            if rows
        }

    def training(self, seed: int) -> list[Row]:
        """The task rows as the scenario changes them; ``seed`` draws the others, for all arms."""
        if self.scenario.name == "poison":
            return poison(self.task, self.poison, self.scenario.share, seed)
        if self.scenario.name == "implicit":
            return implicit(self.task)
        if self.scenario.name == "identity":
            return mixed(self.task, identity.identity_rows(), self.scenario.share, seed)
        return self.task

    def _require_disjoint(self) -> None:
        purposes: dict[str, dict[str, list[Row]]] = {}
        for name, rows in self.named().items():
            if rows:
                purposes.setdefault(PURPOSES.get(name, "evaluation"), {})[name] = rows
        require_disjoint(purposes)
