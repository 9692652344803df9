"""Ladders: which level, why, and what an assignment may not say about them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import yaml

from metier.agents import Ask, Message, ThinkingProfile
from metier.agents.errors import AssignmentError
from metier.router import Assignment, Failures, PrioritySettings, Router, load_assignment
from metier.router.escalation import climb
from metier.router.priority import order_key_s, priority_of

THREE_LINES = """
roles:
  solver:
    {variant: small, ladder: [{thinking: 64}, {thinking: 256}, {variant: large, thinking: 256}], climb_on: [rejected]}
"""


def ask(round_number: int = 1, role: str = "solver") -> Ask:
    messages = (Message(role="user", content="2+2"),)
    return Ask(run_id="r", step_path="s", role=role, messages=messages, round=round_number)


def test_a_no_raises_the_thinking_and_then_the_variant(tmp_path: Path) -> None:
    file = tmp_path / "assignment.yaml"
    file.write_text(THREE_LINES, encoding="utf-8")
    assignment = load_assignment(file)
    assert assignment.names() == [None, "large", "small"]
    router = Router(assignment)
    routes = [
        router.route(ask(n), Failures(rejected=n - 1, rejected_by="checker" if n > 1 else "")) for n in (1, 2, 3, 4)
    ]
    assert [(r.variant, r.thinking and r.thinking.max_tokens, r.climbs) for r in routes] == [
        ("small", 64, 0), ("small", 256, 1), ("large", 256, 2), ("large", 256, 2),
    ]  # fmt: skip
    assert [r.reason for r in routes] == [
        "assigned to 'solver', level 1",
        "round 2: checker said no, level 1 → 2: thinking 64 → 256",
        "round 3: checker said no, level 2 → 3: variant small → large",
        "round 4: checker said no, stays on level 3: max_climbs is 2",
    ]
    assert router.expect("solver", 2).variant == "small"
    assert router.expect("solver", 3).variant == "large"
    file.write_text(assignment.to_yaml(), encoding="utf-8")
    assert load_assignment(file) == assignment
    assert Assignment.model_validate(assignment.model_dump(mode="json", exclude_defaults=True)) == assignment


def test_only_named_causes_climb_and_never_above_the_bound() -> None:
    for rejected, unparsed, unsure, bound in product(range(3), repeat=4):
        failures = Failures(rejected, unparsed, unsure)
        assert climb(failures, ("unparsed", "unsure"), bound) == min(unparsed + unsure, bound)
        assert climb(failures, (), bound) == 0


def test_the_last_level_asks_for_no_confidence() -> None:
    entry = {"ladder": [{"thinking": 8}, "large"], "climb_on": ["unsure"], "min_logprob": -0.5}
    router = Router(Assignment.model_validate({"roles": {"solver": entry}}))
    first, last = router.route(ask()), router.route(ask(), Failures(unsure=1, logprob=-1.25))
    assert (first.send(ask()).confidence, last.send(ask()).confidence) == (True, False)
    assert last.reason == (
        "round 1: mean log-probability -1.25 below -0.5, level 1 → 2: variant base → large, "
        "thinking 8 → as the role says"
    )
    assert last.thinking is None
    assert first.thinking == ThinkingProfile(max_tokens=8)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{ladder: [{thinking: 64}], climb_on: [rejected]}", "a ladder of one level"),
        ("{ladder: [a, b]}", "needs climb_on"),
        ("{ladder: [a, b], climb_on: [rejected, rejected]}", "at most once"),
        ("{ladder: [a, a], climb_on: [rejected]}", "are the same"),
        ("{variant: a, ladder: [{thinking: 4}, {variant: a, thinking: 4}], climb_on: [rejected]}", "are the same"),
        ("{ladder: [a, b], climb_on: [tired]}", "roles.solver.climb_on.0"),
        ("{climb_on: [rejected]}", "climb_on without a ladder"),
        ("{max_climbs: 2}", "max_climbs without a ladder"),
        ("{min_logprob: -1}", "min_logprob without a ladder"),
        ("{ladder: [a, b], climb_on: [rejected], rounds: {2: c}}", "leave one out"),
        ("{ladder: [a, b], climb_on: [rejected], thinking_rounds: {2: 9}}", "leave one out"),
        ("{ladder: [a, b], climb_on: [rejected], max_climbs: 2}", "max_climbs=2 with 2 levels"),
        ("{ladder: [a, b], climb_on: [rejected], max_climbs: 0}", "roles.solver.max_climbs"),
        ("{ladder: [a, b], climb_on: [unsure]}", "need each other"),
        ("{ladder: [a, b], climb_on: [rejected], min_logprob: -1}", "need each other"),
        ("{ladder: [a, b], climb_on: [unsure], min_logprob: 0.5}", "roles.solver.min_logprob"),
        ("{ladder: [a, b], climb_on: [unsure], min_logprob: .nan}", "roles.solver.min_logprob"),
        ("{ladder: [{thinking: {max_tokens: 4, min_tokens: 9}}, b], climb_on: [rejected]}", "min_tokens=9 is above"),
    ],
)
def test_ladders_that_cannot_be_meant_are_refused(tmp_path: Path, entry: str, said: str) -> None:
    file = tmp_path / "assignment.yaml"
    file.write_text(f"roles:\n  solver: {entry}\n", encoding="utf-8")
    assert yaml.safe_load(file.read_text(encoding="utf-8"))
    with pytest.raises(AssignmentError, match=said):
        load_assignment(file)


def test_short_runs_go_first_within_the_ageing_bound() -> None:
    settings = PrioritySettings(ask_s=1.0, attained_weight=0.25, ageing_s=10.0)
    assert order_key_s(5.0, 6.0, 0.0, settings) == 11.0
    assert order_key_s(5.0, 1.0, 8.0, settings) == 8.0
    # However long the older run, one that began ten seconds after it does not overtake it.
    assert order_key_s(0.0, 1e6, 1e6, settings) <= order_key_s(10.0, 0.0, 0.0, settings)
    assert order_key_s(0.0, 1e6, 1e6, settings) > order_key_s(9.9, 0.0, 0.0, settings)
    assert priority_of(1.2346) == 1235
    assert priority_of(1e12) == 2**31 - 1
