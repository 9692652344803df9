"""The one reader of text, JSON and YAML from files: bounded, and everything wrong with it is one named error.

Parsers of such text raise many kinds of errors, and take for good what breaks later: repeated keys, numbers that no
store or engine holds, aliases that grow without end, a thousand levels. All of it is refused here, by place.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from .errors import MetierError

__all__ = [
    "DEEPEST_LEVELS",
    "MOST_JSON_MIB",
    "MOST_LINE_MIB",
    "MOST_SEED",
    "MOST_VALUES",
    "MOST_YAML_MIB",
    "UnreadableTextError",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "read_bounded",
    "read_lines",
    "read_yaml_mapping",
    "shown",
]

MOST_YAML_MIB = 1
"""Largest YAML file read, in MiB: its parser takes seconds for one of this size."""

MOST_JSON_MIB = 64
"""Largest JSON file read, in MiB."""

MOST_LINE_MIB = 16
"""Longest line of a file that is read by lines, in MiB."""

DEEPEST_LEVELS = 64
"""How many lists and mappings may stand in each other."""

MOST_VALUES = 1_000_000
"""Values that a YAML file may hold, those counted again that an alias repeats."""

MOST_SEED = 2**32 - 1
"""Highest seed: NumPy and PyTorch take 32 bits everywhere."""

_LOWEST_NUMBER, _HIGHEST_NUMBER = -(2**63), 2**64 - 1
_SHOWN_CHARACTERS = 200


class UnreadableTextError(ValueError):
    """A file or text cannot be read; callers turn it into the error of what it was to be."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device, which would be waited for, is refused.

    Raises: UnreadableTextError saying what is wrong; FileNotFoundError when there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableTextError(f"it cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnreadableTextError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, *, most_mib: int = MOST_JSON_MIB) -> str:
    """Text of a regular file of at most `most_mib` MiB in UTF-8.

    Raises: UnreadableTextError saying what is wrong; FileNotFoundError when there is no such file.
    """
    with open_regular(path) as file:
        try:
            data = file.read(most_mib * 2**20 + 1)
        except OSError as error:
            raise UnreadableTextError(f"it cannot be read: {error.strerror}") from error
    if len(data) > most_mib * 2**20:
        raise UnreadableTextError(f"it is larger than {most_mib} MiB")
    return _decoded(data, first_line=1)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a regular file in UTF-8, one at a time; nothing but a line feed ends a line.

    Raises: UnreadableTextError saying what is wrong; FileNotFoundError when there is no such file.
    """
    most = MOST_LINE_MIB * 2**20
    number = 0
    with open_regular(path) as file:
        while True:
            number += 1
            try:
                line = file.readline(most + 1)
            except OSError as error:
                raise UnreadableTextError(f"it cannot be read: {error.strerror}") from error
            if not line:
                return
            if len(line) > most:
                raise UnreadableTextError(f"line {number} is longer than {MOST_LINE_MIB} MiB")
            yield number, _decoded(line, first_line=number).removesuffix("\n")


def parse_json(text: str | bytes, *, lenient: bool = False) -> Any:
    """The value of a JSON text; `lenient` takes keys and values as parsers do, for files that other tools write.

    Raises: UnreadableTextError saying what is wrong.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if lenient else _without_repeats)
    except UnreadableTextError:
        raise
    except RecursionError as error:
        raise UnreadableTextError(f"it is nested deeper than {DEEPEST_LEVELS} levels") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and numbers of thousands of digits
        raise UnreadableTextError(f"it is not JSON: {error}") from error
    if not lenient:
        _check_values(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of one YAML document of plain types; None for an empty text.

    Raises: UnreadableTextError saying what is wrong, with the line where that is known.
    """
    try:
        _check_levels(text)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except UnreadableTextError:
        raise
    except yaml.YAMLError as error:
        raise UnreadableTextError(f"it is not YAML: {_in_a_line(error)}") from error
    except Exception as error:  # YAML's own constructors raise KeyError, AttributeError and more for wrong tags
        raise UnreadableTextError(f"it holds a value that YAML cannot read: {type(error).__name__}: {error}") from error
    _check_values(value)
    return value


def read_yaml_mapping(path: Path, raises: type[MetierError], what: str, expected: str) -> dict[str, Any]:
    """Fields and values of a YAML file, none for an empty one; `what` it is and what was `expected` are for errors.

    Raises: `raises`, naming the file and what is wrong with it.
    """
    try:
        content = parse_yaml(read_bounded(path, most_mib=MOST_YAML_MIB))
    except FileNotFoundError as error:
        raise raises(
            f"{what} {path} cannot be read: no such file", expected=expected, remedy="Correct the path."
        ) from error
    except UnreadableTextError as error:
        raise raises(f"{what} {path} cannot be read: {error}", expected=expected, remedy="Correct the file.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise raises(
            f"{what} {path} holds {type(content).__name__} {shown(content)}",
            expected=expected,
            remedy="Correct the file.",
        )
    for key in content:
        if not isinstance(key, str):
            problem = f"{what} {path} has the key {shown(key)}"
            raise raises(problem, expected="names as keys", remedy="Correct the file.")
    return content


def shown(value: object) -> str:
    """A value as errors show it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a structure of thousands of levels
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _decoded(data: bytes, *, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise UnreadableTextError(f"line {line} is not UTF-8 text (byte 0x{data[error.start]:02x})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableTextError(f"the key {shown(repeated)} stands twice in one object")
    return found


def _check_levels(text: str) -> None:
    """Read the document's events, which takes no recursion, before anything is built of them."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > DEEPEST_LEVELS:
                line = event.start_mark.line + 1 if event.start_mark is not None else 0
                raise UnreadableTextError(f"line {line} is nested deeper than {DEEPEST_LEVELS} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1


def _check_nodes(root: yaml.Node) -> None:
    """Refuse repeated keys, aliases that hold themselves, and aliases that repeat too much."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in inside:
            raise UnreadableTextError(f"line {node.start_mark.line + 1} holds itself by an alias")
        if id(node) not in sizes:
            inside.add(id(node))
            children: Iterable[yaml.Node] = node.value
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                children = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, children))
            inside.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UnreadableTextError(f"its aliases make more than {MOST_VALUES} values of it")


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise UnreadableTextError(f"line {key.start_mark.line + 1}: the key {shown(key.value)} stands twice")
            seen.add((key.tag, key.value))


def _check_values(value: Any) -> None:
    """Refuse depth, and single values that files, stores and engines do not take."""
    levels = [[value]]
    while levels:
        if not levels[-1]:
            levels.pop()
            continue
        one = levels[-1].pop()
        if isinstance(one, str):
            _check_text(one)
        elif isinstance(one, int) and not _LOWEST_NUMBER <= one <= _HIGHEST_NUMBER:
            raise UnreadableTextError(f"the number {shown(one)} is too large: no more than 64 bits are read")
        elif isinstance(one, dict | list | tuple | set):
            if len(levels) > DEEPEST_LEVELS:
                raise UnreadableTextError(f"it is nested deeper than {DEEPEST_LEVELS} levels")
            levels.append([part for pair in one.items() for part in pair] if isinstance(one, dict) else list(one))


def _check_text(text: str) -> None:
    if "\0" in text:
        raise UnreadableTextError(f"the text {shown(text)} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnreadableTextError(f"the text {shown(text)} holds half a character (a lone surrogate)") from error


def _in_a_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem
