"""Every public class that people write has an example in its docstring, and the example runs."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator

import pytest

import metier.agents
import metier.router
import metier.runtime
import metier.specializers
from metier.agents import MetierError
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.settings.fleet import FleetSettings
from metier.runtime.settings.ray import RaySettings
from metier.runtime.settings.server import ServerSettings
from metier.runtime.settings.tools import ToolSettings
from metier.specializers.methods.method import METHODS, find_method
from metier.specializers.recipes.recipe import Acceptance
from metier.specializers.shelf.fier_settings import FierSettings

FACES = (metier.agents, metier.specializers, metier.router, metier.runtime)

# Public classes that people are given and do not write themselves.
GIVEN = {
    "metier.agents": {"BuiltGraph", "FieldRef", "McpServer", "StepRef", "Tool", "Usage"},
    "metier.specializers": {"AdapterFacts", "AskSpec", "EngineSpec", "Progress", "Variant"},
    "metier.router": {
        "AskCost", "Assigned", "Evaluator", "Failures", "Footprint", "Journal", "Outcome", "Placement", "Prediction",
        "ProbeResult", "Problem", "Profile", "Route", "RunTasks", "Solution", "Space",
    },
    "metier.runtime": {"Event", "RunResult"},
}  # fmt: skip

# Not on a face, or functions, and written by people nevertheless.
ALSO = (
    *(EngineSettings, FierSettings, FleetSettings, RaySettings, ServerSettings, ToolSettings, Acceptance),
    *(
        metier.agents.draw_tasks,
        metier.agents.mcp_tools,
        metier.agents.taught_rows,
        metier.agents.tool,
        metier.runtime.load_settings,
        metier.runtime.open_session,
    ),
)


def written() -> Iterator[object]:
    """Everything that must have an example."""
    for face in FACES:
        for name in face.__all__:
            value = getattr(face, name)
            if inspect.isclass(value) and not issubclass(value, MetierError) and name not in GIVEN[face.__name__]:
                yield value
    yield from ALSO
    for name in METHODS:
        yield find_method(name).settings


def with_examples() -> list[object]:
    """Everything that has one: what people write, and what else is on the faces."""
    public = [getattr(face, name) for face in FACES for name in face.__all__]
    return [value for value in dict.fromkeys([*written(), *filter(callable, public)]) if ">>>" in (value.__doc__ or "")]


def name_of(value: object) -> str:
    """As tests are called."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("value", [*written()], ids=name_of)
def test_what_people_write_has_an_example(value: object) -> None:
    assert ">>>" in (value.__doc__ or ""), f"{name_of(value)} needs an example, or a place in GIVEN"


@pytest.mark.parametrize("value", with_examples(), ids=name_of)
def test_the_example_runs(value: object) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(value, name_of(value), globs=_names(value)):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


def test_those_that_are_given_are_public() -> None:
    assert all(names <= set(face.__all__) for face in FACES for names in [GIVEN[face.__name__]])


def _names(value: object) -> dict[str, object]:
    """What an example may use without importing it: the public names of its own module."""
    module = inspect.getmodule(value)
    return {name: getattr(module, name) for name in getattr(module, "__all__", ())}
