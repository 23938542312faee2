"""The grammar of the training text: templates with choices and slots.

A template chooses with `{this|that}`, innermost first, an empty branch allowed, and then fills its `$slots`;
a slot that holds a number is written as English text writes it.
"""

import random
import re

CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\$([a-z_]+)")


def say(rng: random.Random, template: str, **slots: object) -> str:
    """Expand a template to a sentence or more, with a capital first letter."""
    while match := CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    text = SLOT.sub(lambda slot: written(slots[slot[1]]), template)
    text = re.sub(r"  +", " ", text).strip()
    return text[:1].upper() + text[1:]


def ask(rng: random.Random, template: str, **slots: object) -> str:
    """Expand a template to a question, or to a request where it starts with one of these verbs."""
    text = say(rng, template, **slots)
    return text + ("." if text.startswith(("Tell ", "Describe ", "List ", "Name ")) else "?")


def written(value: object) -> str:
    """Write a number as English text does (143,000 or 57.9), and anything else as it is."""
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
    return str(value)


def a(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def some(rng: random.Random, sentences: list[str], low: int, high: int) -> str:
    """Join between `low` and `high` of the sentences, in a random order."""
    return " ".join(rng.sample(sentences, min(len(sentences), rng.randint(low, high))))


def facts(rng: random.Random, entries: tuple[str, ...], name: str = "it") -> list[str]:
    """Turn predicates into sentences about it, or about `name`, at times two of them in one sentence."""
    shuffled = rng.sample(entries, len(entries))
    if len(shuffled) > 2 and rng.random() < 0.5:
        shuffled = [f"{shuffled[0]}, and it {shuffled[1]}", *shuffled[2:]]
    return [say(rng, "{it|it|$name} $fact.", name=name, fact=entry) for entry in shuffled]
