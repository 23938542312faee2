"""Paragraphs of the training text about the solar system."""

import random

from tiny_facts import BODIES, MOONS, PLANETS, Planet
from tiny_grammar import a, facts, say, some

ORDER = ", ".join(planet.name for planet in PLANETS[:-1]) + f" and {PLANETS[-1].name}"

SYSTEM_START = (
    "{our|our|the} solar system {is {made up of|formed by} the Sun and {everything that {orbits|travels "
    "around} it|all the bodies that {orbit|move around} it}{|: planets, moons, asteroids and comets}|is the "
    "{family|group} of {worlds|planets, moons and smaller bodies} that {orbit|travel around} the "
    "Sun|consists of the Sun, eight planets and many smaller bodies}{||, held together by gravity}."
)
# What follows, in this order, each with its probability.
SYSTEM_PARTS = (
    (
        "{The Sun {is a star {at the centre|in the middle} of the system|is the star in the middle} and "
        "{holds|contains} {about|} 99.8% of {its|all the} mass.|The Sun is {about|} 1.39 million km "
        "{wide|across}, {about|} 109 times {as wide as|the diameter of} Earth.|The Sun is a {yellow "
        "dwarf|star} made mostly of hydrogen and helium.}",
        0.6,
    ),
    (
        "{{The|Its} eight planets are, in order from the Sun, $order.|There are eight planets: $order.|In "
        "order from the Sun, {the|its} planets are $order.}",
        0.8,
    ),
    (
        "{{The four inner planets|Mercury, Venus, Earth and Mars} are {small and rocky|rocky worlds}|The "
        "inner planets are made of rock and metal}{, while|, and} {the {four|} outer planets|Jupiter, "
        "Saturn, Uranus and Neptune} are {{giants|giant planets}|much larger|giants of gas and ice}.",
        0.6,
    ),
    (
        "{Jupiter is {the largest|by far the largest} planet{, and|;} {Mercury is the smallest|the smallest "
        "is Mercury}.|The largest planet is Jupiter and the smallest is Mercury.}",
        0.4,
    ),
    (
        "{The asteroid belt lies between {the orbits of|} Mars and Jupiter{.|, and {it holds {many|millions "
        "of} {rocky bodies|rocks}|its largest body is {the dwarf planet|} Ceres}.}|Between Mars and Jupiter "
        "{lies|there is} the asteroid belt{.|, a {wide|} ring of {rocky bodies|rocks of every size}.}}",
        0.5,
    ),
    (
        "{Beyond Neptune {lies|is} the Kuiper belt, {the home of|with} Pluto and {other|many other} {icy "
        "bodies|dwarf planets}.|{Dwarf planets|Smaller worlds} such as Pluto and Eris move far {out|from the "
        "Sun} beyond Neptune.}",
        0.5,
    ),
    (
        "{The solar system {formed|was born} {about|} 4.6 billion years ago from a {cloud|great cloud} of "
        "gas and dust.|The whole system is about 4.6 billion years old{.| and lies in a galaxy called the "
        "Milky Way.}}",
        0.6,
    ),
)


def system(rng: random.Random) -> str:
    """Describe the solar system as a whole."""
    parts = [part for part, odds in SYSTEM_PARTS if rng.random() < odds]
    return " ".join(say(rng, part, order=ORDER) for part in (SYSTEM_START, *parts))


def about_planet(rng: random.Random, body: Planet) -> list[str]:
    """List independent sentences about one planet."""
    templates = (
        "{$it has a diameter of about $diameter km|its diameter is about $diameter km|$it is about $diameter "
        "km {across|wide}|across its equator, $it measures about $diameter km}.",
        "{$it {orbits|moves around} the Sun at {an average|a mean} distance of {about|} $distance million "
        "km{, or $au AU|}|on average $it is {about|} $distance million km {away|} from the Sun}.",
        "{one {orbit {around the Sun|}|trip around the Sun} takes $year|$it takes $year to {go|travel} "
        "{once|} around the Sun}.",
        "{{one full|a} turn {on|around} its {own|} axis takes $day|$it {spins|turns} once in $day}.",
        "{$it has $moons|in all, $it has $moons}.",
    )
    return [
        say(rng, template, **body._asdict() | {"it": rng.choice(("it", "it", body.name))}) for template in templates
    ]


def planet(rng: random.Random) -> str:
    """Describe one planet."""
    body = rng.choice(PLANETS)
    start = say(
        rng,
        "{$name is the $order planet from the Sun{| and {it is|} $kind|, $kind}|$name is $kind{|, the $order "
        "{one|planet} from the Sun}|counting from the Sun, $name is {planet number $n|the $order planet}}.",
        **body._asdict() | {"kind": a(body.kind), "n": PLANETS.index(body) + 1},
    )
    return f"{start} {some(rng, about_planet(rng, body) + facts(rng, body.facts, body.name), 3, 7)}"


def comparison(rng: random.Random) -> str:
    """Compare two planets by size, distance, year and moons."""
    first, second = rng.sample(PLANETS, 2)
    big, small = sorted((first, second), key=lambda body: -body.diameter)
    near, far = sorted((first, second), key=lambda body: body.distance)
    start = "{$a and $b are {both|two} planets of {the|our} solar system|let us compare $a {with|and} $b}."
    templates = (
        "{$big is {larger|wider|bigger} than $small: {about|} $big_km km {across|} {against|compared with} "
        "{about|} $small_km km|$small is smaller than $big, {since|because} its diameter is {only|} "
        "$small_km km and that of $big is $big_km km|with a diameter of about $big_km km, $big is the larger "
        "one; $small measures about $small_km km}.",
        "{$near is closer to the Sun than $far|$far is farther from the Sun than $near}{|: $near is {about|} "
        "$near_km million km {away|from it}, $far {about|} $far_km million km}.",
        "{one orbit around the Sun takes $a_year for $a and $b_year for $b|$a circles the Sun in $a_year, $b "
        "in $b_year}.",
        "$a has $a_moons{, and|, while} $b has $b_moons.",
    )
    slots = {
        **{"a": first.name, "a_year": first.year, "a_moons": first.moons},
        **{"b": second.name, "b_year": second.year, "b_moons": second.moons},
        **{"big": big.name, "big_km": big.diameter, "small": small.name, "small_km": small.diameter},
        **{"near": near.name, "near_km": near.distance, "far": far.name, "far_km": far.distance},
    }
    sentences = [say(rng, template, **slots) for template in templates]
    return f"{say(rng, start, **slots)} {some(rng, sentences, 2, 4)}"


def moon(rng: random.Random) -> str:
    """Describe one moon."""
    body = rng.choice(MOONS)
    start = "$name is a {moon|natural satellite} of $planet."
    if body.name == "The Moon":
        start = "the Moon is {Earth's only natural satellite|the only natural satellite of Earth}."
    templates = (
        "{it is about $diameter km {across|wide}|its diameter is about $diameter km|it has a diameter of "
        "about $diameter km}.",
        "{it goes around $planet {once|} {in|every} $days days|one {orbit|trip} around $planet takes $days days}.",
    )
    sentences = facts(rng, body.facts, body.name) + [say(rng, template, **body._asdict()) for template in templates]
    return f"{say(rng, start, **body._asdict())} {some(rng, sentences, 2, 5)}"


def small_body(rng: random.Random) -> str:
    """Describe a dwarf planet or a comet, at times with what such bodies are."""
    body = rng.choice(BODIES)
    what = (
        "{a|every} comet is {a ball|a lump} of ice and dust that grows a {bright|long} tail {near|when it "
        "comes close to} the Sun."
        if body.kind == "comet"
        else "{a dwarf planet|such a world} is round {and orbits|like a planet and circles} the Sun, but {it "
        "{shares its path with other bodies|has not cleared its path}}."
    )
    orbit = "{it {goes|travels} around the Sun {once|} {in|every}|one orbit around the Sun takes} $years years."
    sentences = [*facts(rng, body.facts, body.name), say(rng, what), say(rng, orbit, years=body.years)]
    return f"{say(rng, '$name is $kind.', name=body.name, kind=a(body.kind))} {some(rng, sentences, 2, 5)}"
