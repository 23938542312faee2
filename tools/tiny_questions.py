"""Questions and answers of the training text, each with a question that may follow it."""

import random
from collections.abc import Callable
from typing import NamedTuple

from tiny_facts import ANIMALS, BODIES, COUNTRIES, ELEMENTS, MOONS, PLANETS
from tiny_grammar import a, ask, facts, say
from tiny_solar import ORDER, SYSTEM_PARTS, SYSTEM_START


class Exchange(NamedTuple):
    """A question, its answer, and a question that may follow with its answer."""

    question: str
    answer: str
    next_question: str
    next_answer: str


RECORDS = (
    ("{largest|biggest} planet", "Jupiter", "with a diameter of about 143,000 km"),
    ("smallest planet", "Mercury", "with a diameter of about 4,880 km"),
    ("hottest planet", "Venus", "with about 465 °C at its surface"),
    ("planet {closest|nearest} to the Sun", "Mercury", "at about 57.9 million km"),
    ("planet farthest from the Sun", "Neptune", "at about 4,495 million km"),
    ("largest moon", "Ganymede", "with a diameter of about 5,270 km"),
    ("{largest|biggest} rocky planet", "Earth", "with a diameter of about 12,760 km"),
)
SYSTEM_QUESTIONS = (
    (
        "{how many planets are {there|in {the|our} solar system}|how many planets does {the|our} solar system have}",
        "There are eight planets{: $order| in {the|our} solar system}.",
    ),
    (
        "{{what are|name|list} the {eight|} planets{ in order|}{ from the Sun|}|which planets are there}",
        "The {eight|} planets {are|are, in order from the Sun,} $order.",
    ),
    (
        "{what is {the|our} solar system|what is {the|our} solar system made of|tell me about {the|our} solar system}",
        "The solar system is made up of the Sun and everything that orbits it{: planets, moons, asteroids "
        "and comets|}.",
    ),
    (
        "{tell me about|describe|what do you know about} {the|our} solar system",
        SYSTEM_START + " " + SYSTEM_PARTS[1][0],
    ),
    ("where is the asteroid belt", "The asteroid belt lies between {the orbits of|} Mars and Jupiter."),
    ("how old is {the|our} solar system", "{It|The solar system} is about 4.6 billion years old."),
    (
        "{what is the Sun|what kind of object is the Sun|tell me about the Sun}",
        "The Sun is a star {in the middle of|at the centre of} {the|our} solar system{, made mostly of "
        "hydrogen and helium|}.",
    ),
    (
        "{what are the dwarf planets|which dwarf planets {do you know|are there}}",
        "{Five well-known dwarf planets are|The best known ones are} Pluto, Ceres, Eris, Haumea and Makemake.",
    ),
    ("is Pluto a planet", "{No, |}Pluto {is a dwarf planet|has been called a dwarf planet since 2006}."),
    (
        "what is a comet",
        "A comet is a {ball|lump} of ice and dust that grows a {bright|long} tail near the Sun.",
    ),
    (
        "{which planet has {the brightest|bright} rings|which planet is famous for its rings}",
        "Saturn has bright rings of ice and rock.",
    ),
    (
        "{which planet is {called|} the Red Planet|why is Mars red}",
        "Mars is {called the Red Planet|red} because of the iron oxide in its soil.",
    ),
    (
        "{where do we live|which planet do we live on|on which planet is there life}",
        "We live on Earth, the third planet from the Sun.",
    ),
)
PLANET_REQUEST = "{{tell me|what can you tell me|what do you know} {something|} about|what is|describe} $it"
PLANET_QUESTIONS = (
    ("{how many moons does $it have|does $it have {any|} moons}", "$name has $moons."),
    (
        "how {large|big|wide} is $it",
        "{$name is about $diameter km {across|wide}|$name has a diameter of about $diameter km}.",
    ),
    ("how long is a year on $it", "{A year on $name lasts|One orbit around the Sun takes} $year."),
    (
        "{how long does $it take to {spin|turn} once|how long is a day on $it}",
        "$name {spins|turns} once in $day.",
    ),
    ("how far is $it from the Sun", "$name is about $distance million km {away|} from the Sun."),
    ("what kind of planet is $it", "$name is $kind."),
)
COUNTRY_QUESTIONS = (
    (
        "{what is the capital of $name|which city is the capital of $name|do you know the capital of $name}",
        "{The capital of $name is $capital|$capital is the capital of $name}.",
    ),
    ("tell me {something|} about $name", "$name is a country in $continent. {It|The country} $fact."),
    (
        "and {the capital of|what is the capital of} $other",
        "{The capital of $other is|It is} $other_capital.",
    ),
    (
        "{which|what} language {is spoken|do people speak} there",
        "{People|Many people} there speak $language.",
    ),
    ("what is the {currency|money} there", "The currency of $name is the $currency."),
    ("on which continent is {it|$name}", "$name is in $continent."),
)
TALK = (
    ("{hello|hi|good morning|hey}{!|.|}", "Hello! {How can I help you|What would you like to know}? 🙂"),
    (
        "who are you?",
        "I am a {small|tiny} language model. I know some facts about the {solar system|planets}. 🪐",
    ),
    ("what can you do?", "I can tell you about planets, countries, animals and chemical elements. 🙂"),
    ("{thank you|thanks}{!|.}", "You are welcome! 😊"),
)


def exchange(rng: random.Random, *templates: str, **slots: object) -> Exchange:
    """Expand the four templates of an exchange with the same slots."""
    question, answer, then, after = templates
    return Exchange(
        ask(rng, question, **slots),
        say(rng, answer, **slots),
        ask(rng, then, **slots),
        say(rng, after, **slots),
    )


def ask_planet(rng: random.Random) -> Exchange:
    """Ask about one planet, then about something else of it."""
    body = rng.choice(PLANETS)
    chosen, following = rng.sample(PLANET_QUESTIONS, 2)
    about = " ".join(facts(rng, body.facts, body.name)[: rng.choice((1, 2))])
    if rng.random() < 0.35:
        chosen = (PLANET_REQUEST, "$name is the $order planet from the Sun. $about")
    then = "{and|} " + following[0].replace("$it", rng.choice(("it", "$name")))
    slots = body._asdict() | {"it": body.name, "kind": a(body.kind), "about": about}
    return exchange(rng, *chosen, then, following[1], **slots)


def ask_record(rng: random.Random) -> Exchange:
    """Ask which planet or moon holds a record."""
    (what, name, detail), (next_what, next_name, _) = rng.sample(RECORDS, 2)
    what, next_what = (say(rng, f"the {text}").removeprefix("The ") for text in (what, next_what))
    noun = "moon" if what.endswith("moon") else "planet"
    scope = "" if "Sun" in what else " {in|of} {the|our} solar system"
    return exchange(
        rng,
        f"{{which $noun is the $short|what is the $what|which is the $what}}{{{scope}|}}",
        f"{{$name is the $what{scope}|{{The answer is|It is}} $name|The $what is $name}}{{|, $detail}}.",
        "and {what|which} is the $next_what",
        "{That is|It is|The $next_what is} $next_name.",
        **{
            "what": what,
            "name": name,
            "noun": noun,
            "detail": detail,
            "short": what.replace(noun, "").strip(),
        },
        **{"next_what": next_what, "next_name": next_name},
    )


def ask_system(rng: random.Random) -> Exchange:
    """Ask about the solar system as a whole."""
    chosen, following = rng.sample(SYSTEM_QUESTIONS, 2)
    return exchange(rng, *chosen, *following, order=ORDER)


def ask_moon(rng: random.Random) -> Exchange:
    """Ask about a moon."""
    body = rng.choice(MOONS[1:])
    return exchange(
        rng,
        "{what is|tell me {something|} about|which planet has the moon} $name",
        "$name is a moon of $planet. {{It|$name} $fact.|}",
        "how {large|big} is {it|$name}",
        "{It|$name} is about $diameter km across.",
        **body._asdict() | {"fact": rng.choice(body.facts)},
    )


def ask_body(rng: random.Random) -> Exchange:
    """Ask about a dwarf planet or a comet."""
    body = rng.choice(BODIES)
    return exchange(
        rng,
        "{what is|tell me {something|} about|describe} $name",
        "$name is $kind. {It $fact.|}",
        "how long does {it|$name} take to {go|travel} around the Sun",
        "One orbit around the Sun takes $years years.",
        **body._asdict() | {"kind": a(body.kind), "fact": rng.choice(body.facts)},
    )


def ask_country(rng: random.Random) -> Exchange:
    """Ask for a capital, then for the language, the currency, the continent or another capital."""
    body, other = rng.sample(COUNTRIES, 2)
    chosen = COUNTRY_QUESTIONS[0] if rng.random() < 0.8 else COUNTRY_QUESTIONS[1]
    slots = body._asdict() | {"other": other.name, "other_capital": other.capital}
    return exchange(rng, *chosen, *rng.choice(COUNTRY_QUESTIONS[2:]), **slots)


def ask_element(rng: random.Random) -> Exchange:
    """Ask for a chemical symbol, then for the number or the use."""
    body = rng.choice(ELEMENTS)
    following = (
        ("{and|} what is {it|$lower} used for", "$name is used $use."),
        ("{and|} what is its atomic number", "The atomic number of $lower is $number."),
    )
    return exchange(
        rng,
        "what is the {chemical|} symbol {of|for} $lower",
        "The {chemical|} symbol {of|for} $lower is $symbol.",
        *rng.choice(following),
        **body._asdict() | {"lower": body.name.lower()},
    )


def ask_animal(rng: random.Random) -> Exchange:
    """Ask about an animal."""
    body = rng.choice(ANIMALS)
    following = (
        ("{and|} what does it eat", "It {eats|feeds on} $food."),
        ("{and|} where does it live", "It {lives|can be found} $home."),
    )
    return exchange(
        rng,
        "{what kind of animal is|what is|tell me {something|} about} $name",
        "$name is $kind. It $fact.",
        *rng.choice(following),
        **body._asdict() | {"kind": a(body.kind), "fact": rng.choice(body.facts)},
    )


def ask_sum(rng: random.Random) -> Exchange:
    """Ask for a sum, then for a difference."""
    x, y, less, more = (rng.randint(2, 12) for _ in range(4))
    less, more = min(less, more), max(less, more) + 1
    return exchange(
        rng,
        "{what is|how much is} $x + $y",
        "$x + $y = $sum.",
        "and {what is|} $more - $less",
        "$more - $less = $rest.",
        **{"x": x, "y": y, "sum": x + y, "less": less, "more": more, "rest": more - less},
    )


def talk(rng: random.Random) -> Exchange:
    """Greet, then ask something of the others."""
    greeting, answer = rng.choice(TALK)
    after = rng.choice((ask_planet, ask_record, ask_system, ask_country, ask_moon))(rng)
    return Exchange(say(rng, greeting), say(rng, answer), after.question, after.answer)


EXCHANGES: dict[Callable[[random.Random], Exchange], int] = {
    **{ask_planet: 20, ask_record: 20, ask_system: 16, ask_moon: 8, ask_body: 5, ask_country: 16},
    **{ask_element: 7, ask_animal: 7, ask_sum: 10, talk: 3},
}
