"""What is recorded comes back as it was, or the build of the graph says that it would not."""

from __future__ import annotations

import datetime
import enum
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    RootModel,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    computed_field,
    field_serializer,
)
from pydantic.dataclasses import dataclass

from metier.agents import GraphError, Role, TaskGraph
from metier.agents.recorded_values import dump, load
from metier.runtime import RunStore
from metier.runtime.store.records import StepRecord


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Plain(BaseModel):
    text: str
    number: int
    share: float
    sure: bool | None = None


class Swapped(BaseModel):
    """Each field goes by the name of the other."""

    model_config = ConfigDict(extra="forbid")

    first: float = Field(alias="second")
    second: int = Field(alias="first")


class Aliased(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    camel: str = Field("", alias="camelCase")
    read: int = Field(validation_alias=AliasChoices("READ", "Read"))
    written: int = Field(0, serialization_alias="WRITTEN")
    inner: list[Swapped] = []


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    side: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> int:
        """Its area."""
        return self.side**2


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    known: Computed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        """Twice its side."""
        return 2 * self.known.side


class Tree(BaseModel):
    label: str
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    name: str


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Pet(BaseModel):
    animal: Annotated[Cat | Dog, Field(discriminator="kind")]
    other: Cat | Dog | None = None


class Times(BaseModel):
    day: datetime.date
    at: datetime.datetime
    length: datetime.timedelta
    clock: datetime.time


class Kinds(BaseModel):
    colour: Colour
    level: Level
    exact: Decimal
    id: uuid.UUID
    place: Path
    pair: tuple[int, str]
    many: tuple[float, ...]
    some: frozenset[int]
    named: dict[Colour, list[float]]
    by_number: dict[int, Plain]
    either: int | str | None
    sized: Annotated[int, Field(ge=0, lt=10)]
    word: Annotated[str, Field(max_length=5)]
    data: Json[list[int]]


class Bytes(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    data: bytes


class Numbers(RootModel[list[float]]):
    pass


class Point(NamedTuple):
    x: int
    y: float


@dataclass
class Place:
    at: tuple[float, float]
    name: str = Field(alias="Name")


INTS = st.integers(-(2**70), 2**70)
FLOATS = st.floats()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.builds(Plain, text=TEXTS, number=INTS, share=FLOATS, sure=st.none() | st.booleans())
SWAPPED = st.builds(Swapped, second=FLOATS, first=INTS)
COMPUTED = st.builds(Computed, side=INTS)
PETS = st.builds(Cat, name=TEXTS) | st.builds(Dog, name=TEXTS)
TREES = st.recursive(
    st.builds(Tree, label=TEXTS), lambda inner: st.builds(Tree, label=TEXTS, children=st.lists(inner, max_size=3))
)
KINDS = st.builds(
    Kinds,
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    exact=st.decimals(allow_nan=False, allow_infinity=False),
    id=st.uuids(),
    place=st.just(Path("a/b c")),
    pair=st.tuples(INTS, TEXTS),
    many=st.lists(FLOATS, max_size=3).map(tuple),
    some=st.frozensets(INTS, max_size=3),
    named=st.dictionaries(st.sampled_from(Colour), st.lists(FLOATS, max_size=2)),
    by_number=st.dictionaries(INTS, PLAIN, max_size=2),
    either=st.none() | INTS | TEXTS,
    sized=st.integers(0, 9),
    word=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    data=st.lists(st.integers(-9, 9), max_size=2).map(str),
)
ZOO: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Plain, PLAIN),
    (Swapped, SWAPPED),
    (
        Aliased,
        st.builds(Aliased, camelCase=TEXTS, READ=INTS, written=INTS, inner=st.lists(SWAPPED, max_size=2)),
    ),
    (Computed, COMPUTED),
    (Open, st.builds(Open, known=COMPUTED, more=st.integers(), twice_more=TEXTS)),
    (Tree, TREES),
    (Pet, st.builds(Pet, animal=PETS, other=st.none() | PETS)),
    (
        Times,
        st.builds(
            Times, day=st.dates(), at=st.datetimes(timezones=st.just(datetime.UTC)), clock=st.times(),
            length=st.timedeltas(datetime.timedelta(-9999), datetime.timedelta(9999)),
        ),
    ),
    (Kinds, KINDS),
    (Bytes, st.builds(Bytes, data=st.binary())),
    (Numbers, st.builds(Numbers, st.lists(FLOATS, max_size=3))),
    (Point, st.builds(Point, INTS, FLOATS)),
    (Place, st.builds(Place, at=st.tuples(FLOATS, FLOATS), Name=TEXTS)),
    (list[Computed | Plain], st.lists(COMPUTED | PLAIN, max_size=3)),
    (dict[str, Swapped | None], st.dictionaries(TEXTS, st.none() | SWAPPED, max_size=3)),
    (float, FLOATS),
    (str, TEXTS),
    (int, INTS),
    (bool | None, st.none() | st.booleans()),
]  # fmt: skip


def through_store(store: RunStore, text: str) -> str:
    """The text after it was in a store."""
    run = str(uuid.uuid4())
    store.record_step(run, StepRecord("step", "", "done", text, "key", 0.0))
    kept = store.finished_steps(run)["step"][0]
    assert kept is not None
    return kept


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ZOO).flatmap(lambda one: st.tuples(st.just(one[0]), one[1])))
@example((Plain, Plain(text="", number=0, share=math.nan)))
@example((Swapped, Swapped(second=-math.inf, first=2)))
def test_what_was_recorded_comes_back(drawn: tuple[Any, Any]) -> None:
    kind, value = drawn
    with RunStore(":memory:") as store:
        same, text = dump(value, kind)
        assert same is value
        back = load(through_store(store, text), kind)
        assert type(back) is type(value) and (back == value or dump(back, kind)[1] == text)
        assert dump(back, kind)[1] == text


@pytest.mark.parametrize(
    "value",
    [
        Plain(text="ä", number=2**80, share=0.1),
        Tree(label="a", children=[Tree(label="b")]),
        Computed(side=2),
        Pet(animal=Dog(name="Rex")),
        Kinds.model_construct(exact=Decimal("1.50"), some=frozenset({1})),
    ],
)
def test_ordinary_values_are_written_as_before(value: BaseModel) -> None:
    """Stores, reports and traffic of earlier versions hold the same text."""
    if not isinstance(value, Kinds):
        assert dump(value, type(value))[1] == value.model_dump_json()
        assert dump([value], list[type(value)])[1] == f"[{value.model_dump_json()}]"  # type: ignore[misc]


@pytest.mark.parametrize(
    "value", [Aliased(camelCase="a", READ=2, written=3), Computed(side=2), Open(known=Computed(side=1))]
)
def test_what_earlier_versions_wrote_is_read(value: BaseModel) -> None:
    if not isinstance(value, Open):
        assert load(value.model_dump_json(by_alias=False), type(value)) == value
    assert load(value.model_dump_json(round_trip=True, by_alias=False), type(value)) == value
    by_alias = TypeAdapter(Swapped).dump_json(Swapped(second=1.0, first=2), by_alias=True)
    assert load(TypeAdapter(Cat).dump_json(Cat(name="a"), by_alias=True).decode(), Cat) == Cat(name="a")
    assert b'"second":1.0' in by_alias


class Accepted(BaseModel):
    why: str


class Refused(BaseModel):
    why: str


class Child(Accepted):
    more: int


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        (Refused(why="no"), Accepted | Refused, "read back as Accepted"),
        ([Refused(why="no")], list[Accepted | Refused], "read back as"),
        (Child(why="yes", more=1), Accepted, "read back as Accepted"),
        pytest.param(10**4300, int, "number|digits", id="4,301 digits"),
        ("\ud83d", str, "surrogates|utf-8"),
        (Plain.model_construct(text=3, number=1, share=1.0), Plain, "valid string"),
    ],
)
def test_what_would_come_back_as_another_is_refused(value: Any, kind: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dump(value, kind)


def test_a_type_that_says_less_gives_what_it_says() -> None:
    assert dump((1, datetime.date(2026, 1, 2)), Any) == ([1, "2026-01-02"], '[1,"2026-01-02"]')


class Key(BaseModel):
    key: SecretStr


class Deep(BaseModel):
    tree: dict[str, list[Key | None]]


class Raw(BaseModel):
    raw: Annotated[SecretBytes | None, Field(description="x")] = None


class Hidden(BaseModel):
    shown: int
    hidden: int = Field(0, exclude=True)


class Shown(BaseModel):
    key: SecretStr

    @field_serializer("key")
    def _write(self, key: SecretStr) -> str:
        return key.get_secret_value()


@pytest.mark.parametrize(
    ("kind", "field"),
    [(Key, r"Key\.key"), (Deep, r"Key\.key"), (Raw, r"Raw\.raw"), (Hidden, r"Hidden\.hidden")],
)
def test_what_cannot_be_recorded_is_said_when_the_graph_is_built(kind: type[BaseModel], field: str) -> None:
    takes = TaskGraph("g", takes=kind, gives=str)
    takes.step(Role("a", takes=kind, gives=str))
    with pytest.raises(GraphError, match=rf"the input of graph 'g' has {field}, which is "):
        takes.build()
    gives = TaskGraph("g", takes=Plain, gives=kind)
    gives.step(Role("a", takes=Plain, gives=kind))
    with pytest.raises(GraphError, match=rf"what step 'a' gives has {field}.*Keep secrets out"):
        gives.build()


def test_a_secret_that_writes_itself_is_recorded() -> None:
    graph = TaskGraph("g", takes=Shown, gives=str)
    graph.step(Role("a", takes=Shown, gives=str))
    graph.build()
    value = Shown(key=SecretStr("open"))
    assert load(dump(value, Shown)[1], Shown) == value
