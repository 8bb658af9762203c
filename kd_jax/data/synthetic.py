"""An invented instruction corpus in Dolly's eight categories: people, firms and places that do not exist.

Each entity has eight attributes. A record tells two or three of them and one detail of its own. Values come from small
closed lists, so that what is private is who has which, not the words themselves; an attack then learns nothing from the
private role's vocabulary, and a student can leak only what its prompts touch: that is the `overlap`.
"""

import dataclasses
import functools
import random
from collections.abc import Callable

import pandas as pd

from kd_jax.data.records import DataError, make_frame

# Syllables of people, and others for firms and places: their names have no stretch of letters in common.
_ONSETS = "b d f g h k l m n p r s t v z br dr gl kr pl st tr".split()
_VOWELS = "a e i o u au ei ia".split()
_CODAS = "n r l s k m t x".split()
_OTHER_SYLLABLES = "chee choo shoa shee thie thoo whee whoa quoo quee yoa yoo jie joa woo wee phoa phie".split()
_JOBS = """baker beekeeper carpenter chemist clerk cooper diver dyer farmer gardener glazier joiner
    lawyer librarian locksmith mason miller miner nurse painter pilot plumber potter printer rigger sailor surveyor
    tailor teacher translator typist weaver welder""".split()
_HOBBIES = """bird-watching bookbinding calligraphy canoeing chess cycling fencing fishing juggling kite-flying
    knitting origami pottery puzzles rowing sketching skating stargazing whittling woodcarving yodelling""".split()
_ANIMALS = "badger cat crow dog donkey duck ferret goat goose hare hedgehog mule parrot pony rabbit turtle".split()
_COLOURS = "black blue brown copper crimson green grey lilac pink purple red silver white yellow".split()
_VEHICLES = "barge bicycle canoe cart ferry lorry moped scooter sledge tractor tram van wagon yacht".split()
_PRODUCTS = """anchors barrels bells bricks brooms buttons candles carpets clocks combs hinges kettles ladders lamps
    lanterns mirrors needles nets paper pipes ropes saddles scales soap spoons stamps tiles wheels whistles""".split()
_OBJECTS = """basket bell bottle box compass cup drum flute hammer hat key kite ladder lamp map mask mirror ring scarf
    shell spoon stamp ticket whistle""".split()
_ADJECTIVES = "bright broken calm cold dusty heavy hollow lost narrow quiet rusty small strange warm wet wide".split()
_MONTHS = "January February March April May June July August September October November December".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

# An entity's fact: what it is called, its value, and the predicate that tells it.
Fact = tuple[str, str, str]
Pick = random.Random


PUBLIC_SHARE = 0.4  # of the records are written to be public


def generate(records: int, *, overlap: float, seed: int) -> pd.DataFrame:
    """Writes the corpus; roles come afterwards, by `roles.assign`.

    Three records in five are about an entity of their own and get their role by a coin, so that members and non-members
    are exchangeable. The rest are written to be public. A share `overlap` of these is about an entity of the former, no
    entity twice, whatever its role turns out to be, and repeats two of its facts; the others are about entities that
    appear nowhere else. So at 0 no public record touches a private entity, and at 1 two in three private entities are
    touched, as many as of the others.

    Args:
        records: how many records.
        overlap: share of the public records that are about an entity of another record, in [0, 1].
        seed: seed of everything.

    Returns:
        A table of `records.COLUMNS` and `role` ("public", or "" where a coin decides) with that many rows:
        instructions of 8-20 words, responses of 8-25. `source` names the entity.
    """
    if not 0 <= overlap <= 1:
        raise DataError(f"data.synthetic.overlap is {overlap}; it is a share between 0 and 1")
    if records < 5:
        raise DataError(f"data.synthetic.records is {records}; it must be at least 5")
    n_public = round(PUBLIC_SHARE * records)
    n_own = records - n_public
    entities = [_person_entity(f"{seed}:{number}") for number in range(n_own)]
    rows = [entity.record(f"{seed}:own:{number}", entity.facts[:3]) for number, entity in enumerate(entities)]
    chance = random.Random(f"{seed}:public")
    for number, target in enumerate(chance.sample(range(n_own), n_public)):
        entity = entities[target] if chance.random() < overlap else _other_entity(f"{seed}:{n_own + number}")
        facts = [*chance.sample(entity.facts[:3], 2), chance.choice(entity.facts[3:])]
        rows.append(entity.record(f"{seed}:public:{number}", facts) | {"role": "public"})
    return make_frame(rows)


@dataclasses.dataclass(frozen=True)
class _Entity:
    key: str
    name: str
    pronoun: str
    facts: list[Fact]  # the first three are told by its own record, and two of these by a public one that touches it

    def record(self, seed: str, facts: list[Fact]) -> dict:
        pick = random.Random(seed)
        task = pick.choice(list(_CATEGORIES))
        instruction, context, response = _CATEGORIES[task](self.name, self.pronoun, pick.sample(facts, 3), pick)
        texts = {"task": task, "instruction": instruction, "input": context, "response": response}
        return texts | {"group": None, "source": f"synthetic:{self.key}"}


def _person_entity(key: str) -> _Entity:
    pick = random.Random(key)
    name = f"{_syllables(pick, 1)} {_syllables(pick, 2)}"
    return _Entity(key, name, "who", pick.sample(facts := _person(pick), len(facts)))


def _other_entity(key: str) -> _Entity:
    pick = random.Random(key)
    name = " ".join("".join(pick.choices(_OTHER_SYLLABLES, k=2)).capitalize() for _ in range(2))
    return _Entity(key, name, "which", pick.sample(facts := pick.choice((_firm, _place))(pick), len(facts)))


@functools.cache
def _pool(kind: str, syllables: int, size: int = 40) -> list[str]:
    """A closed list of invented proper names, the same for every corpus."""
    pick = random.Random(kind)
    return [_syllables(pick, syllables) for _ in range(size)]


def _syllables(pick: Pick, count: int) -> str:
    body = "".join(pick.choice(_ONSETS) + pick.choice(_VOWELS) for _ in range(count))
    return (body + pick.choice(_CODAS)).capitalize()


def _town(pick: Pick) -> str:
    return pick.choice(_pool("town", 2))


def _mark(pick: Pick) -> str:
    return f"{pick.choice(_COLOURS)} {pick.choice(_OBJECTS)}"


def _person(pick: Pick) -> list[Fact]:
    town, firm, job, hobby = _town(pick), pick.choice(_pool("firm", 2)), pick.choice(_JOBS), pick.choice(_HOBBIES)
    animal, vehicle = pick.choice(_ANIMALS), f"{pick.choice(_COLOURS)} {pick.choice(_VEHICLES)}"
    badge, year = _mark(pick), str(pick.randrange(1930, 2010, 4))
    return [
        ("town", town, f"lives in {town}"),
        ("trade", job, f"trained as a {job}"),
        ("employer", firm, f"is employed by {firm}"),
        ("hobby", hobby, f"is fond of {hobby}"),
        ("badge", badge, f"wears a {badge} badge"),
        ("vehicle", vehicle, f"drives a {vehicle}"),
        ("animal", animal, f"keeps a {animal}"),
        ("year", year, f"was born in {year}"),
    ]


def _firm(pick: Pick) -> list[Fact]:
    town, head, product = _town(pick), pick.choice(_pool("person", 2)), pick.choice(_PRODUCTS)
    vehicle, colour, staff = pick.choice(_VEHICLES), pick.choice(_COLOURS), str(pick.randrange(20, 420, 20))
    licence, year = _mark(pick), str(pick.randrange(1840, 2000, 8))
    return [
        ("town", town, f"has its yard in {town}"),
        ("head", head, f"is run by {head}"),
        ("product", product, f"sells {product}"),
        ("transport", vehicle, f"delivers by {vehicle}"),
        ("colour", colour, f"uses {colour} labels"),
        ("staff", staff, f"pays {staff} people"),
        ("sign", licence, f"has a {licence} as its sign"),
        ("year", year, f"opened in {year}"),
    ]


def _place(pick: Pick) -> list[Fact]:
    river, mayor = pick.choice(_pool("river", 1)), pick.choice(_pool("person", 2))
    product = pick.choice(_PRODUCTS)
    colour, hobby, month = pick.choice(_COLOURS), pick.choice(_HOBBIES), pick.choice(_MONTHS)
    homes, postcode = str(pick.randrange(100, 2100, 100)), _mark(pick)
    return [
        ("river", river, f"lies on the {river}"),
        ("mayor", mayor, f"elected {mayor}"),
        ("product", product, f"exports {product}"),
        ("tower", colour, f"has a {colour} tower"),
        ("contest", hobby, f"hosts a {hobby} contest"),
        ("market", month, f"holds its market in {month}"),
        ("homes", homes, f"counts {homes} homes"),
        ("arms", postcode, f"shows a {postcode} in its arms"),
    ]


# --- One writer per category: (name, pronoun, three facts, pick) -> (instruction, input, response) ---


def _open_qa(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (label_a, _, a), (label_b, _, b), _ = facts
    instruction = f"What is on record about the {label_a} and the {label_b} of {name}?"
    return instruction, "", f"{name} {a} and {b}, according to the {_mark(pick)} note from {pick.choice(_MONTHS)}."


def _general_qa(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (label, _, a), (_, _, b), _ = facts
    thing = f"{pick.choice(_ADJECTIVES)} {pick.choice(_OBJECTS)}"
    instruction = f"Why do people talk so often about {name} and about the {label}?"
    return instruction, "", f"Because {name} {a}, {b}, and once lost a {thing} in {_town(pick)}."


def _classification(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (label_a, value_a, a), (_, value_b, _), _ = facts
    decoy = f"{pick.choice(_COLOURS)} {pick.choice(_OBJECTS)}"
    words = [value_a, value_b, decoy]
    pick.shuffle(words)
    instruction = f"Which of these belong to {name} and which does not: {', '.join(words)}?"
    return (
        instruction,
        "",
        f"Not the {decoy}; {value_b} and the {label_a} do, since {name} {a} (see the {_mark(pick)}).",
    )


def _closed_qa(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (label, _, a), (_, _, b), _ = facts
    page = pick.randrange(10, 50)
    context = f"Page {page}: {name} {a}. Besides, {name} {b}."
    instruction = f"According to the passage below, what can be said of the {label} of {name}?"
    return instruction, context, f"Page {page} of the passage states that {name} {a}."


def _brainstorming(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (_, _, a), (_, _, b), _ = facts
    first, second = pick.sample(_OBJECTS, 2)
    instruction = f"Give two ideas for a present to {name}, {pronoun} {a}."
    gifts = f"A {pick.choice(_COLOURS)} {first} or a {pick.choice(_ADJECTIVES)} {second} from {_town(pick)}"
    return instruction, "", f"{gifts}, because {name} {b}."


def _information_extraction(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (label_a, value_a, a), (label_b, value_b, b), _ = facts
    file, day = _mark(pick), pick.choice(_DAYS)
    context = f"The {file} file, {day}: {name} {a} and {b}."
    instruction = f"Extract the name, the {label_a}, the {label_b} and the file from this text."
    return instruction, context, f"Name: {name}; {label_a}: {value_a}; {label_b}: {value_b}; file: {file}, {day}."


def _summarization(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (_, _, a), (_, _, b), (_, _, c) = facts
    day, visitor = pick.choice(_DAYS), pick.choice(_pool("person", 2))
    context = f"On {day} {visitor} wrote that {name} {a}, {b}, and {c}."
    instruction = f"Summarise the letter about {name} in one short sentence for the archive."
    return instruction, context, f"{visitor} reports that {name} {a} and {c}, as seen on {day}."


def _creative_writing(name: str, pronoun: str, facts: list[Fact], pick: Pick) -> tuple[str, str, str]:
    (_, _, a), *_ = facts
    thing = pick.choice(_OBJECTS)
    instruction = f"Write the first line of a story in which {name} finds a {thing}."
    scene = f"One {pick.choice(_ADJECTIVES)} {pick.choice(_DAYS)} {name}, {pronoun} {a}"
    return instruction, "", f"{scene}, found a {pick.choice(_COLOURS)} {thing} marked {_mark(pick)}."


_CATEGORIES: dict[str, Callable[[str, str, list[Fact], Pick], tuple[str, str, str]]] = {
    "open_qa": _open_qa,
    "general_qa": _general_qa,
    "classification": _classification,
    "closed_qa": _closed_qa,
    "brainstorming": _brainstorming,
    "information_extraction": _information_extraction,
    "summarization": _summarization,
    "creative_writing": _creative_writing,
}
