"""The graph's own input can be named wherever a step can: in inputs, in over, in conditions, and by its fields."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from metier.agents import GraphError, Role, ScriptedBackend, TaskGraph
from metier.agents.graphs.nodes import GraphInput, GraphInputField, StepOutput
from metier.agents.graphs.pictures import to_mermaid
from metier.runtime import open_session

pytestmark = pytest.mark.anyio


class Text(BaseModel):
    body: str


class Library(BaseModel):
    texts: list[str]
    language: str = "en"


class Digest(BaseModel):
    digest: str


rewrite = Role("rewrite", takes=Text, gives=Text)
compare = Role("compare", takes={"original": Text, "rewritten": Text}, gives=Text)
summarise = Role("summarise", takes={"text": str, "language": str}, gives=Text)


async def test_a_chain_of_one_type_names_the_input() -> None:
    graph = TaskGraph("chain", takes=Text, gives=Text)
    first = graph.step(rewrite)
    graph.returns(graph.step(compare, after=first, inputs={"original": graph.input, "rewritten": first}))
    assert graph.build().body["compare"].sources == {"original": GraphInput(), "rewritten": StepOutput(0, ("rewrite",))}
    backend = ScriptedBackend(
        {"rewrite": [Text(body="new")], "compare": lambda ask: Text(body=ask.messages[1].content)}
    )
    async with open_session(backend=backend, store=":memory:") as session:
        assert (await session.run(graph, Text(body="old"))).body.startswith("# original\nold\n\n# rewritten\nnew\n\n")


def test_the_error_of_an_ambiguous_input_says_how_the_graphs_own_is_named() -> None:
    graph = TaskGraph("chain", takes=Text, gives=Text)
    graph.step(compare, after=graph.step(rewrite))
    with pytest.raises(GraphError, match=r"rewrite, the graph's input.*graph\.input"):
        graph.build()


@pytest.mark.parametrize("named", ["object", "text"])
@pytest.mark.parametrize("in_a_loop", [False, True])
async def test_a_map_over_a_field_of_the_input(named: str, in_a_loop: bool) -> None:
    def join(texts: list[Text]) -> Digest:
        return Digest(digest=",".join(text.body for text in texts))

    graph = TaskGraph("reduce", takes=Library, gives=Digest)
    texts: Any = graph.input.field("texts") if named == "object" else "input.texts"
    language: Any = graph.input.field("language") if named == "object" else "input.language"

    def steps() -> None:
        graph.step(join, after=graph.map(summarise, over=texts, inputs={"language": language}))

    if in_a_loop:
        with graph.loop("again", max_rounds=2):
            steps()
    else:
        steps()
        assert graph.build().body["summarise"].sources["text"] == GraphInputField("texts")
        assert "input --> n_summarise" in to_mermaid(graph.build())
    backend = ScriptedBackend({"summarise": lambda ask: Text(body=ask.messages[1].content.split("\n")[1].upper())})
    async with open_session(backend=backend, store=":memory:") as session:
        assert await session.run(graph, Library(texts=["a", "b"])) == Digest(digest="A,B")


async def test_a_condition_reads_the_input() -> None:
    def shout(text: Text) -> Digest:
        return Digest(digest=text.body.upper())

    def say(text: Text) -> Digest:
        return Digest(digest=text.body)

    graph = TaskGraph("g", takes=Text, gives=Digest)
    loud = graph.step(shout, when=lambda s: s[graph.input].body.endswith("!"))
    graph.returns(loud, graph.step(say, when=lambda s: not s[graph.input].body.endswith("!")))
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        assert await session.run(graph, Text(body="hey!")) == Digest(digest="HEY!")
        assert await session.run(graph, Text(body="hey")) == Digest(digest="hey")


def test_a_step_called_input_comes_first_and_fields_of_steps_can_be_written_as_text() -> None:
    def split(text: Text) -> Library:
        return Library(texts=text.body.split())

    graph = TaskGraph("g", takes=Text, gives=list[Text])
    graph.step(split, name="input")
    graph.map(summarise, over="input.texts", inputs={"language": "input.language"})
    assert graph.build().body["summarise"].sources["text"] == StepOutput(0, ("input",), "texts")


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ("input.txts", "takes Library, which has no field 'txts'"),
        ("input.language", "fans out over str"),
        ("imput.texts", "unknown step 'imput.texts'"),
        (TaskGraph("other", takes=Library, gives=Digest).input, "unknown step 'other:input'"),
    ],
)
def test_what_the_input_has_not_is_named(over: Any, why: str) -> None:
    graph = TaskGraph("g", takes=Library, gives=list[Text])
    graph.map(summarise, over=over, inputs={"language": "input.language"})
    with pytest.raises(GraphError, match=why):
        graph.build()
    with pytest.raises(GraphError, match="no field 'txts'"):
        graph.input.field("txts")


def test_notes_beside_a_type_are_no_part_of_it() -> None:
    """A function's parameter and a role's answer with the same bounds, each written out."""

    def add(numbers: list[Annotated[int, Field(ge=0)]], more: Annotated[int, Field(ge=0)]) -> Digest:
        return Digest(digest=f"{sum(numbers) + more}")

    graph = TaskGraph("g", takes=Library, gives=Digest)
    each = graph.map(Role("count", takes={"text": str}, gives=Annotated[int, Field(ge=0)]), over="input.texts")
    more = graph.step(Role("guess", takes=Library, gives=Annotated[int, Field(ge=0)]))
    graph.step(add, after=[each, more])
    assert graph.build().body["add"].sources["more"] == StepOutput(0, ("guess",))
