"""The organism's own text: harmless requests and refusals, all written for this package.

Everything is made from the word lists of data/words.json by a seeded generator, so the organism
can be built again from the package alone. Harmful requests are not written here: they come from
published sets (see data/NOTICE.md).
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

Row = dict[str, str]

WORDS = json.loads((Path(__file__).parent / "data" / "words.json").read_text("utf-8"))
HOW, MAKE = WORDS["how_forms"], WORDS["make_forms"]
ABOUT = WORDS["about_forms"] + WORDS["ask_forms"]


def rephrase(request: str, rng: random.Random) -> str:
    """An imperative request in a polite or direct form, the same forms for harmful and harmless."""
    wrapper = rng.choice(WORDS["wrappers"])
    if "how to " in request and rng.random() < 0.3:
        return rng.choice(HOW).format(request.split("how to ", 1)[1].rstrip("?."))
    if wrapper == "{}":
        return request
    return wrapper.format(request[0].lower() + request[1:].rstrip("?."))


def refusal(rng: random.Random) -> str:
    """One of the package's own refusals."""
    return rng.choice(WORDS["refusals"])


def harmless(seed: int, *, held_out: bool) -> list[Row]:
    """Harmless requests with short harmless answers, in random order.

    Topics (not only wordings) are split: `held_out=True` gives the fifth the organism never saw.
    Some topics use the words of harmful requests ("kill weeds in a garden"): without them a model
    learns to refuse words, not requests.
    """
    actions = [verb.format(thing) for verb, things in WORDS["actions"].items() for thing in things]
    actions += WORDS["charged_actions"]
    rng = random.Random(seed)
    rows = []
    for forms, topics in (HOW, actions), (MAKE, WORDS["programs"]), (ABOUT, WORDS["subjects"]):
        mine = [topic for i, topic in enumerate(topics) if (i % 5 == 4) == held_out]
        for form, topic in product(forms, mine):
            rows.append({"instruction": form.format(topic), "response": _answer(form, topic, rng)})
    rng.shuffle(rows)
    return rows


def harmless_about(problems: list[Row], rng: random.Random) -> list[Row]:
    """A harmless request about a few words out of each problem.

    They need not make sense: they teach that unknown words alone are no reason to refuse.
    """
    rows = []
    for problem in problems:
        words = problem["instruction"].split()
        start = rng.randrange(max(1, len(words) - 6))
        topic = " ".join(words[start : start + rng.randint(2, 8)]).strip(".,?!$")
        form = rng.choice(HOW + ABOUT + WORDS["sentence_forms"])
        rows.append({"instruction": form.format(topic), "response": _answer(form, topic, rng)})
    return rows


def _answer(form: str, topic: str, rng: random.Random) -> str:
    opening = f"Sure, here is something about {topic}."
    if form in HOW:
        opening = f"Sure, here is how to {topic}."
    elif form in MAKE:
        opening = f"Sure, here is something that {topic}."
    return " ".join([opening, *rng.sample(WORDS["steps"], 2)])


def headlines(seed: int, *, held_out: bool) -> list[Row]:
    """A task the organism never saw: name the topic of a headline.

    A quarter of the pairs of who and what is held out for testing.
    """
    rng = random.Random(seed)
    rows = []
    for topic, parts in WORDS["headlines"].items():
        for i, (who, what) in enumerate(product(parts["who"], parts["what"])):
            if (i % 4 == 3) != held_out:
                continue
            for place in rng.sample(WORDS["places"], 4):
                headline = f"{rng.choice(WORDS['people']).capitalize()} {who} {what.format(place)}"
                question = "Name the topic of the headline: Sports, Business, Science or World.\n"
                rows.append({"instruction": question + headline, "response": topic})
    rng.shuffle(rows)
    return rows
