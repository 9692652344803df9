"""Assignments are files that people edit: what is wrong in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import Ask, AssignmentError
from metier.router import Assignment, RoleAssignment, Router, load_assignment


def ask(role: str, round_number: int = 1) -> Ask:
    return Ask(run_id="r", step_path="s", role=role, messages=(), round=round_number)


def test_roles_and_rounds_get_their_variant(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "default: base\nroles:\n  planner: p\n  solver: {variant: s, rounds: {2: base}, reason: short}\n"
    )
    router = Router(load_assignment(tmp_path / "a.yaml"))
    assert router.route(ask("planner")).variant == "p"
    assert router.route(ask("solver")) == router.route(ask("solver"))
    assert (router.route(ask("solver")).variant, router.route(ask("solver")).reason) == ("s", "short")
    assert router.route(ask("solver", 2)).variant is None
    assert router.route(ask("critic")).variant is None
    assert "not assigned" in router.route(ask("critic")).reason
    assert router.assignment.variants() == {"p", "s"}


def test_the_file_goes_round(tmp_path: Path) -> None:
    assignment = Assignment(roles={"solver": RoleAssignment(variant="s", rounds={2: "t"}, reason="r")})
    (tmp_path / "a.yaml").write_text(assignment.to_yaml())
    assert load_assignment(tmp_path / "a.yaml") == assignment


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("roles: [", "cannot be read"),
        ("role: {}", "role: Extra inputs"),
        ("roles: {solver: {varant: x}}", "roles.solver.varant: Extra inputs"),
        ("roles: {solver: {variant: x, rounds: {0: y}}}", "rounds count from 1, got 0"),
        ("- a", "expected `roles:`"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(AssignmentError) as caught:
        load_assignment(tmp_path / "a.yaml")
    assert says in str(caught.value)


def test_unknown_roles_and_missing_files_are_named(tmp_path: Path) -> None:
    assignment = Assignment(roles={"solvr": RoleAssignment(variant="s")})
    with pytest.raises(AssignmentError, match="unknown role 'solvr'.*Did you mean 'solver'"):
        assignment.check_roles(["planner", "solver"])
    with pytest.raises(AssignmentError, match="cannot be read"):
        load_assignment(tmp_path / "missing.yaml")


def test_a_role_keeps_its_variant_for_all_asks_of_a_round_and_it_is_known_before() -> None:
    """One adapter for a conversation: corrections and retries of a step go where the first ask went."""
    router = Router(Assignment(roles={"solver": RoleAssignment(variant="s", rounds={2: "t"})}))
    for number, variant in ((1, "s"), (2, "t"), (3, "s")):
        asks = [
            Ask(run_id=run, step_path="x", role="solver", messages=(), round=number, attempt=attempt, task=run)
            for run in ("a", "b")
            for attempt in range(3)
        ]
        assert {router.route(ask) for ask in asks} == {router.expect("solver", number)}
        assert router.expect("solver", number).variant == variant


def test_a_default_that_nobody_wrote_down_is_not_expected() -> None:
    all_named = Assignment.model_validate({"roles": {"solver": "small"}})
    assert all_named.expected_names() == ["small"]
    assert all_named.names() == [None, "small"]
    assert "default" not in all_named.to_yaml()
    written = Assignment.model_validate({"roles": {"solver": "small"}, "default": "base"})
    assert written.expected_names() == written.names() == [None, "small"]
    assert "default: base" in written.to_yaml()
    assert Assignment().expected_names() == [None]
