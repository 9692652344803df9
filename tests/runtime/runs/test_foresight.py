"""Who runs next: what the graph says before a step, against what runs then ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import Ask, Reply, Role, RunInterrupted, ScriptedBackend, StepError, TaskGraph
from metier.agents.backend import Upcoming
from metier.router import Assignment, RoleAssignment, Router
from metier.runtime import RunStore, load_settings, open_session
from metier.runtime.runs.foresight import Foresight
from tests.runtime.runs.listening import Listening


class Text(BaseModel):
    text: str = ""


def role(name: str) -> Role:
    return Role(name, takes=Text, gives=str, instructions=f"Be {name}.")


def foresight(graph: TaskGraph, asks: int = 16) -> Foresight:
    """Variants are named after role and round."""
    return Foresight(graph.build(), lambda role, number: f"{role}{number}", asks=asks)


def surely(seen: Foresight, path: str, *, again: bool = False, asks: int = 16) -> Upcoming:
    """What is announced but not guessed."""
    return tuple((variant, distance) for variant, distance in seen.upcoming(path, again=again) if distance <= asks)


def looping(max_rounds: int = 3, until: Callable[[Any], bool] | None = lambda s: False) -> TaskGraph:
    """a, then rounds of b and c, then d."""
    graph = TaskGraph("looping", takes=Text, gives=str)
    a = graph.step(role("a"))
    with graph.loop("again", max_rounds=max_rounds, until=until, after=a) as again:
        b = graph.step(role("b"))
        graph.step(role("c"), after=b)
    graph.returns(graph.step(role("d"), after=again))
    return graph


def test_a_round_may_be_followed_by_the_next_and_by_what_comes_after_the_loop() -> None:
    seen = foresight(looping())
    assert surely(seen, "a") == (
        ("a1", 0),
        ("b1", 1),
        ("c1", 2),
        ("b2", 3),
        ("d1", 3),
        ("c2", 4),
        ("b3", 5),
        ("c3", 6),
    )
    assert surely(seen, "again[2]/c") == (("c2", 0), ("b3", 1), ("d1", 1), ("c3", 2))
    assert surely(seen, "again[3]/c") == (("c3", 0), ("d1", 1))
    assert surely(seen, "d") == (("d1", 0),)


def test_a_loop_without_condition_runs_all_its_rounds() -> None:
    assert surely(foresight(looping(2, None)), "again[1]/c") == (("c1", 0), ("b2", 1), ("c2", 2), ("d1", 3))


def test_no_further_than_told() -> None:
    assert surely(foresight(looping(), asks=2), "a", asks=2) == (("a1", 0), ("b1", 1), ("c1", 2))
    assert foresight(looping(max_rounds=1000), asks=16).upcoming("a")[-1][1] == 16


def test_the_next_run_of_the_batch_follows_the_last_steps() -> None:
    seen = foresight(looping(1))
    assert surely(seen, "again[1]/c", again=True) == (("c1", 0), ("d1", 1), ("a1", 2), ("b1", 3))
    assert surely(seen, "again[1]/c") == (("c1", 0), ("d1", 1))


def test_without_a_next_run_its_first_steps_are_a_guess_beyond_all_that_is_sure() -> None:
    seen = foresight(looping(1))
    assert seen.upcoming("again[1]/c") == (("c1", 0), ("d1", 1), ("a1", 16 + 2), ("b1", 16 + 3))
    # One variant for a and c: that c needs it again is sure, and counts although a guess is as near.
    shared = Foresight(looping(2).build(), lambda role, n: "v" if role in "ac" else f"{role}{n}", asks=16)
    assert shared.upcoming("again[1]/b") == (("b1", 0), ("v", 1), ("b2", 2), ("d1", 2))
    assert shared.upcoming("again[2]/b") == (("b2", 0), ("v", 1), ("d1", 2), ("b1", 16 + 4))


def test_loops_in_loops_and_sub_graphs_count_their_own_rounds() -> None:
    inner = TaskGraph("inner", takes=Text, gives=str)
    inner.step(role("x"))
    graph = TaskGraph("outer", takes=Text, gives=str)
    with graph.loop("outer", max_rounds=2, until=lambda s: False):
        a = graph.step(role("a"))
        with graph.loop("inner", max_rounds=2, until=lambda s: False, after=a) as loop:
            graph.step(role("b"))
        sub = graph.step(inner, name="sub", after=loop)
    graph.returns(sub)
    seen = foresight(graph)
    assert surely(seen, "outer[1]/a") == (("a1", 0), ("b1", 1), ("b2", 2), ("x1", 2), ("a2", 3))
    assert surely(seen, "outer[1]/inner[2]/b") == (("b2", 0), ("x1", 1), ("a2", 2), ("b1", 3))
    assert surely(seen, "outer[1]/sub/x") == (("x1", 0), ("a2", 1), ("b1", 2), ("b2", 3))
    assert surely(seen, "outer[2]/sub/x") == (("x1", 0),)


def test_functions_are_free_and_steps_with_conditions_may_be_passed() -> None:
    def check(text: Text) -> bool:
        return True

    graph = TaskGraph("conditions", takes=Text, gives=str)
    a = graph.step(role("a"))
    checked = graph.step(check, after=a)
    b = graph.step(role("b"), after=checked, when=lambda s: s[checked])
    graph.returns(graph.step(role("c"), after=b))
    assert surely(foresight(graph), "a") == (("a1", 0), ("b1", 1), ("c1", 1))
    assert surely(foresight(graph), "check") == (("b1", 1), ("c1", 1))


def test_one_variant_for_many_roles_is_named_once_at_its_nearest() -> None:
    router = Router(
        Assignment(roles={"c": RoleAssignment(variant="v", rounds={2: "w"}), "d": RoleAssignment(variant="v")})
    )
    seen = Foresight(looping().build(), lambda r, n: router.expect(r, n).variant, asks=16)
    assert surely(seen, "a") == ((None, 0), ("v", 2), ("w", 4))


def test_rounds_of_nothing_but_functions_come_to_an_end() -> None:
    graph = TaskGraph("busy", takes=Text, gives=str)

    def work(text: Text) -> str:
        return ""

    a = graph.step(role("a"))
    with graph.loop("many", max_rounds=1000, until=lambda s: False, after=a) as many:
        graph.step(work)
    graph.returns(a)
    graph.step(role("b"), after=many)
    assert surely(foresight(graph), "a") == (("a1", 0), ("b1", 1))


def every_role_its_own() -> Assignment:
    return Assignment(
        roles={name: RoleAssignment(variant=name, rounds={2: f"{name}-second"}) for name in ("a", "b", "c", "d")}
    )


@pytest.mark.anyio
@pytest.mark.parametrize("rounds", [1, 2, 3])
async def test_every_ask_was_announced_by_the_step_before(rounds: int) -> None:
    backend = Listening(default=lambda ask: "x")
    graph = looping(3, lambda s: len([a for a in backend.asks if a.role == "c"]) >= rounds)
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, assignment=every_role_its_own(), store=store) as session:
            await session.run(graph, Text())
    assert [ask.role for ask in backend.asks] == ["a", *["b", "c"] * rounds, "d"]
    assert backend.distances == [None] + [1] * (2 * rounds + 1)
    assert backend.announced == {} and len(backend.forgotten) == 1


@pytest.mark.anyio
async def test_side_by_side_steps_announce_together() -> None:
    def both(x: Text) -> str:
        return ""

    graph = TaskGraph("wide", takes=Text, gives=str)
    a = graph.step(role("a"))
    b, c = graph.step(role("b"), after=a), graph.step(role("c"), after=a)
    graph.returns(graph.step(role("d"), after=(b, c)))
    seen: list[Upcoming] = []
    under_way, two = [], anyio.Event()

    async def look(ask: Ask) -> str:
        under_way.append(ask.role)
        if len(under_way) == 2:
            two.set()
        await two.wait()
        seen.append(backend.announced[ask.run_id])
        return "x"

    backend = Listening({"b": look, "c": look}, default=lambda ask: "x")
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, assignment=every_role_its_own(), store=store) as session:
            await session.run(graph, Text())
    assert set(seen[0][:2]) == {("b", 0), ("c", 0)} and seen[0][2] == ("d", 1)


@pytest.mark.anyio
async def test_a_run_is_forgotten_however_it_ends() -> None:
    def fail(text: Text) -> str:
        raise ValueError("no")

    failing = TaskGraph("failing", takes=Text, gives=str)
    a = failing.step(role("a"))
    failing.returns(failing.step(fail, after=a, retries=0))
    asking = TaskGraph("asking", takes=Text, gives=Text)
    a = asking.step(role("a"))
    asking.returns(asking.ask_person("person", takes=Text, gives=Text, question="Well?", after=a))
    hanging = TaskGraph("hanging", takes=Text, gives=str)
    hanging.step(role("a"))

    async def answer(ask: Ask) -> str:
        if len(backend.asks) == 3:
            await anyio.sleep_forever()
        return "x"

    backend = Listening(default=answer)
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store) as session:
            with pytest.raises(StepError):
                await session.run(failing, Text())
            with pytest.raises(RunInterrupted):
                await session.run(asking, Text())
            async with session.stream(hanging, Text()):
                pass
    assert backend.announced == {} and len(backend.forgotten) == 3


@pytest.mark.anyio
async def test_prefetching_goes_on_beside_the_run_and_ends_with_it() -> None:
    backend = Listening(default=lambda ask: "x")
    assignment = Assignment(roles={"a": RoleAssignment(variant="fetching")})
    with RunStore(":memory:") as store, anyio.fail_after(10):
        async with open_session(backend=backend, assignment=assignment, store=store) as session:
            await session.run(looping(), Text())
    assert len(backend.fetched) == 1


@pytest.mark.anyio
async def test_without_foresight_nobody_is_told() -> None:
    class Deaf(Listening):
        def foresee(self, run_id: str, upcoming: Upcoming) -> None:
            raise AssertionError("told")

        async def reply(self, ask: Ask, **more: Any) -> Reply:
            return await ScriptedBackend.reply(self, ask, **more)

    backend, settings = Deaf(default=lambda ask: "x"), load_settings(None, {"engine.foresight": False})
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store, settings=settings) as session:
            assert await session.run(looping(), Text()) == "x"
