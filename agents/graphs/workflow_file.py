"""Load a workflow and its tasks from a Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backend import ScriptedBackend
from ..errors import GraphError, MetierError, TaskSetError
from ..tasksets import Task, TaskSet
from ..text_files import MOST_SEED
from ..user_code import told_at_users_line, users_line
from .graph import TaskGraph
from .nodes import WORKFLOW_MODULE, BuiltGraph

__all__ = ["Verifier", "WorkflowFile", "load_workflow"]

MOST_TASKS = 1_000_000
"""Most tasks that one spec may ask for."""

Verifier = Callable[[Task, Any], float]
"""Scores one role's answer to a task, 0.0 to 1.0, apart from the workflow's own score."""


class WorkflowFile:
    """A Python file that defines a TaskGraph (`graph`, or the one named) and, if it has tasks, `tasks`."""

    def __init__(self, path: Path, module: ModuleType, graph: TaskGraph) -> None:
        self.path = path
        with _told_at_users_line(path):
            self.graph: BuiltGraph = graph.build()
        self._module = module

    def tasks(self, spec: str) -> TaskSet:
        """The tasks of a spec `split:size` or `split:size:seed`, from the file's `tasks(split, size, seed)`.

        Raises: TaskSetError when the spec cannot be read or the file has no tasks.
        """
        make = getattr(self._module, "tasks", None)
        if not callable(make):
            raise TaskSetError(
                f"{self.path} defines no `tasks`",
                expected="a function tasks(split, size, seed) that returns a TaskSet",
                remedy="Define it, or give one input with --input.",
            )
        split, _, rest = spec.partition(":")
        size, _, seed = rest.partition(":")
        counts = _is_count(size, MOST_TASKS) and _is_count(seed or "0", MOST_SEED)
        if split not in ("train", "tune", "test") or not counts:
            raise TaskSetError(
                f"task spec {spec!r} cannot be read",
                expected="split:size or split:size:seed, with split train, tune or test, "
                f"size up to {MOST_TASKS} and seed up to {MOST_SEED}",
                remedy="For example: --tasks test:24.",
            )
        with _told_at_users_line(self.path):
            tasks = make(split, int(size), int(seed or 0))
        if not isinstance(tasks, TaskSet):
            raise TaskSetError(f"{self.path}: `tasks` gives {type(tasks).__name__}", expected="a TaskSet")
        return tasks

    def verifiers(self) -> dict[str, Verifier]:
        """The file's own `verifiers` of the workflow's roles: functions of the task and the role's answer.

        Raises: GraphError when one is for a role that no workflow of the file has.
        """
        given: dict[str, Verifier] = getattr(self._module, "verifiers", {})
        if not isinstance(given, dict):
            raise GraphError(f"{self.path}: `verifiers` is {type(given).__name__}", expected="role → function")
        others = (graph.build() for graph in vars(self._module).values() if isinstance(graph, TaskGraph))
        known = set(self.graph.roles()).union(*(graph.roles() for graph in others)) if given else set()
        unknown = sorted(set(given) - known)
        if unknown:
            raise GraphError(
                f"{self.path}: `verifiers` names the unknown role {unknown[0]!r}",
                expected=f"one of {', '.join(sorted(known))}",
            )
        return {role: verifier for role, verifier in given.items() if role in self.graph.roles()}

    @property
    def has_scripted(self) -> bool:
        """Whether the file has a `scripted()` backend."""
        return callable(getattr(self._module, "scripted", None))

    def scripted(self) -> ScriptedBackend:
        """The file's own `scripted()` backend, to try a workflow without a model.

        Raises: GraphError when the file defines none.
        """
        make = getattr(self._module, "scripted", None)
        if not callable(make):
            raise GraphError(
                f"{self.path} defines no `scripted`",
                expected="a function scripted() that returns a ScriptedBackend",
                remedy="Define it, or use --engine embedded.",
            )
        with _told_at_users_line(self.path):
            backend = make()
        if not isinstance(backend, ScriptedBackend):
            raise GraphError(f"{self.path}: `scripted` gives {type(backend).__name__}", expected="a ScriptedBackend")
        return backend


def load_workflow(reference: str) -> WorkflowFile:
    """Load `file.py` or `file.py:name`; files beside it can be imported by it.

    Raises: GraphError when the file, or the graph in it, is not there or wrong; what the file itself raises is told
    by its line.
    """
    file, _, name = reference.partition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise GraphError(f"no workflow file {file!r}", expected="a Python file that defines `graph`")
    if path.suffix != ".py":
        raise GraphError(f"workflow file {file!r} is not a .py file", expected="a Python file that defines `graph`")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module_name = f"{WORKFLOW_MODULE}{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with _told_at_users_line(path):
        spec.loader.exec_module(module)
    graph = getattr(module, name or "graph", None)
    if not isinstance(graph, TaskGraph):
        there = sorted(n for n, v in vars(module).items() if isinstance(v, TaskGraph))
        raise GraphError(
            f"{file} has no TaskGraph named {name or 'graph'!r}",
            expected=f"one of {', '.join(there) or 'none: define graph = TaskGraph(…)'}",
            remedy="Name it after the file: file.py:name.",
        )
    return WorkflowFile(path, module, graph)


def _is_count(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most


@contextmanager
def _told_at_users_line(path: Path) -> Iterator[None]:
    """Turn what a user's code raises into a GraphError that begins with the user's line."""
    try:
        yield
    except GraphError as error:
        line = users_line(error, path.parent)
        place = f"{line}: " if line else f"{path}: "
        raise GraphError(f"{place}{error.problem}", expected=error.expected, remedy=error.remedy) from error
    except MetierError:
        raise
    except (Exception, SystemExit) as error:
        raise GraphError(
            told_at_users_line(error, path.parent),
            expected=f"a workflow file that runs: {path.name}",
            remedy="Correct the line, or install what it needs.",
        ) from error
