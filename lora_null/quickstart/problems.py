"""Arithmetic word problems with worked answers, written by a small seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_PEOPLE = (
    "Amina Boris Carla Deepak Elena Farid Grace Hugo Ines Jonas Keiko Lars Mona Nadia Omar Priya "
    "Quentin Rosa Stefan Tomoko Uma Viktor Wanda Yusuf"
).split()
_THINGS = (
    "apples books candles eggs marbles notebooks oranges pencils postcards seeds shells stamps "
    "stickers tickets tiles tomatoes walnuts yo-yos"
).split()
_BOXES = ("bags", "baskets", "boxes", "crates", "drawers", "jars", "packets", "trays")


@dataclass(frozen=True)
class Problem:
    """A word problem, its worked solution and the number that it ends in."""

    question: str
    solution: str
    result: int

    @property
    def prompt(self) -> str:
        """The question in the form that every part of the quickstart uses."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """What the model learns to write after :attr:`prompt`."""
        return f" {self.solution} The answer is {self.result}."


def word_problems(count: int, *, seed: int | str = 0) -> list[Problem]:
    """Write ``count`` different problems; the same seed gives the same list on every machine."""
    rng = random.Random(f"word problems {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = rng.choice(_KINDS)(rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def _gather(rng: random.Random) -> Problem:
    person, thing, box = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.choice(_BOXES)
    boxes, each, extra = rng.randint(3, 12), rng.randint(4, 20), rng.randint(3, 30)
    packed, total = boxes * each, boxes * each + extra
    return Problem(
        f"{person} has {boxes} {box} with {each} {thing} in each and {extra} loose {thing}. "
        f"How many {thing} does {person} have?",
        f"The {box} hold {boxes} * {each} = {packed} {thing}. "
        f"With the loose ones that is {packed} + {extra} = {total}.",
        total,
    )


def _give_away(rng: random.Random) -> Problem:
    (giver, taker), thing = rng.sample(_PEOPLE, 2), rng.choice(_THINGS)
    left, given, bought = rng.randint(5, 40), rng.randint(3, 30), rng.randint(2, 25)
    start = left + given
    end = left + bought
    return Problem(
        f"{giver} had {start} {thing}, gave {given} of them to {taker} and then bought {bought} more. "
        f"How many {thing} does {giver} have now?",
        f"After the gift {giver} had {start} - {given} = {left} {thing}. "
        f"After buying more it is {left} + {bought} = {end}.",
        end,
    )


def _share(rng: random.Random) -> Problem:
    person, thing, box = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.choice(_BOXES)
    boxes, each, kept = rng.randint(2, 9), rng.randint(3, 15), rng.randint(2, 20)
    packed, start = boxes * each, boxes * each + kept
    return Problem(
        f"{person} keeps {kept} of {start} {thing} and puts the rest into {boxes} {box}, the same number in each. "
        f"How many {thing} are in one of the {box}?",
        f"There are {start} - {kept} = {packed} {thing} to put away. "
        f"Each of the {box} gets {packed} / {boxes} = {each}.",
        each,
    )


def _pay(rng: random.Random) -> Problem:
    person, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
    count, price, rest = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 40)
    cost, purse = count * price, count * price + rest
    return Problem(
        f"{person} has {purse} coins and buys {count} {thing} for {price} coins each. "
        f"How many coins does {person} have left?",
        f"The {thing} cost {count} * {price} = {cost} coins. There are {purse} - {cost} = {rest} coins left.",
        rest,
    )


def _compare(rng: random.Random) -> Problem:
    (first, second), thing = rng.sample(_PEOPLE, 2), rng.choice(_THINGS)
    few, times = rng.randint(3, 25), rng.randint(2, 6)
    many, both = few * times, few * times + few
    return Problem(
        f"{first} collected {few} {thing}. {second} collected {times} times as many. "
        f"How many {thing} did they collect together?",
        f"{second} collected {few} * {times} = {many} {thing}. Together that is {few} + {many} = {both}.",
        both,
    )


def _travel(rng: random.Random) -> Problem:
    person = rng.choice(_PEOPLE)
    speed, hours, more = rng.randint(4, 30), rng.randint(2, 8), rng.randint(3, 40)
    first, total = speed * hours, speed * hours + more
    return Problem(
        f"{person} cycles {speed} kilometres an hour for {hours} hours and then walks another {more} kilometres. "
        f"How many kilometres is that in all?",
        f"Cycling covers {speed} * {hours} = {first} kilometres. In all it is {first} + {more} = {total} kilometres.",
        total,
    )


def _work(rng: random.Random) -> Problem:
    person, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
    daily, days, broken = rng.randint(6, 30), rng.randint(3, 9), rng.randint(2, 15)
    made, good = daily * days, daily * days - broken
    return Problem(
        f"A workshop run by {person} paints {daily} {thing} a day. After {days} days {broken} of them are sold. "
        f"How many painted {thing} are still there?",
        f"In {days} days the workshop paints {daily} * {days} = {made} {thing}. "
        f"Then {made} - {broken} = {good} are still there.",
        good,
    )


def _age(rng: random.Random) -> Problem:
    older, younger = rng.sample(_PEOPLE, 2)
    age, gap, years = rng.randint(5, 40), rng.randint(2, 20), rng.randint(2, 15)
    now, then = age + gap, age + gap + years
    return Problem(
        f"{younger} is {age} years old and {older} is {gap} years older. How old will {older} be in {years} years?",
        f"{older} is {age} + {gap} = {now} years old now. In {years} years it will be {now} + {years} = {then}.",
        then,
    )


_KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _gather, _give_away, _share, _pay, _compare, _travel, _work, _age,
)  # fmt: skip
