"""A step's values: content keys of inputs, outputs of their type, and calls of function steps."""

from __future__ import annotations

import hashlib
import inspect
import json
import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ...agents.content_hash import content_hash
from ...agents.errors import MetierError, StepError
from ...agents.graphs.nodes import BuiltNode
from ...agents.messages import Message
from ...agents.recorded_values import as_json, dump, in_one_order, type_adapter
from ..worker_threads import run_in_thread

__all__ = ["call_function", "content_key", "gives_each", "typed_output"]


async def call_function(function: Callable[..., Any], path: str, inputs: dict[str, Any]) -> Any:
    """Call the function of the step at `path`: async ones here, others in a worker thread; raises StepError."""
    try:
        if inspect.iscoroutinefunction(function):
            return await function(**inputs)
        return await run_in_thread(partial(function, **inputs))
    except MetierError:
        raise
    except Exception as error:
        raise StepError(
            f"function step {path!r} raised {type(error).__name__}: {error}",
            expected="a result of the annotated type",
            remedy="Mend the function and resume the run: it goes on from here.",
        ) from error


def content_key(messages: tuple[Message, ...] | None, inputs: dict[str, Any]) -> str:
    """Hash of a step's prompt, or of a function's inputs. A check on resume, never the identity."""
    if messages is not None:
        prompt = "".join(f"{message.role}\0{message.content}\0" for message in messages)
        return hashlib.sha256(prompt.encode()).hexdigest()[:16]
    plain = {name: _as_plain(v) if isinstance(v, BaseModel) else v for name, v in inputs.items()}
    try:
        return content_hash(plain, as_json=_as_plain)
    except TypeError:  # a dict with names that are no text, such as members of an enum
        return content_hash(json.loads(as_json(inputs)))


def _as_plain(value: Any) -> Any:
    try:
        own = isinstance(value, BaseModel)
        return in_one_order(value, value.model_dump(mode="json") if own else _ANYTHING.dump_python(value, mode="json"))
    except ValueError:  # bytes that are no text
        return json.loads(as_json(value))


_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def gives_each(node: BuiltNode) -> Any:
    """Type that one run of a step gives: of a fan-out, the type of one item."""
    if node.each is None:
        return node.gives
    return node.gives.__args__[0]


def typed_output(output: Any, gives: Any, path: str, *, parsed: bool = False) -> tuple[Any, str]:
    """A step's output as the type it gives, and as JSON; raises StepError when it is not of that type.

    What was `parsed` from a reply is of that type; some types (base64, JSON in text) could not be read a second time.

    A run and its resumption then see the same value, also where a function returned another type.
    """
    try:
        own = parsed or (isinstance(output, BaseModel) and type(output) is gives)
        return dump(output if own else type_adapter(gives).validate_python(output), gives)
    except ValueError as error:
        raise StepError(
            f"step {path!r} gave {reprlib.repr(output)}: {error}",
            expected=f"a value of its annotated type {gives!r} that a resumed run reads back as it was",
            remedy="Return what the annotation says, or correct the annotation (a discriminator tells members of a "
            "union apart, val_json_bytes='base64' with ser_json_bytes keeps bytes).",
        ) from error
