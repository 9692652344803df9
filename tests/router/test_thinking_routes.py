"""How long a role thinks: the assignment's word, round by round, over the role's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import THINKING_OFF, Ask, Message, ThinkingProfile
from metier.agents.errors import AssignmentError
from metier.router import Router, load_assignment
from metier.specializers.shelf.variant import AskSpec

TEXT = """
roles:
  checker: {thinking: &long {max_tokens: 128, min_tokens: 32, waits: 1}}
  solver: {variant: solver-lora, thinking: off, thinking_rounds: {2: 64, 3: *long}}
  critic: {thinking: 16}
  planner: planner-lora
"""


def ask(role: str, round_number: int, own: ThinkingProfile | None = None) -> Ask:
    messages = (Message(role="user", content="2+2"),)
    return Ask(run_id="r", step_path="s", role=role, messages=messages, round=round_number, thinking=own)


def test_the_assignment_says_how_long_in_which_round(tmp_path: Path) -> None:
    file = tmp_path / "assignment.yaml"
    file.write_text(TEXT, encoding="utf-8")
    assignment = load_assignment(file)
    router = Router(assignment)
    own = ThinkingProfile(max_tokens=5)
    sent = [router.route(a).send(a) for a in (ask("solver", n, own) for n in (1, 2, 3, 4))]
    long = ThinkingProfile(max_tokens=128, min_tokens=32, waits=1)
    assert [a.thinking for a in sent] == [THINKING_OFF, ThinkingProfile(max_tokens=64), long, THINKING_OFF]
    assert {a.variant for a in sent} == {"solver-lora"}
    critic, planner, other = (router.route(a).send(a) for a in (ask(r, 1, own) for r in ("critic", "planner", "other")))
    assert (critic.variant, critic.thinking) == (None, ThinkingProfile(max_tokens=16))
    assert (planner.thinking, other.thinking) == (own, own)
    file.write_text(assignment.to_yaml(), encoding="utf-8")
    assert load_assignment(file) == assignment


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{thinking: {max_tokens: 4, min_tokens: 9}}", "min_tokens=9 is above max_tokens=4"),
        ("{thinking: -3}", "max_tokens=-3"),
        ("{thinking_rounds: {0: 5}}", "rounds count from 1"),
        ("{thinking: long}", "roles.solver.thinking"),
    ],
)
def test_what_an_assignment_cannot_mean_is_refused(tmp_path: Path, entry: str, said: str) -> None:
    file = tmp_path / "assignment.yaml"
    file.write_text(f"roles:\n  solver: {entry}\n", encoding="utf-8")
    with pytest.raises(AssignmentError, match=said):
        load_assignment(file)


def test_a_variant_that_says_nothing_about_thinking_keeps_its_record() -> None:
    assert AskSpec(adapter="lora", rank=8).model_dump(mode="json") == {"adapter": "lora", "rank": 8}
    told = AskSpec(adapter="lora", rank=8, thinking=ThinkingProfile(max_tokens=9))
    assert AskSpec.model_validate_json(told.model_dump_json()) == told
