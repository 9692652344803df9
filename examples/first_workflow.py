"""Who is it, and how old? Extract a name and an age from a sentence, normalise them, verify."""

import re

from pydantic import BaseModel

from metier.agents import Drawn, Role, ScriptedBackend, TaskGraph, draw_tasks, taught_rows


class Sentence(BaseModel):
    text: str


class Found(BaseModel):
    name: str
    age: str


class Person(BaseModel):
    name: str
    age: int


class Verdict(BaseModel):
    ok: bool


extractor = Role("extractor", takes=(Sentence, Verdict | None), gives=Found, instructions="Copy name and age.")
normaliser = Role("normaliser", takes=Found, gives=Person, instructions="Name as First Last, age as a number.")
verifier = Role("verifier", takes=(Sentence, Person), gives=Verdict, instructions="Is it the person of the sentence?")

graph = TaskGraph("people", takes=Sentence, gives=Person)
with graph.loop("attempt", max_rounds=2, until=lambda s: s[check].ok):
    found = graph.step(extractor)
    person = graph.step(normaliser, after=found)
    check = graph.step(verifier, after=person)


def draw(rng):
    first, last = rng.choice("Ann Bob Cleo Dan Eva Finn".split()), rng.choice("Adams Brown Clark Davis Evans".split())
    age, name = rng.randint(21, 69), rng.choice((f"{first} {last}", f"{last.upper()}, {first}"))
    found = Found(name=name, age=rng.choice((f"{age}", f"{age} years")))
    frame = rng.choice(("{} is {} old.", "{} ({}) plays chess.", "{} won the race at {}."))
    text = frame.format(found.name, found.age)
    return Drawn(text, Sentence(text=text), key=(found, Person(name=f"{first} {last}", age=age)))


def tasks(split, size, seed=0):
    return draw_tasks("people", draw, lambda task, got: float(got == task.key[1]), split=split, size=size, seed=seed)


verifiers = {"extractor": lambda task, got: float(got == task.key[0])}


def rows(size, seed):
    for task in tasks("train", size, seed):
        sentence, (found, person) = task.input, task.key
        yield from taught_rows(extractor, {"sentence": sentence}, (), found)
        yield from taught_rows(normaliser, {"found": found}, (), person)
        for shown in (person, person.model_copy(update={"age": person.age + 10})):
            yield from taught_rows(verifier, {"sentence": sentence, "person": shown}, (), Verdict(ok=shown == person))


def scripted():
    def reply(ask):
        said = ask.messages[-1].content
        if ask.role == "verifier":
            return Verdict(ok=True)
        name, age = re.search(r"[A-Z]\w+,? [A-Z]\w+", said), re.search(r"\d+( years)?", said)
        if ask.role == "extractor":
            return Found(name=name[0], age=age[0])
        last, comma, first = name[0].partition(", ")
        return Person(name=f"{first} {last.title()}" if comma else name[0], age=int(age[0].split()[0]))

    return ScriptedBackend(default=reply)
