"""Fact tables behind the training text of the tiny checkpoint; a `facts` entry completes "It ..."."""

from typing import NamedTuple


class Planet(NamedTuple):
    """One of the eight planets: diameter in km (equatorial), mean distance in million km and in AU."""

    name: str
    order: str
    kind: str
    diameter: int
    distance: float
    au: float
    year: str
    day: str
    moons: str
    facts: tuple[str, ...]


class Moon(NamedTuple):
    """A natural satellite: diameter in km, time of one orbit in days."""

    name: str
    planet: str
    diameter: int
    days: float
    facts: tuple[str, ...]


class Body(NamedTuple):
    """A dwarf planet or a comet: what it is, one orbit around the Sun in years, and facts."""

    name: str
    kind: str
    years: str
    facts: tuple[str, ...]


class Element(NamedTuple):
    """A chemical element; `use` completes "It is used ..."."""

    name: str
    symbol: str
    number: int
    kind: str
    state: str
    use: str


class Country(NamedTuple):
    """A country with its capital, an official language, its currency and a fact."""

    name: str
    capital: str
    continent: str
    language: str
    currency: str
    fact: str


class Animal(NamedTuple):
    """An animal with an indefinite article; `food` completes "It eats ...", `home` "It lives ..."."""

    name: str
    kind: str
    food: str
    home: str
    facts: tuple[str, ...]


# Tables read best a row at a time.
# fmt: off
PLANETS = (
    Planet("Mercury", "first", "rocky planet", 4880, 57.9, 0.39, "88 days", "59 Earth days", "no moons",
        ("is the smallest of the eight planets", "is the planet closest to the Sun",
        "has a grey surface covered with craters", "has almost no air to keep the heat",
        "can reach 430 °C by day and fall to -180 °C at night",
        "moves around the Sun faster than any other planet")),
    Planet("Venus", "second", "rocky planet", 12100, 108.2, 0.72, "225 days", "243 Earth days", "no moons",
        ("is the hottest planet, with a surface of about 465 °C",
        "is wrapped in thick clouds of sulfuric acid",
        "has a dense atmosphere of carbon dioxide that traps heat",
        "spins backwards compared with most planets",
        "is the brightest planet in our sky", "is almost as large as Earth")),
    Planet("Earth", "third", "rocky planet", 12760, 149.6, 1.0, "365 days", "24 hours", "one moon",
        ("is the only place where we know that life exists",
        "has oceans that cover about 71% of its surface",
        "has an atmosphere made mostly of nitrogen and oxygen",
        "is the largest of the four rocky planets",
        "has seasons because its axis is tilted by about 23 degrees")),
    Planet("Mars", "fourth", "rocky planet", 6790, 227.9, 1.52, "687 days", "about 24.6 hours", "two moons",
        ("is called the Red Planet because of the iron oxide in its soil",
        "has two small moons, Phobos and Deimos",
        "has a thin atmosphere of carbon dioxide",
        "has the tallest volcano in the solar system, Olympus Mons",
        "has polar caps of ice", "has been explored by rovers such as Curiosity and Perseverance")),
    Planet("Jupiter", "fifth", "gas giant", 143000, 778.5, 5.2, "about 12 years", "about 10 hours",
        "more than 90 moons",
        ("is the largest planet in the solar system", "has a giant storm called the Great Red Spot",
        "is made mostly of hydrogen and helium", "is heavier than all the other planets together",
        "has four large moons, Io, Europa, Ganymede and Callisto",
        "has the shortest day of all the planets")),
    Planet("Saturn", "sixth", "gas giant", 120500, 1434.0, 9.58, "about 29 years", "about 10.7 hours",
        "more than 140 moons",
        ("is famous for its bright rings of ice and rock", "is the second largest planet",
        "is less dense than water", "is made mostly of hydrogen and helium",
        "has a large moon called Titan with a thick atmosphere",
        "has more known moons than any other planet")),
    Planet("Uranus", "seventh", "ice giant", 51100, 2871.0, 19.2, "84 years", "about 17 hours",
        "at least 28 moons",
        ("spins on its side, with an axis tilted by about 98 degrees",
        "was discovered in 1781 by William Herschel",
        "looks blue-green because of the methane in its atmosphere",
        "has the coldest atmosphere of the planets, down to -224 °C",
        "has thin dark rings", "has large moons called Titania and Oberon")),
    Planet("Neptune", "eighth", "ice giant", 49500, 4495.0, 30.1, "165 years", "about 16 hours",
        "at least 16 moons",
        ("is the planet farthest from the Sun",
        "has the fastest winds in the solar system, above 2,000 km/h",
        "was discovered in 1846 with the help of mathematics", "has a deep blue colour",
        "has a large moon called Triton that orbits backwards",
        "was visited by only one spacecraft, Voyager 2, in 1989")),
)

MOONS = (
    Moon("The Moon", "Earth", 3475, 27.3, ("is about 384,400 km away from us",
        "always shows us the same side",
        "causes most of the tides in the oceans", "was first visited by people in 1969, with Apollo 11")),
    Moon("Phobos", "Mars", 22, 0.3, ("is the larger of the two moons of Mars",
        "has a big crater called Stickney",
        "slowly comes closer to Mars")),
    Moon("Deimos", "Mars", 12, 1.3, ("is the smaller of the two moons of Mars", "has an irregular shape")),
    Moon("Io", "Jupiter", 3640, 1.8, ("has more active volcanoes than any other moon",
        "is yellow from sulfur",
        "is squeezed and heated by the tides of Jupiter")),
    Moon("Europa", "Jupiter", 3120, 3.6, ("has a smooth shell of ice",
        "probably hides an ocean of salt water under its ice",
        "is a little smaller than our own Moon")),
    Moon("Ganymede", "Jupiter", 5270, 7.2, ("is the largest moon in the solar system",
        "is larger than the planet Mercury",
        "is the only moon with a magnetic field of its own")),
    Moon("Callisto", "Jupiter", 4820, 16.7, ("is covered with very old craters",
        "is almost as large as Mercury")),
    Moon("Titan", "Saturn", 5150, 15.9, ("has a thick atmosphere made mostly of nitrogen",
        "has lakes of liquid methane",
        "was reached by the Huygens probe in 2005")),
    Moon("Enceladus", "Saturn", 504, 1.4, ("sprays water from cracks near its south pole",
        "has a bright surface of clean ice")),
    Moon("Mimas", "Saturn", 396, 0.9, ("has a huge crater called Herschel", "is a small world of ice")),
    Moon("Rhea", "Saturn", 1530, 4.5, ("is the second largest moon of Saturn", "is made of ice and rock")),
    Moon("Iapetus", "Saturn", 1470, 79.3, ("has one dark side and one bright side",
        "has a tall ridge along its equator")),
    Moon("Titania", "Uranus", 1580, 8.7, ("is the largest moon of Uranus",
        "has long valleys on its surface")),
    Moon("Oberon", "Uranus", 1520, 13.5, ("is the second largest moon of Uranus",
        "was discovered by William Herschel in 1787")),
    Moon("Miranda", "Uranus", 472, 1.4, ("has cliffs that are among the tallest known",
        "has a surface that looks like a patchwork")),
    Moon("Triton", "Neptune", 2710, 5.9, ("moves around its planet backwards",
        "is the largest moon of Neptune",
        "has geysers of nitrogen")),
)

BODIES = (
    Body("Pluto", "dwarf planet in the Kuiper belt", "248", ("was discovered in 1930 by Clyde Tombaugh",
        "has five moons",
        "has a large moon called Charon", "was called a planet until 2006", "is about 2,380 km across",
        "was visited by the New Horizons spacecraft in 2015")),
    Body("Ceres", "dwarf planet in the asteroid belt", "4.6", ("is the largest object in the asteroid belt",
        "was discovered in 1801 by Giuseppe Piazzi", "is about 940 km across",
        "was visited by the Dawn spacecraft in 2015")),
    Body("Eris", "dwarf planet far beyond Neptune", "about 560", ("has a moon called Dysnomia",
        "was discovered in 2005",
        "is slightly smaller than Pluto but heavier")),
    Body("Haumea", "dwarf planet in the Kuiper belt", "about 284", ("has the shape of an egg",
        "has two moons",
        "spins once in about four hours")),
    Body("Makemake", "dwarf planet in the Kuiper belt", "about 306", ("was discovered in 2005",
        "is about 1,430 km across",
        "has a reddish surface")),
    Body("Halley's Comet", "comet", "about 76", ("was last seen from Earth in 1986", "will return in 2061",
        "is named after Edmond Halley")),
    Body("Encke's Comet", "comet", "3.3", ("has one of the shortest orbits of all known comets",
        "causes the Taurid meteors")),
    Body("Comet 67P", "comet", "6.4", ("was studied by the Rosetta spacecraft",
        "has the shape of a rubber duck",
        "was reached by the lander Philae in 2014")),
)

ELEMENTS = (
    Element("Hydrogen", "H", 1, "nonmetal", "gas", "in fuel cells and as rocket fuel"),
    Element("Helium", "He", 2, "noble gas", "gas", "to fill balloons and to cool magnets"),
    Element("Lithium", "Li", 3, "metal", "solid", "in rechargeable batteries"),
    Element("Carbon", "C", 6, "nonmetal", "solid", "in pencils, steel and plastics"),
    Element("Nitrogen", "N", 7, "nonmetal", "gas", "to make fertiliser and to keep food fresh"),
    Element("Oxygen", "O", 8, "nonmetal", "gas", "in hospitals and to burn fuel"),
    Element("Fluorine", "F", 9, "nonmetal", "gas", "to make toothpaste and non-stick pans"),
    Element("Neon", "Ne", 10, "noble gas", "gas", "in bright red signs"),
    Element("Sodium", "Na", 11, "metal", "solid", "in street lamps and, with chlorine, as table salt"),
    Element("Magnesium", "Mg", 12, "metal", "solid", "in light alloys and fireworks"),
    Element("Aluminium", "Al", 13, "metal", "solid", "in aircraft, cans and foil"),
    Element("Silicon", "Si", 14, "metalloid", "solid", "in computer chips and solar cells"),
    Element("Phosphorus", "P", 15, "nonmetal", "solid", "in fertilisers and matches"),
    Element("Sulfur", "S", 16, "nonmetal", "solid", "to make sulfuric acid and rubber"),
    Element("Chlorine", "Cl", 17, "nonmetal", "gas", "to clean water"),
    Element("Argon", "Ar", 18, "noble gas", "gas", "in lamps and for welding"),
    Element("Potassium", "K", 19, "metal", "solid", "in fertilisers"),
    Element("Calcium", "Ca", 20, "metal", "solid", "in cement, and our bones need it"),
    Element("Titanium", "Ti", 22, "metal", "solid", "in aircraft and in artificial joints"),
    Element("Iron", "Fe", 26, "metal", "solid", "to make steel for bridges and cars"),
    Element("Nickel", "Ni", 28, "metal", "solid", "in coins and stainless steel"),
    Element("Copper", "Cu", 29, "metal", "solid", "in wires and pipes"),
    Element("Zinc", "Zn", 30, "metal", "solid", "to protect steel from rust"),
    Element("Silver", "Ag", 47, "metal", "solid", "in jewellery and mirrors"),
    Element("Tin", "Sn", 50, "metal", "solid", "in solder and bronze"),
    Element("Iodine", "I", 53, "nonmetal", "solid", "to clean wounds"),
    Element("Tungsten", "W", 74, "metal", "solid", "in drills and old light bulbs"),
    Element("Gold", "Au", 79, "metal", "solid", "in jewellery and electronics"),
    Element("Mercury", "Hg", 80, "metal", "liquid", "in old thermometers"),
    Element("Lead", "Pb", 82, "metal", "solid", "in car batteries"),
    Element("Uranium", "U", 92, "metal", "solid", "as fuel in nuclear power stations"),
)

COUNTRIES = (
    Country("France", "Paris", "Europe", "French", "euro",
        "is known for its bread, cheese and the Eiffel Tower"),
    Country("Germany", "Berlin", "Europe", "German", "euro", "borders nine other countries"),
    Country("Spain", "Madrid", "Europe", "Spanish", "euro", "shares a peninsula with Portugal"),
    Country("Portugal", "Lisbon", "Europe", "Portuguese", "euro", "lies on the Atlantic coast"),
    Country("Italy", "Rome", "Europe", "Italian", "euro", "has the shape of a boot"),
    Country("Greece", "Athens", "Europe", "Greek", "euro", "has thousands of islands"),
    Country("Austria", "Vienna", "Europe", "German", "euro", "is crossed by the Alps"),
    Country("Switzerland", "Bern", "Europe", "German", "Swiss franc", "has four national languages"),
    Country("Poland", "Warsaw", "Europe", "Polish", "złoty", "lies on the Baltic Sea"),
    Country("Sweden", "Stockholm", "Europe", "Swedish", "krona", "is covered mostly by forest"),
    Country("Norway", "Oslo", "Europe", "Norwegian", "krone", "has a coast full of fjords"),
    Country("Finland", "Helsinki", "Europe", "Finnish", "euro", "has more than 100,000 lakes"),
    Country("Iceland", "Reykjavík", "Europe", "Icelandic", "króna", "has volcanoes, geysers and glaciers"),
    Country("Ireland", "Dublin", "Europe", "English", "euro", "is called the Emerald Isle"),
    Country("Hungary", "Budapest", "Europe", "Hungarian", "forint", "is crossed by the Danube"),
    Country("Romania", "Bucharest", "Europe", "Romanian", "leu",
        "has the Carpathian Mountains in its middle"),
    Country("Moldova", "Chișinău", "Europe", "Romanian", "leu", "is known for its wine"),
    Country("Turkey", "Ankara", "Asia", "Turkish", "lira", "lies on two continents"),
    Country("Japan", "Tokyo", "Asia", "Japanese", "yen", "is made up of thousands of islands"),
    Country("China", "Beijing", "Asia", "Chinese", "yuan", "built the Great Wall"),
    Country("India", "New Delhi", "Asia", "Hindi", "rupee", "has more people than any other country"),
    Country("Thailand", "Bangkok", "Asia", "Thai", "baht", "is known for its temples and beaches"),
    Country("Vietnam", "Hanoi", "Asia", "Vietnamese", "đồng", "has a long coast on the South China Sea"),
    Country("Mongolia", "Ulaanbaatar", "Asia", "Mongolian", "tögrög", "has wide grasslands and few people"),
    Country("Nepal", "Kathmandu", "Asia", "Nepali", "rupee", "shares Mount Everest with China"),
    Country("Indonesia", "Jakarta", "Asia", "Indonesian", "rupiah", "has more than 17,000 islands"),
    Country("Egypt", "Cairo", "Africa", "Arabic", "pound", "is the home of the great pyramids"),
    Country("Kenya", "Nairobi", "Africa", "Swahili", "shilling", "is crossed by the equator"),
    Country("Ethiopia", "Addis Ababa", "Africa", "Amharic", "birr", "is where coffee was first grown"),
    Country("Ghana", "Accra", "Africa", "English", "cedi", "exports cocoa and gold"),
    Country("Senegal", "Dakar", "Africa", "French", "CFA franc",
        "is the westernmost country of the African mainland"),
    Country("Cameroon", "Yaoundé", "Africa", "French", "CFA franc", "has an active volcano near the sea"),
    Country("Morocco", "Rabat", "Africa", "Arabic", "dirham",
        "lies between the Atlantic Ocean and the Sahara"),
    Country("Canada", "Ottawa", "North America", "English", "dollar",
        "is the second largest country in the world"),
    Country("Mexico", "Mexico City", "North America", "Spanish", "peso",
        "is the home of the ancient Maya cities"),
    Country("Cuba", "Havana", "North America", "Spanish", "peso", "is the largest island of the Caribbean"),
    Country("Costa Rica", "San José", "North America", "Spanish", "colón",
        "protects about a quarter of its land"),
    Country("Brazil", "Brasília", "South America", "Portuguese", "real",
        "holds most of the Amazon rainforest"),
    Country("Argentina", "Buenos Aires", "South America", "Spanish", "peso", "is known for the tango"),
    Country("Chile", "Santiago", "South America", "Spanish", "peso", "is long and very narrow"),
    Country("Peru", "Lima", "South America", "Spanish", "sol", "is the home of Machu Picchu"),
    Country("Colombia", "Bogotá", "South America", "Spanish", "peso", "has coasts on two oceans"),
    Country("Paraguay", "Asunción", "South America", "Spanish", "guaraní", "has no coast on the sea"),
    Country("Australia", "Canberra", "Oceania", "English", "dollar", "is both a country and a continent"),
    Country("New Zealand", "Wellington", "Oceania", "English", "dollar", "has two main islands"),
    Country("Fiji", "Suva", "Oceania", "English", "dollar", "is made up of more than 300 islands"),
)

ANIMALS = (
    Animal("an elephant", "mammal", "grass, leaves and bark", "in Africa and Asia",
        ("is the largest animal on land", "uses its trunk to drink and to lift things")),
    Animal("a blue whale", "mammal", "tiny animals called krill", "in the oceans",
        ("is the largest animal that has ever lived", "breathes air at the surface")),
    Animal("a giraffe", "mammal", "leaves from tall trees", "on the plains of Africa",
        ("is the tallest animal in the world", "has a dark tongue about 45 cm long")),
    Animal("a lion", "mammal", "meat", "mostly in Africa", ("lives in groups called prides",
        "can be heard from 8 km away")),
    Animal("a tiger", "mammal", "meat", "in the forests of Asia", ("is the largest of the big cats",
        "likes to swim")),
    Animal("a bat", "mammal", "insects or fruit", "in caves and trees",
        ("is the only mammal that can truly fly", "hunts at night")),
    Animal("a kangaroo", "mammal", "grass", "in Australia", ("carries its young in a pouch",
        "moves by hopping")),
    Animal("a wolf", "mammal", "meat", "in the forests of the north", ("hunts in a pack",
        "is the ancestor of the dog")),
    Animal("a hedgehog", "mammal", "insects and worms", "in gardens and woods",
        ("rolls into a ball of spines", "sleeps through the winter")),
    Animal("a penguin", "bird", "fish", "in the southern part of the world",
        ("cannot fly but swims very well", "stands on ice and cold beaches")),
    Animal("an ostrich", "bird", "plants and seeds", "in Africa", ("is the largest living bird",
        "can run at 70 km/h")),
    Animal("an owl", "bird", "mice and small birds", "in woods and barns", ("flies almost without a sound",
        "can turn its head very far")),
    Animal("an eagle", "bird", "fish and small animals", "in mountains and near lakes",
        ("has very sharp eyes", "builds a large nest")),
    Animal("a hummingbird", "bird", "nectar", "in the Americas", ("can fly backwards",
        "beats its wings about 50 times a second")),
    Animal("a crocodile", "reptile", "fish and other animals", "in warm rivers",
        ("has lived on Earth since the time of the dinosaurs", "waits in the water without moving")),
    Animal("a tortoise", "reptile", "leaves and grass", "in warm dry places",
        ("can live for more than 100 years", "hides in its shell")),
    Animal("a chameleon", "reptile", "insects", "in the trees of Madagascar and Africa",
        ("can change its colour", "moves its eyes separately")),
    Animal("a frog", "amphibian", "insects", "near ponds", ("begins its life as a tadpole",
        "breathes partly through its skin")),
    Animal("a salmon", "fish", "small fish and insects", "in rivers and in the sea",
        ("returns to the river where it was born", "jumps up waterfalls")),
    Animal("a shark", "fish", "fish and seals", "in the sea", ("has a skeleton of cartilage",
        "grows new teeth all its life")),
    Animal("a seahorse", "fish", "tiny animals in the water", "in shallow seas", ("swims upright",
        "is unusual because the male carries the eggs")),
    Animal("a bee", "insect", "nectar and pollen", "in a hive", ("makes honey",
        "dances to tell others where flowers are")),
    Animal("an ant", "insect", "seeds and other insects", "in a nest with many others",
        ("can lift many times its own weight", "leaves a trail of scent")),
    Animal("a butterfly", "insect", "nectar", "in meadows and gardens", ("begins its life as a caterpillar",
        "tastes with its feet")),
    Animal("a spider", "arachnid", "insects", "almost everywhere on land", ("has eight legs", "makes silk")),
    Animal("an octopus", "mollusc", "crabs and shellfish", "on the floor of the sea",
        ("has three hearts and eight arms", "can squeeze through tiny holes")),
)

# name, length in km, continent, where it ends
RIVERS = (
    ("Nile", 6650, "Africa", "the Mediterranean Sea"), ("Amazon", 6400, "South America",
        "the Atlantic Ocean"),
    ("Yangtze", 6300, "Asia", "the East China Sea"), ("Mississippi", 3770, "North America",
        "the Gulf of Mexico"),
    ("Congo", 4700, "Africa", "the Atlantic Ocean"), ("Niger", 4180, "Africa", "the Gulf of Guinea"),
    ("Volga", 3530, "Europe", "the Caspian Sea"), ("Danube", 2850, "Europe", "the Black Sea"),
    ("Rhine", 1230, "Europe", "the North Sea"), ("Ganges", 2500, "Asia", "the Bay of Bengal"),
    ("Mekong", 4350, "Asia", "the South China Sea"), ("Zambezi", 2570, "Africa", "the Indian Ocean"),
    ("Loire", 1010, "Europe", "the Atlantic Ocean"), ("Thames", 346, "Europe", "the North Sea"),
)

# name, height in m, where it stands
MOUNTAINS = (
    ("Mount Everest", 8849, "between Nepal and China"), ("K2", 8611, "between Pakistan and China"),
    ("Aconcagua", 6961, "in Argentina"), ("Denali", 6190, "in Alaska"), ("Kilimanjaro", 5895, "in Tanzania"),
    ("Mont Blanc", 4806, "between France and Italy"), ("Mount Elbrus", 5642, "in Russia"),
    ("the Matterhorn", 4478, "between Switzerland and Italy"), ("Mount Fuji", 3776, "in Japan"),
    ("Ben Nevis", 1345, "in Scotland"), ("Aoraki", 3724, "in New Zealand"), ("Mount Etna", 3400, "in Sicily"),
)

# name, lowest and highest temperature that a night there is given, in °C
CITIES = (
    ("Lisbon", 8, 19), ("Oslo", -12, 12), ("Reykjavík", -6, 9), ("Zürich", -5, 14), ("Kraków", -9, 14),
    ("São Paulo", 10, 20), ("Bogotá", 6, 11), ("Montréal", -14, 16), ("Nairobi", 11, 16), ("Kyoto", 0, 23),
    ("Málaga", 8, 21), ("Göteborg", -7, 13), ("Dublin", 1, 13), ("Cairo", 9, 22), ("Lima", 14, 20),
        ("Hanoi", 13, 26),
    ("Besançon", -3, 14), ("Münster", -3, 13), ("Ålesund", -4, 11), ("Perth", 7, 19),
)
PEOPLE = ("Ana", "Ben", "Chloé", "Daniel", "Elif", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kofi",
    "Lena", "Mateo",
        "Noor", "Olga", "Priya", "René", "Sofía", "Tom", "Zoë")
THINGS = ("apples", "books", "pencils", "stamps", "marbles", "shells", "buttons", "cookies", "stickers",
    "postcards",
        "oranges", "coins")
