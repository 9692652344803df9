"""Thinking profiles: what they refuse, where they may be said, and workflows that think, without a model."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from pydantic import BaseModel, ValidationError

from metier.agents import (
    THINKING_OFF,
    Ask,
    GraphError,
    Message,
    MetierError,
    Role,
    ScriptedBackend,
    TaskGraph,
    ThinkingProfile,
    ThinkingTags,
)
from metier.agents.errors import SettingsError
from metier.runtime import open_session
from metier.runtime.store.store import RunStore


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


class Verdict(BaseModel):
    correct: bool


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"max_tokens": 3, "min_tokens": 5}, "min_tokens=5 is above max_tokens=3"),
        ({"max_tokens": -1}, "max_tokens=-1; expected 0 or more"),
        ({"max_tokens": 8, "min_tokens": -2}, "min_tokens=-2"),
        ({"max_tokens": 8, "waits": -1}, "waits=-1"),
        ({"max_tokens": 0, "waits": 1}, "waits=1 with thinking off"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_by_name(numbers: dict[str, int], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ThinkingProfile(**numbers)


@pytest.mark.parametrize("given", [{"max_tokens": 2.5}, {"max_tokens": True}, {"most": 3}, {}, "on", None])
def test_what_is_no_profile_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        ThinkingProfile.model_validate(given)


def test_short_forms_mean_what_they_say() -> None:
    assert ThinkingProfile.model_validate(64) == ThinkingProfile(max_tokens=64)
    for off in (False, "off", 0, {"max_tokens": 0}):
        assert ThinkingProfile.model_validate(off) == THINKING_OFF
    assert THINKING_OFF.off and not ThinkingProfile(max_tokens=1).off


@pytest.mark.parametrize(
    "tags",
    [
        {"close": " </think>"},
        {"close": "</dächte>"},
        {"close": ""},
        {"wait": "</think>"},
        {"open": "<think></think>"},
        {"empty": "<think>"},
    ],
)
def test_tags_that_cannot_be_told_apart_are_refused(tags: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="thinking tag"):
        ThinkingTags(**tags)


def test_a_role_takes_a_profile_and_nothing_else() -> None:
    role = Role("solver", Puzzle, Answer, thinking=ThinkingProfile(max_tokens=8))
    assert role.thinking == ThinkingProfile(max_tokens=8)
    with pytest.raises(GraphError, match="thinking=8; expected a ThinkingProfile"):
        Role("solver", Puzzle, Answer, thinking=8)  # type: ignore[arg-type]


def test_only_thinking_changes_a_workflows_fingerprint() -> None:
    def fingerprint(**more: Any) -> str:
        graph = TaskGraph("g", takes=Puzzle, gives=Answer)
        graph.step(Role("solver", Puzzle, Answer, **more))
        return graph.build().fingerprint

    assert fingerprint() == fingerprint(thinking=None)
    assert (
        len({fingerprint(), fingerprint(thinking=THINKING_OFF), fingerprint(thinking=ThinkingProfile(max_tokens=8))})
        == 3
    )


def ask(**fields: Any) -> Ask:
    return Ask(run_id="r", step_path="s", role="solver", messages=(Message(role="user", content="2+2"),), **fields)


@pytest.mark.parametrize(
    ("profile", "thinking"), [(None, ""), (THINKING_OFF, ""), (ThinkingProfile(max_tokens=3), "two and two")]
)
@pytest.mark.anyio
async def test_scripted_thinking_is_cut_at_the_maximum_and_kept_from_the_answer(
    profile: ThinkingProfile | None, thinking: str
) -> None:
    backend, heard = ScriptedBackend({"solver": ["<think>two and two is four</think>the <think> tag: 4"]}), list[str]()
    reply = await backend.reply(ask(thinking=profile), on_text=heard.append)
    assert (reply.thinking, reply.text, "".join(heard)) == (thinking, "the <think> tag: 4", "the <think> tag: 4")
    assert (reply.usage.thinking_tokens, reply.usage.answer_tokens) == (len(thinking.split()), 4)
    assert reply.profile == profile


def test_thinking_answering_and_checking_may_be_steps_of_their_own() -> None:
    """A step's text is an input of later steps; what they read of it again is prompt that no cache had."""
    thinker = Role("thinker", {"puzzle": Puzzle}, str, instructions="Think aloud; do not answer.")
    answerer = Role("answerer", {"puzzle": Puzzle, "thought": str}, Answer)
    checker = Role("checker", {"thought": str, "answer": Answer}, Verdict, thinking=ThinkingProfile(max_tokens=5))
    graph = TaskGraph("think-answer-verify", takes=Puzzle, gives=Answer)
    think = graph.step(thinker)
    answer = graph.step(answerer, after=think)
    graph.step(checker, after=answer)
    backend = ScriptedBackend(
        {
            "thinker": ["two and two is four"],
            "answerer": [Answer(value=4)],
            "checker": ['<think>is it four</think>{"correct": true}'],
        }
    )
    assignment = {"roles": {"answerer": {"thinking": "off", "thinking_rounds": {2: 9}}}}
    store = RunStore(":memory:")

    async def run() -> Any:
        from metier.router import Assignment

        async with open_session(
            backend=backend, assignment=Assignment.model_validate(assignment), store=store
        ) as session:
            value = await session.run(graph, Puzzle(text="2+2"))
            return value, session.report()

    value, report = anyio.run(run)
    assert value == Answer(value=4)
    by_role = {a.role: a for a in backend.asks}
    assert "two and two is four" in by_role["answerer"].messages[-1].content
    assert "is it four" not in "".join(m.content for a in backend.asks for m in a.messages)
    profiles = {role: a.thinking for role, a in by_role.items()}
    assert profiles == {"thinker": None, "answerer": THINKING_OFF, "checker": ThinkingProfile(max_tokens=5)}
    rows = {row["role"]: row for row in store.query("SELECT * FROM asks")}
    assert (rows["checker"]["thinking"], rows["checker"]["thinking_tokens"]) == ("is it four", 3)
    assert rows["checker"]["thinking_profile"] == ThinkingProfile(max_tokens=5).model_dump_json()
    assert rows["thinker"]["thinking_profile"] is None
    assert [row.thinking for row in store.traffic() if row.role == "checker"] == ["is it four"]
    assert "| checker | " in report and "thinking" in report
    store.close()


def test_a_profiles_error_is_one_of_ours() -> None:
    with pytest.raises(MetierError, match="Raise max_tokens, or lower min_tokens"):
        Role("solver", Puzzle, Answer, thinking=ThinkingProfile(max_tokens=1, min_tokens=2))
