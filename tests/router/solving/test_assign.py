"""Choosing an assignment: checked end to end, explained, and compared with the obvious alternatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from metier.agents.errors import InfeasibleError
from metier.router.probing.evaluator import Evaluator
from metier.router.probing.journal import Journal
from metier.router.probing.outcomes import Outcome
from metier.router.probing.profile import Footprint
from metier.router.solving.assign import assign, corrected
from metier.router.solving.assigned import Assigned, AssignSettings, Measured
from metier.router.solving.baselines import ORACLE, baselines
from metier.router.solving.coupling import Prediction, Problem, make_problem
from metier.router.solving.limits import Limits
from metier.router.solving.solve import SolverSettings
from metier.router.space import Candidate, Part
from tests.router.solving.table import TableRun, profile, space, task_ids

pytestmark = pytest.mark.anyio

ROLES = ("planner", "solver", "critic")
VARIANTS = ("base", "cheap", "dear")
CPU_S = {"base": 0.1, "cheap": 0.05, "dear": 0.2}
INCUMBENT = "planner=dear, solver=dear, critic=dear"
QUALITY = {"base": 0.3, "cheap": 0.78, "dear": 0.8}


def problem(quality: Mapping[str, float] = QUALITY) -> Problem:
    given = [
        profile(Part(role), v, INCUMBENT, quality=quality[v], gain=quality[v] - 0.8, cpu_s=CPU_S[v])
        for role in ROLES
        for v in VARIANTS
    ]
    return make_problem(given, [Part(role) for role in ROLES])


class Clash(TableRun):
    """Every variant is as good as it looked alone, but more than one cheap one together solve next to nothing."""

    async def __call__(self, assignment, tasks, on_outcome):  # type: ignore[no-untyped-def]
        cheap = sum(given.variant == "cheap" for given in assignment.roles.values())
        share = {0: 1.0, 1: 1.0, 2: 0.6, 3: 0.2}[cheap]
        self.skill = {key: share for key in self.skill}
        await super().__call__(assignment, tasks, on_outcome)


def check(kind: type[TableRun], tasks: int = 30) -> Evaluator:
    skill = {(role, v): 1.0 for role in ROLES for v in VARIANTS}
    return Evaluator(space(ROLES, VARIANTS), task_ids(tasks), kind(skill, CPU_S), Journal(None, Outcome))


def named(assigned: Assigned) -> dict[str, str]:
    return {str(part): str(c) for part, c in assigned.solution.choices.items()}


async def test_the_cheapest_that_holds_is_chosen_and_explained() -> None:
    evaluator = check(TableRun)
    result = await assign(problem(), AssignSettings(quality_loss=0.06, measure_baselines=True), check=evaluator)
    assert named(result) == {role: "cheap" for role in ROLES}
    assert result.measured is not None and result.measured.quality == 1.0 and result.measured.gain == 0.0
    assert result.measured.cpu_s == pytest.approx(0.15)
    assert all("next is dear: cpu_s 0.3 instead of 0.15 in all" in why for why in result.reasons.values())
    names = [contender.name for contender in result.table]
    assert names == [
        "assigned", "incumbent", "all on the base", "best single variant", "random", "each role by itself",
        "brute force", ORACLE,
    ]  # fmt: skip
    by_name = {contender.name: contender for contender in result.table}
    assert by_name["brute force"].prediction == result.solution.prediction
    assert by_name["incumbent"].measured is not None and by_name["incumbent"].measured.cpu_s == pytest.approx(0.6)
    assert by_name[ORACLE].measured is not None and by_name[ORACLE].measured.cpu_s == pytest.approx(0.15)
    qualities = [point.prediction.quality for point in result.front]
    assert qualities == sorted(qualities) and qualities[-1] == pytest.approx(0.8)


def test_a_checked_choice_is_expected_to_cost_what_the_check_did() -> None:
    alone = Prediction(quality=0.9, cpu_s=0.4, latency_s=2.0, tokens=90.0, memory_mib=1500.0, completion_s=0.5)
    checked = Measured(48, 0.8, (0.7, 0.9), 0.0, (0.0, 0.0), cpu_s=0.2, seconds=9.0, tokens=80.0)
    expected = corrected(alone, checked)
    assert expected == Prediction(0.8, 0.2, latency_s=1.0, tokens=80.0, memory_mib=1500.0, completion_s=0.25)
    assert corrected(alone, None) == alone
    assert corrected(replace(alone, completion_s=None), checked).completion_s is None


async def test_what_does_not_hold_end_to_end_is_excluded_and_the_next_best_taken() -> None:
    notes: list[str] = []
    result = await assign(
        problem(), AssignSettings(quality_loss=0.06, checks=8), check=check(Clash), on_note=notes.append
    )
    assert sorted(named(result).values()) == ["cheap", "dear", "dear"]
    assert len(result.excluded) == 4  # all three, and each pair
    assert all("below the incumbent, 0.06 allowed" in contender.note for contender in result.excluded)
    assert any("fails the check" in note for note in notes)
    with pytest.raises(InfeasibleError, match="none of 2 assignments passes the check"):
        await assign(problem(), AssignSettings(quality_loss=0.06, checks=2), check=check(Clash))


class NeverTwice(TableRun):
    """The critic is never asked, and whatever has a cheap planner fails."""

    async def __call__(self, assignment, tasks, on_outcome):  # type: ignore[no-untyped-def]
        self.skill = dict.fromkeys(self.skill, float(assignment.roles["planner"].variant != "cheap"))

        def unasked(outcome: Outcome) -> None:
            on_outcome(outcome.model_copy(update={"asks": outcome.asks[:-1]}))

        await super().__call__(assignment, tasks, unasked)


async def test_choices_that_differ_only_where_nobody_was_asked_are_one_try() -> None:
    result = await assign(problem(), AssignSettings(quality_loss=0.06), check=check(NeverTwice))
    tried = [tuple(str(c) for c in list((contender.choices or {}).values())[:2]) for contender in result.excluded]
    assert len(set(tried)) == len(tried) and all(planner == "cheap" for planner, _ in tried)


async def test_an_incumbent_that_is_not_to_be_chosen_is_measured_and_not_predicted() -> None:
    given = [row for rows in problem().rows.values() for row in rows.values()]
    others = [Candidate("cheap"), Candidate("base")]
    posed = make_problem(given, [Part(role) for role in ROLES], candidates=others)
    result = await assign(posed, AssignSettings(quality_loss=0.06), check=check(TableRun))
    (incumbent,) = (contender for contender in result.table if contender.name == "incumbent")
    assert incumbent.prediction is None and incumbent.measured is not None


async def test_a_quality_asked_for_is_held_end_to_end() -> None:
    settings = AssignSettings(limits=Limits(min_quality=0.7))
    result = await assign(problem(), settings, check=check(Clash))
    assert result.measured is not None and result.measured.quality >= 0.7
    assert "quality 0.0" in result.excluded[0].note and "is below 0.7" in result.excluded[0].note
    with pytest.raises(InfeasibleError, match="min_quality=0.95"):
        await assign(problem(), AssignSettings(limits=Limits(min_quality=0.95)), check=None)


async def test_limits_that_cannot_be_met_are_said_before_anything_runs() -> None:
    run = TableRun({(role, v): 1.0 for role in ROLES for v in VARIANTS}, CPU_S)
    evaluator = Evaluator(space(ROLES, VARIANTS), task_ids(8), run, Journal(None, Outcome))
    with pytest.raises(InfeasibleError, match="cpu_s=0.01"):
        await assign(problem(), AssignSettings(limits=Limits(cpu_s=0.01)), check=evaluator)
    assert run.calls == []


async def test_cost_of_pass_is_weighed_along_the_front() -> None:
    settings = AssignSettings(minimise="cost_of_pass", limits=Limits(min_quality=0.1))
    result = await assign(problem({"base": 0.3, "cheap": 0.2, "dear": 0.8}), settings, check=None)
    costs = {c.name: c.prediction.cost_of_pass for c in result.table if c.prediction}
    assert costs["assigned"] == min(costs.values()) and result.measured is None
    assert named(result) == {role: "dear" for role in ROLES}


async def test_the_best_on_one_checkpoint_is_run_too_and_taken_where_it_costs_less() -> None:
    place = {"dear": Footprint(checkpoint_mib=100), "cheap": Footprint(checkpoint="eight bits", checkpoint_mib=50)}
    given = [
        # Alone on its engine, the cheap one looked dear.
        profile(Part(role), v, INCUMBENT, cpu_s={"dear": 0.1, "cheap": 0.12}[v], footprint=place[v])
        for role in ROLES
        for v in ("dear", "cheap")
    ]
    wrong = make_problem(given, [Part(role) for role in ROLES])
    result = await assign(wrong, check=check(TableRun))
    assert named(result) == dict.fromkeys(ROLES, "cheap") and result.solution.method == "measured"
    assert result.measured is not None and result.measured.cpu_s == pytest.approx(0.15)
    assert all(why.endswith("ran cheaper than the best by prediction") for why in result.reasons.values())
    lines = {contender.name: contender for contender in result.table}
    assert set((lines["best by prediction"].choices or {}).values()) == {Candidate("dear")}
    believed = await assign(wrong, AssignSettings(rivals=False), check=check(TableRun))
    assert named(believed) == dict.fromkeys(ROLES, "dear")
    smallest = await assign(wrong, AssignSettings(minimise="memory_mib"), check=check(TableRun))
    assert smallest.solution.method != "measured"


async def test_a_checkpoint_that_looked_a_little_too_weak_is_run_as_a_whole() -> None:
    place = {"dear": Footprint(checkpoint_mib=100), "cheap": Footprint(checkpoint="pruned", checkpoint_mib=50)}
    given = [
        profile(Part(role), v, INCUMBENT, quality=QUALITY[v], gain=QUALITY[v] - 0.8, footprint=place[v])
        for role in ROLES
        for v in ("dear", "cheap")
    ]
    weak = make_problem(given, [Part(role) for role in ROLES])  # all on "cheap" is predicted at 0.74, the floor 0.78
    result = await assign(weak, check=check(TableRun))
    assert named(result) == dict.fromkeys(ROLES, "cheap") and result.solution.method == "measured"
    believed = await assign(weak, AssignSettings(rival_shortfall=0.03), check=check(TableRun))
    assert "on one checkpoint" not in [c.name for c in believed.table]


class Worse(TableRun):
    """Whatever is cheap fails."""

    async def __call__(self, assignment, tasks, on_outcome):  # type: ignore[no-untyped-def]
        cheap = any(given.variant == "cheap" for given in assignment.roles.values())
        self.skill = {key: 0.0 if cheap else 1.0 for key in self.skill}
        await super().__call__(assignment, tasks, on_outcome)


async def test_a_rival_that_does_not_hold_is_shown_and_not_taken() -> None:
    given = [
        profile(Part(role), v, INCUMBENT, cpu_s=0.1, footprint=Footprint(checkpoint=v, checkpoint_mib=100))
        for role in ROLES
        for v in ("dear", "cheap")
    ]
    result = await assign(
        make_problem(given, [Part(role) for role in ROLES]), AssignSettings(checks=20), check=check(Worse)
    )
    assert named(result) == dict.fromkeys(ROLES, "dear")
    assert all("below the incumbent" in c.note for c in result.table if c.name == "on one checkpoint")


async def test_no_other_candidate_left_is_a_reason_too() -> None:
    given = [profile(Part("solver"), "only", "solver=only")]
    result = await assign(make_problem(given, [Part("solver")]), check=None)
    assert result.reasons[Part("solver")].endswith("no other candidate is left")
    assert result.solution.choices == {Part("solver"): Candidate("only")}


def test_baselines_say_what_they_could_not_do() -> None:
    few = AssignSettings(solver=SolverSettings(all_choices_limit=5))
    notes = {c.name: c.note for c in baselines(problem(), Limits(), few)}
    assert notes["brute force"] == "27 assignments are too many"
    only = make_problem([profile(Part("a"), "x", "a=x")], [Part("a")])
    notes = {c.name: c.note for c in baselines(only, Limits(), few)}
    assert notes["all on the base"] == "not profiled"
