"""A workflow with two sub-graphs that each ask a person under one name; their answers have different types."""

from __future__ import annotations

from pydantic import BaseModel

from metier.agents import ScriptedBackend, TaskGraph


class Topic(BaseModel):
    name: str


class Amount(BaseModel):
    euros: int


class Person(BaseModel):
    who: str


class Order(BaseModel):
    text: str


def budget() -> TaskGraph:
    graph = TaskGraph("budget", takes=Topic, gives=Amount)
    graph.ask_person("approve", takes=Topic, gives=Amount, question="How much for {{ topic.name }}?")
    return graph


def owner() -> TaskGraph:
    graph = TaskGraph("owner", takes=Topic, gives=Person)
    graph.ask_person("approve", takes=Topic, gives=Person, question="Who has {{ topic.name }}?")
    return graph


def two_questions() -> TaskGraph:

    def order(amount: Amount, person: Person) -> Order:
        return Order(text=f"{person.who}: {amount.euros}")

    graph = TaskGraph("order", takes=Topic, gives=Order)
    graph.step(order, after=(graph.step(budget()), graph.step(owner())))
    return graph


graph = two_questions()


def scripted() -> ScriptedBackend:
    """Nobody but people is asked anything."""
    return ScriptedBackend()
