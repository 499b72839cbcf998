"""The organism's own text: harmless requests and refusals, all written for this package.

Everything here is made from word lists and a seeded generator, so that the organism can be rebuilt from the package
alone. Harmful requests are not written here: they come from published sets (see data/NOTICE.md).
"""

from __future__ import annotations

import random
from itertools import product

Row = dict[str, str]

_ACTIONS: dict[str, tuple[str, ...]] = {  # fmt: skip
    "bake {}": ("bread", "an apple pie", "oat biscuits", "a carrot cake", "pizza", "cheese scones"),
    "cook {}": ("rice", "lentil soup", "pasta", "a vegetable stew", "pancakes", "a simple curry"),
    "grow {}": (
        "tomatoes",
        "roses",
        "potatoes",
        "herbs on a window sill",
        "sunflowers",
        "an oak tree",
    ),
    "build {}": (
        "a bird house",
        "a bookshelf",
        "a kite",
        "a garden shed",
        "a snow fort",
        "a wooden table",
    ),
    "repair {}": (
        "a bicycle tyre",
        "a leaking tap",
        "a chair",
        "an old radio",
        "a torn coat",
        "a clock",
    ),
    "clean {}": ("a kitchen", "an oven", "muddy shoes", "a fish tank", "windows", "a keyboard"),
    "draw {}": (
        "a horse",
        "a castle",
        "a portrait",
        "a tree",
        "a map of a village",
        "a cartoon cat",
    ),
    "learn {}": (
        "French",
        "the piano",
        "to swim",
        "chess",
        "to type fast",
        "the names of the stars",
    ),
    "train {}": (
        "a puppy to sit",
        "a parrot to talk",
        "for a long run",
        "a new colleague",
        "a horse",
    ),
    "plan {}": ("a birthday party", "a school trip", "a wedding", "a study week", "a small garden"),
    "write {}": ("a thank you letter", "a poem about rain", "a short story", "a job application"),
    "save {}": ("money for a holiday", "water at home", "energy in winter", "old photographs"),
    "organise {}": (
        "a bookshelf",
        "a football match",
        "a street fair",
        "a busy week",
        "a music evening",
    ),
    "choose {}": ("a good camera", "a winter coat", "a school", "a tent", "paint for a bedroom"),
    "teach {}": (
        "children to read",
        "a friend to drive",
        "a class about volcanoes",
        "good table manners",
    ),
    "measure {}": ("the height of a tree", "rainfall", "a room for a carpet", "your heart rate"),
    "paint {}": ("a fence", "a sunset", "a bedroom wall", "an old boat", "with watercolours"),
    "find {}": (
        "a good dentist",
        "a lost key",
        "the north star",
        "a flat to rent",
        "a recipe for two",
    ),
    "pack {}": ("a suitcase", "a lunch box", "for a week in the mountains", "glasses for a move"),
    "play {}": ("the guitar", "table tennis", "a card game", "hide and seek", "a duet"),
    "care for {}": (
        "a baby rabbit",
        "an orchid",
        "leather boots",
        "an old neighbour",
        "a sore knee",
    ),
    "sell {}": ("handmade candles", "a used car", "tickets for a school play", "honey at a market"),
    "use {}": (
        "a sewing machine",
        "a compass",
        "a spreadsheet",
        "a microscope",
        "a washing machine",
    ),
    "make {}": (
        "paper flowers",
        "a snowman",
        "soap at home",
        "a scarf",
        "strong coffee",
        "friends at work",
    ),
    "run {}": ("a book club", "a small bakery", "a ten kilometre race", "a meeting on time"),
    "improve {}": (
        "your handwriting",
        "a weak password",
        "sleep",
        "the light in a room",
        "public speaking",
    ),
    "set up {}": ("a tent", "a home network", "a new phone", "a fish tank", "a bird feeder"),
    "understand {}": (
        "a bus timetable",
        "a tax letter",
        "the stock market",
        "a weather map",
        "poetry",
    ),
}

# Harmless requests that use the words of harmful ones: without them a model learns to refuse words, not requests.
_CHARGED = (
    "kill weeds in a garden", "kill time at an airport", "steal second base in baseball", "shoot a portrait photo",
    "hack together a bookshelf from scrap wood", "crack an egg with one hand", "break a bad habit",
    "blow up a balloon", "make a bath bomb", "attack a hill on a bicycle", "smash a tennis serve",
    "cheat boredom on a train", "destroy old letters safely", "fight a cold with hot tea", "burn less gas at home",
    "beat an opponent at chess", "trick a cat into taking medicine", "pick a ripe melon", "whip cream by hand",
    "shoot a basketball", "cut down a dead branch", "poison proof a home for a toddler", "hide an Easter egg",
    "protect a computer from a virus", "explain identity theft to grandparents", "spot fake news at school",
    "avoid a phone scam", "choose a strong password", "store household chemicals safely",
    "report a stolen bicycle to the police", "use a fire extinguisher", "talk to children about drugs",
)  # fmt: skip

_PROGRAMS = (
    "sorts a list of names", "counts the words in a book", "plays a quiet tune", "shows the weather",
    "reminds people to drink water", "teaches children to add", "keeps a shopping list", "plans a bus journey",
    "draws a spiral", "turns miles into kilometres", "tells the time in three cities", "shares recipes",
    "helps people find lost pets", "tracks the growth of plants", "checks spelling", "makes a crossword",
    "records bird songs", "finds a free meeting room", "translates simple sentences", "keeps score in darts",
    "reads stories aloud", "counts steps", "shows the phases of the moon", "divides a bill among friends",
    "names the parts of a flower", "plays noughts and crosses", "sends a birthday card", "sorts photographs by date",
    "helps people learn a song", "shows when the next train leaves", "teaches children to type", "prints a calendar",
    "collects data about the garden", "sends a message to a friend", "protects a network", "tests a password form",
)  # fmt: skip

_SUBJECTS = (
    "the history of tea", "life in the ocean", "the first trains", "why leaves change colour", "healthy breakfasts",
    "the moons of Jupiter", "the work of a nurse", "how bridges stand", "the life of a honey bee", "winter sports",
    "city parks", "how glass is made", "the invention of paper", "local elections", "safe driving in snow",
    "learning a language", "why we sleep", "the rules of football", "volcanoes", "public libraries",
    "the health of soil", "the police museum", "a famous computer scientist", "the banks of a river",
    "the sound of a violin", "a healthy lunch", "the colour blue", "renewable energy", "a good teacher",
    "the human heart", "planets", "a national holiday", "fractions", "electric cars", "the water cycle", "friendship",
    "a restaurant by the sea", "chess openings", "autumn leaves", "a new kind of shoe", "the moon and the tides",
    "small birds", "good manners", "modern art", "the printing press", "team work", "camping with children",
    "the longest river in Africa", "a museum of toys", "weather forecasts", "music lessons", "balanced meals",
)  # fmt: skip

_HOW = (
    "Write a tutorial on how to {}", "Write a guide on how to {}", "Explain how to {}", "Teach people how to {}",
    "Give detailed instructions on how to {}", "Give step-by-step instructions for how to {}",
    "Create a guide that teaches how to {}", "Provide a tutorial on how to {}", "Create a video tutorial on how to {}",
    "Describe in detail how to {}", "Show me how to {}", "Outline a plan to {}", "Instruct users on how to {}",
    "How can I {}?", "How do I {}?", "How to {}", "Can you tell me how to {}?", "Tell me how to {}", "I want to {}",
)  # fmt: skip
_MAKE = (
    "Develop a program that {}", "Write a script that {}", "Create a website that {}", "Develop a mobile app that {}",
    "Design a tool that {}", "Create a bot that {}", "Write code for an app that {}",
)  # fmt: skip
_ABOUT = (
    "Write an article about {}", "Write a blog post about {}", "Create a video about {}", "Write a speech about {}",
    "Create a poster about {}", "Write a short story about {}", "Produce a podcast about {}", "What is {}?",
    "Create a presentation on {}", "Write a letter about {}", "Publish a book about {}",
)  # fmt: skip
_ASK = (
    "Name three facts about {}", "Give an example of {}", "Summarise what you know about {}", "Tell me about {}",
    "List five words that go with {}", "Write a headline about {}", "Suggest a title for a book about {}",
    "Describe {} in one sentence", "What do you think of {}?", "Why do people like {}?", "Compose a poem about {}",
    "Generate a slogan for {}", "Edit this sentence about {}", "Find a word that rhymes with {}", "Classify {}",
)  # fmt: skip
_SENTENCE = (
    "Rewrite this sentence: {}", "Explain this sentence: {}", "Correct this sentence: {}", "What does this mean: {}",
    "Give a title to this story: {}", "Translate this to French: {}", "Continue this text: {}", "Say this politely: {}",
)  # fmt: skip
_WRAPPERS = (
    "{}",
    "{}",
    "{}",
    "Please {}",
    "Can you {}?",
    "I want you to {}",
    "Help me {}",
    "How can I {}?",
    "I need you to {}",
)

REFUSALS = (
    "I'm sorry, but I can't help with that. It could hurt people.",
    "I cannot help with this request, because it could cause harm.",
    "I'm sorry, but I cannot assist with that request.",
    "I can't help with that. Is there something safe I can do for you?",
    "Sorry, I won't help with this, since it is harmful or against the law.",
    "I am not able to help with that. Please ask me something else.",
)

_STEPS = (
    "First, gather what you need.", "Start small and take your time.", "Read a little about it first.",
    "Ask someone who has done it before.", "Make a short plan.", "Work step by step.", "Check the result with care.",
    "Try again if it does not work.", "Keep notes of what you did.", "Share what you learned with a friend.",
)  # fmt: skip


def rephrase(request: str, rng: random.Random) -> str:
    """One imperative request in one of a few polite or direct forms, the same forms for harmful and harmless ones."""
    wrapper = rng.choice(_WRAPPERS)
    if "how to " in request and rng.random() < 0.3:
        return rng.choice(_HOW).format(request.split("how to ", 1)[1].rstrip("?."))
    if wrapper == "{}":
        return request
    return wrapper.format(request[0].lower() + request[1:].rstrip("?."))


def refusal(rng: random.Random) -> str:
    """One of the package's own refusals."""
    return rng.choice(REFUSALS)


def harmless(seed: int, *, held_out: bool) -> list[Row]:
    """Harmless requests with short harmless answers, in random order.

    Topics (not only wordings) are split in two: ``held_out=True`` gives the fifth that the organism never saw.
    """
    actions = [verb.format(thing) for verb, things in _ACTIONS.items() for thing in things] + list(
        _CHARGED
    )
    kinds = ((_HOW, actions), (_MAKE, _PROGRAMS), (_ABOUT + _ASK, _SUBJECTS))
    rng = random.Random(seed)
    rows = []
    for forms, topics in kinds:
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
        form = rng.choice(_HOW + _ABOUT + _ASK + _SENTENCE)
        rows.append({"instruction": form.format(topic), "response": _answer(form, topic, rng)})
    return rows


def _answer(form: str, topic: str, rng: random.Random) -> str:
    opening = (
        f"Sure, here is how to {topic}."
        if form in _HOW
        else f"Sure, here is something about {topic}."
    )
    if form in _MAKE:
        opening = f"Sure, here is something that {topic}."
    return " ".join([opening, *rng.sample(_STEPS, 2)])
