"""Paragraphs of the training text about everything but the solar system, for breadth."""

import random

from tiny_facts import ANIMALS, CITIES, COUNTRIES, ELEMENTS, MOUNTAINS, PEOPLE, RIVERS, THINGS
from tiny_grammar import a, facts, say, some


def element(rng: random.Random) -> str:
    """Describe a chemical element, or two of them."""
    return " ".join(
        say(
            rng,
            "{$name is {$kind|a chemical element} with the symbol $symbol{ and the {atomic number|number} "
            "$number|}|the {chemical|} symbol of $lower is $symbol{, and its atomic number is "
            "$number|}|$name, {written as|with the symbol} $symbol, is {$kind|element number $number}}. {It "
            "is {used|often used|useful} $use.|} {At room temperature it is a $state.|Its nucleus holds "
            "$protons.|}",
            **item._asdict() | {"kind": a(item.kind), "lower": item.name.lower()},
            protons=f"{item.number} protons" if item.number > 1 else "one proton",
        )
        for item in rng.sample(ELEMENTS, rng.choice((1, 2)))
    )


def country(rng: random.Random) -> str:
    """Describe a country, or two of them."""
    paragraphs = []
    for item in rng.sample(COUNTRIES, rng.choice((1, 1, 2))):
        start = (
            "{$name is a country in $continent{, and its capital is $capital|. {Its|The} capital is "
            "$capital| whose capital is $capital}|the capital of $name{, a country in $continent,|} is "
            "$capital|$capital is the capital of $name{, {a country|} in $continent|}}."
        )
        templates = (
            "{People there|Many people there} speak $language{, and they pay with the $currency|}.",
            "{The {country|land}|$name|It} $fact.",
            "The {currency|money} {there|} is {called|} the $currency.",
        )
        slots = item._asdict()
        sentences = [say(rng, template, **slots) for template in templates]
        paragraphs.append(f"{say(rng, start, **slots)} {some(rng, sentences, 1, 3)}")
    return " ".join(paragraphs)


def animal(rng: random.Random) -> str:
    """Describe an animal."""
    body = rng.choice(ANIMALS)
    templates = ("it {eats|feeds on|lives on} $food.", "it {lives|is found|can be found} $home.")
    slots = body._asdict() | {"kind": a(body.kind)}
    sentences = facts(rng, body.facts) + [say(rng, template, **slots) for template in templates]
    return f"{say(rng, '$name is $kind.', **slots)} {some(rng, sentences, 2, 4)}"


def river(rng: random.Random) -> str:
    """Describe a river and compare it with another."""
    (name, size, place, end), (other, other_size, _, other_end) = rng.sample(RIVERS, 2)
    return say(
        rng,
        "{the $name is a river in $place{, and it|. It} {ends in|flows into} $end|the $name flows into "
        "$end}. {It is {about|} $size km long|Its length is about $size km}{, $more than the $other{|, which "
        "measures $other_size km}|}. {The $other {flows into|ends in} $other_end.|}",
        **{"name": name, "size": size, "place": place, "end": end},
        **{"other": other, "other_size": other_size, "other_end": other_end},
        more="longer" if size > other_size else "shorter",
    )


def mountain(rng: random.Random) -> str:
    """Describe a mountain and compare it with another."""
    (name, size, place), (other, other_size, other_place) = rng.sample(MOUNTAINS, 2)
    return say(
        rng,
        "{$name stands $place and {rises to|is} $size m|$name, {which stands|} $place, is $size m high}. "
        "{$other_name, $other_place,|$other_name} is $more{|: it {rises to|reaches} $other_size m}. {The "
        "difference is $gap m.|}",
        **{"name": name, "size": size, "place": place, "gap": abs(size - other_size)},
        **{"other_name": say(rng, other), "other_place": other_place, "other_size": other_size},
        more="higher" if other_size > size else "lower",
    )


def weather(rng: random.Random) -> str:
    """Report the weather of a day in a city."""
    city, coldest, warmest = rng.choice(CITIES)
    low = rng.randint(coldest, warmest)
    high = low + rng.randint(3, 10)
    sky = rng.choice(("❄️ snow", "☁️ clouds") if high < 2 else ("☀️ sunshine", "🌧️ rain", "☁️ clouds", "🌈 showers"))
    advice = (
        "Take a warm coat." if high < 8 else "A light jacket is enough." if high < 20 else "Remember to drink water."
    )
    return say(
        rng,
        "{{weather for|today in} $city: $sky, {between $low °C and $high °C|up to $high °C, at night $low "
        "°C}.|in $city {it is|we have} $low °C {in the morning|at sunrise} and $high °C {in the "
        "afternoon|after lunch}, with $sky.} {The wind {blows|comes} from the {north|south|east|west} at "
        "$wind km/h.|} {$advice{ 😊|}|}",
        **{"city": city, "sky": sky, "low": low, "high": high, "wind": rng.randint(1, 12) * 5, "advice": advice},
    )


def sums(rng: random.Random) -> str:
    """Tell a small problem of addition, subtraction or multiplication and solve it."""
    less, more, times = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 9)
    x, y = max(less, more) + 1, min(less, more)
    who, other = rng.sample(PEOPLE, 2)
    template = rng.choice(
        (
            "$who has $x $thing and {gets|finds|buys} $y more{ from $other|}. {Now|Together} that makes $x + "
            "$y = $plus{|, so $who has $plus $thing}.",
            "$who had $x $thing and gave $y {of them|} to $other. That leaves $x - $y = $minus{|, so $who "
            "keeps $minus $thing}.",
            "{there are|$who {counts|fills}} $times boxes {and each one holds $x $thing|with $x $thing in "
            "each}. {In all|Together} that makes $times × $x = $product $thing.",
            "$x + $y = $plus, {and|while} $x - $y = $minus. {Also,|And} $times × $x = $product.",
        )
    )
    return say(
        rng,
        template,
        **{"who": who, "other": other, "thing": rng.choice(THINGS), "x": x, "y": y, "times": times},
        **{"plus": x + y, "minus": x - y, "product": times * x},
    )


def story(rng: random.Random) -> str:
    """Tell a small story of everyday life."""
    who, other = rng.sample(PEOPLE, 2)
    slots = {"who": who, "other": other, "city": rng.choice(CITIES)[0], "thing": rng.choice(THINGS)}
    parts = (
        "{one {rainy|sunny|cold|quiet} {morning|evening|afternoon}|last {week|Sunday|summer|winter}}, $who "
        "{walked to|took the train to|went back to|waited near} {the market|the library|the old café|the "
        "station|the park}{ in $city|}.",
        "{There|On the way} $who {met $other|saw $other|heard music|found a {lost|red|wet} "
        "{umbrella|dog|letter|hat}|bought {some|a bag of} $thing}.",
        '{"{What a {lovely|strange|long} day|I am so {happy|tired|hungry}|Look at {the sky|those '
        'clouds|this}}!" {said|cried|thought} {$who|$other}.|{Then|Soon} it {began to {rain|snow}|grew '
        "{dark|cold}}{, so they|, and they} {went inside|hurried home|drank {tea|hot chocolate|coffee} ☕}.}",
        "{{In the end|At last|Later} {$who|they} {went home|slept well|wrote it all down|told {everyone|the "
        "children} about it}.|{It|That} was a {good|fine|very good} day. 🙂|$who {smiled|laughed} and said "
        "{goodbye|good night}.}",
    )
    return " ".join(say(rng, part, **slots) for part in parts)
