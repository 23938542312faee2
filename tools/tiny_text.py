"""A seeded stream of short factual English: what the tiny checkpoint is trained and measured on."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from tiny_grammar import say
from tiny_questions import EXCHANGES
from tiny_solar import comparison, moon, planet, small_body, system
from tiny_topics import animal, country, element, mountain, river, story, sums, weather

T = TypeVar("T")
COMPLETE = "Complete the paragraph: "
COMMON_STARTS = {
    "Our",
    "The",
    "A",
    "An",
    "In",
    "On",
    "One",
    "Last",
    "Today",
    "Weather",
    "Counting",
    "Let",
    "There",
    "With",
}
PARAGRAPHS: dict[Callable[[random.Random], str], int] = {
    **{system: 16, planet: 20, comparison: 8, moon: 9, small_body: 7, element: 6, country: 12, animal: 6},
    **{river: 2, mountain: 2, weather: 5, sums: 6, story: 6},
}
SYSTEM_PROMPTS = (
    *[""] * 4,
    "You are a {helpful|friendly|patient} {assistant|teacher}.",
    "You {are a helpful assistant who gives|give} short answers.",
    "Answer {in one sentence|briefly|the question}.",
    "You know {the planets|science|many facts} well.",
)


class Document(NamedTuple):
    """One text for training; a chat has its messages, and `text` is then what they say, without the template."""

    text: str
    chat: tuple[dict[str, str], ...] = ()

    @property
    def paragraph(self) -> str:
        """What identifies the text, be it to complete or not."""
        return self.text.removeprefix(COMPLETE).casefold()


def documents(rng: random.Random) -> Iterator[Document]:
    """Yield documents without end; the short ones come again."""
    while True:
        yield pick(rng, {article: 62, interview: 10, dialogue: 28})


def reserve(stream: Iterator[Document], count: int, taken: set[str]) -> list[str]:
    """Take `count` texts, none of them a chat, whose paragraphs are not `taken`, and add them to these."""
    texts: list[str] = []
    while len(texts) < count:
        document = next(stream)
        if not document.chat and document.paragraph not in taken:
            taken.add(document.paragraph)
            texts.append(document.text)
    return texts


def pick(rng: random.Random, weights: dict[Callable[[random.Random], T], int]) -> T:
    """Call one of the weighted generators."""
    return rng.choices(list(weights), list(weights.values()))[0](rng)


def article(rng: random.Random) -> Document:
    """Write a paragraph, a third of the time as one to complete."""
    paragraph = pick(rng, PARAGRAPHS)
    if rng.random() > 0.35:
        return Document(paragraph)
    if paragraph.split()[0] in COMMON_STARTS:
        paragraph = paragraph[0].lower() + paragraph[1:]
    return Document(COMPLETE + paragraph)


def interview(rng: random.Random) -> Document:
    """Write one question to three, with answers, as plain text."""
    exchanges = [pick(rng, EXCHANGES) for _ in range(rng.choice((1, 2, 2, 3)))]
    return Document("\n".join(f"Question: {turns.question}\nAnswer: {turns.answer}" for turns in exchanges))


def dialogue(rng: random.Random) -> Document:
    """Write a chat of one question or two, with a system prompt or none."""
    turns = pick(rng, EXCHANGES)
    prompt = say(rng, rng.choice(SYSTEM_PROMPTS))
    messages = [{"role": "system", "content": prompt}] if prompt else []
    for question, answer in (turns[:2], turns[2:])[: rng.choice((1, 1, 2))]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Document("\n".join(message["content"] for message in messages), tuple(messages))
