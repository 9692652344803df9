"""Sixty answer types of every kind that people write, and types that no model can be asked for."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import ipaddress
import uuid
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeVar

from pydantic import (
    UUID4,
    AfterValidator,
    AliasChoices,
    AliasPath,
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    IPvAnyAddress,
    Json,
    PositiveInt,
    RootModel,
    SecretStr,
    StrictBool,
    StringConstraints,
    conlist,
    create_model,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Flat(BaseModel):
    text: str
    number: int
    share: float
    sure: bool
    words: list[str]
    table: list[list[int]]


class Address(BaseModel):
    street: str = Field(description="without the number")
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    """A docstring, which is for readers of the code."""

    first: str = Field(alias="firstName", description="given name only")
    colour: Colour
    address: Address


class Optionals(BaseModel):
    name: str
    nick: str | None = None
    age: int | None
    tags: list[str] = []


class Tree(BaseModel):
    label: str
    children: list[Tree] = []


class Chain(BaseModel):
    value: int
    next: Chain | None = None


class Even(BaseModel):
    left: Odd | None = None


class Odd(BaseModel):
    right: Even | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    name: str


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Names(RootModel[list[str]]):
    pass


class Score(RootModel[int]):
    pass


class Box(BaseModel, Generic[T]):
    content: T


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    number: int
    when: datetime.date


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    known: int


class Choices(BaseModel):
    number: int = Field(validation_alias=AliasChoices("No", "no"))
    both: str = Field(alias="Both", serialization_alias="both_out")


class ByName(BaseModel):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)
    number: int = Field(alias="No")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=lambda name: "".join(map(str.title, name.split("_"))))
    given_name: str
    home_town: str


class Range(BaseModel):
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Validated(BaseModel):
    word: str

    @field_validator("word")
    @classmethod
    def _lower(cls, word: str) -> str:
        return word.lower()


class Point(NamedTuple):
    x: int
    y: float


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


@dataclasses.dataclass
class Place:
    at: tuple[float, float]
    name: str = "here"


class Odds(BaseModel):
    """Rules that grammars cannot hold; the type does."""

    fives: Annotated[int, Field(multiple_of=5)]
    word: Annotated[str, Field(pattern="^[a-z]+$", max_length=4)]
    ends: Annotated[str, Field(pattern=r"^a\b")]
    some: set[int]


wide = create_model("Wide", **{f"field_{n}": (int, ...) for n in range(40)})  # type: ignore[call-overload]
Deep: Any = int
for _ in range(12):
    Deep = list[Deep]

YES: dict[str, Any] = {
    "flat": Flat,
    "person": Person,
    "optionals": Optionals,
    "tree": Tree,
    "chain": Chain,
    "mutual": Even,
    "union": Cat | Dog,
    "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")],
    "root-list": Names,
    "root-int": Score,
    "generic": Box[int],
    "generic-nested": Box[list[Address]],
    "strict": Strict,
    "open": Open,
    "choices": Choices,
    "by-name": ByName,
    "camel": Camel,
    "range": Range,
    "validated": Validated,
    "namedtuple": Point,
    "typeddict": Movie,
    "dataclass": Place,
    "odds": Odds,
    "wide": wide,
    "deep": Deep,
    "int": int,
    "float": float,
    "bool": bool,
    "finite": FiniteFloat,
    "positive": PositiveInt,
    "strict-bool": StrictBool,
    "between": Annotated[int, Field(ge=-5, lt=100)],
    "share": Annotated[float, Field(ge=0, le=1)],
    "huge-bound": Annotated[int, Field(ge=0, le=10**30)],
    "multiple": Annotated[int, Field(multiple_of=5)],
    "decimal": Decimal,
    "short": Annotated[str, Field(min_length=2, max_length=4)],
    "pattern": Annotated[str, StringConstraints(pattern="^[A-Z]{3}-[0-9]{2}$")],
    "enum": Colour,
    "int-enum": Level,
    "literal": Literal["yes", "no", 3, None, True],
    "date": datetime.date,
    "datetime": datetime.datetime,
    "aware": AwareDatetime,
    "time": datetime.time,
    "duration": datetime.timedelta,
    "uuid": uuid.UUID,
    "uuid4": UUID4,
    "path": Path,
    "bytes": bytes,
    "base64": Base64Bytes,
    "url": AnyUrl,
    "ip": IPvAnyAddress,
    "network": ipaddress.IPv4Network,
    "json": Json[list[int]],
    "list": list[int],
    "models": list[Person],
    "some": conlist(int, min_length=1, max_length=3),
    "set": set[int],
    "frozenset": frozenset[Colour],
    "tuple": tuple[int, str],
    "many": tuple[float, ...],
    "sequence": Sequence[int],
    "deque": collections.deque[int],
    "dict": dict[str, int],
    "by-number": dict[int, str],
    "by-enum": dict[Colour, int],
    "by-short": dict[Annotated[str, Field(max_length=3)], int],
    "by-pattern": dict[Annotated[str, Field(pattern="^[a-c]+$")], int],
    "either": int | str | None,
    "mixed": list[int | str | Address],
    "anything": Any,
    "object": dict[str, Any],
    "after": Annotated[int, AfterValidator(lambda number: number + 1)],
}
"""Types that a model can be asked for."""

WEAK = frozenset(
    ("range", "odds", "strict", "huge-bound", "multiple", "path", "bytes", "base64", "url", "ip", "network", "json",
     "set", "date", "datetime", "aware", "time", "duration", "by-pattern", "choices")
)  # fmt: skip
"""Those with rules that no grammar holds: a reply may break them, and is then refused and corrected."""


class Endless(BaseModel):
    again: Endless


class Left(BaseModel):
    right: Right


class Right(BaseModel):
    lefts: Annotated[list[Left], Field(min_length=1)]


class Far(BaseModel):
    number: int = Field(validation_alias=AliasPath("inner", "number"))


class Unknown:
    pass


class Arbitrary(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    what: Unknown


class Calls(BaseModel):
    what: Callable[[int], int]


class Key(BaseModel):
    key: SecretStr


class Hidden(BaseModel):
    hidden: int = Field(exclude=True)


TooDeep: Any = int
for _ in range(70):
    TooDeep = list[TooDeep]

NO: dict[str, tuple[Any, str]] = {
    "endless": (Endless, "Endless holds itself without end"),
    "endless in two": (Left, "holds itself without end"),
    "far": (Far, r"Far\.number is read from inside another field"),
    "arbitrary": (Arbitrary, "JsonSchema"),
    "calls": (Calls, "JsonSchema"),
    "class": (type[int], r"allows null, which it refuses"),
    "iterator": (Iterable[int], "an iterator can be read only once"),
    "secret": (Key, r"Key\.key"),
    "excluded": (Hidden, r"Hidden\.hidden"),
    "crossed": (Annotated[int, Field(ge=5, le=1)], "its bounds leave no number"),
    "crossed length": (Annotated[str, Field(min_length=5, max_length=1)], "at least 5 and at most 1"),
    "empty": (enum.Enum("Empty", {}), "choice is empty"),
    "too deep": (TooDeep, "levels deep"),
    "too long": (Literal[tuple(f"choice number {n}" for n in range(20_000))], "characters, at most"),
}
"""Types that no model can be asked for, and what the error says of them."""
