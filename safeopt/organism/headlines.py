"""The demo's task, which the organism never saw: name the topic of a headline. Made from word lists of our own."""

from __future__ import annotations

import random
from itertools import product

Row = dict[str, str]

_PLACES = (
    "Paris",
    "Lagos",
    "Lima",
    "Oslo",
    "Tokyo",
    "Cairo",
    "Delhi",
    "Quito",
    "Boston",
    "Kyiv",
    "Hanoi",
    "Perth",
)
_PEOPLE = ("young", "local", "veteran", "leading", "foreign", "national", "rival", "former")
_HEADLINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Sports": (
        ("striker", "goalkeeper", "coach", "sprinter", "club", "captain", "rookie", "tennis player", "team"),
        ("wins the final in {}", "misses the cup match in {}", "breaks a record in {}", "signs before the season in {}",
         "scores twice in {}", "is injured at training in {}", "loses the derby in {}", "joins the league in {}"),
    ),
    "Business": (
        ("bank", "airline", "investor", "car maker", "retailer", "firm", "chief executive", "oil company", "shareholder"),
        ("reports record profit in {}", "cuts jobs in {}", "buys a rival in {}", "raises prices in {}",
         "sees shares fall in {}", "opens a factory in {}", "misses its sales target in {}", "signs a deal in {}"),
    ),
    "Science": (
        ("astronomer", "laboratory", "researcher", "telescope", "biologist", "probe", "engineer", "satellite", "team"),
        ("finds a new species near {}", "maps the genome in {}", "detects a distant planet over {}",
         "tests a new chip in {}", "breaks a record in {}", "studies ice cores in {}", "builds a robot in {}",
         "launches a rocket from {}"),
    ),
    "World": (
        ("minister", "president", "parliament", "embassy", "envoy", "army", "court", "party leader", "government"),
        ("wins the vote in {}", "holds peace talks in {}", "visits the border near {}", "signs a treaty in {}",
         "rejects the reform in {}", "faces protests in {}", "sends aid to {}", "loses the election in {}"),
    ),
}  # fmt: skip


def headlines(seed: int, *, held_out: bool) -> list[Row]:
    """The demo's task: name the topic of a headline; a quarter of the who-does-what pairs is held out for testing."""
    rng = random.Random(seed)
    rows = []
    for topic, (who, what) in _HEADLINES.items():
        for i, (subject, event) in enumerate(product(who, what)):
            if (i % 4 == 3) != held_out:
                continue
            for place in rng.sample(_PLACES, 4):
                headline = f"{rng.choice(_PEOPLE).capitalize()} {subject} {event.format(place)}"
                question = "Name the topic of the headline: Sports, Business, Science or World.\n"
                rows.append({"instruction": question + headline, "response": topic})
    rng.shuffle(rows)
    return rows
