"""What a user's own code raises is shown by the user's line first, not by our frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents.errors import GraphError, TaskSetError
from metier.agents.graphs.workflow_file import load_workflow

GOOD = """from pydantic import BaseModel
from metier.agents import Role, TaskGraph
class Question(BaseModel):
    text: str
graph = TaskGraph("one", takes=Question, gives=Question)
graph.step(Role("solver", takes=Question, gives=Question))
"""


def flow(folder: Path, text: str) -> str:
    (folder / "flow.py").write_text(text)
    return str(folder / "flow.py")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("graph.step(\n", "flow.py, line 7: graph.step(: SyntaxError: '(' was never closed"),
        ("1 / 0\n", "flow.py, line 7: 1 / 0: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)\n", "line 7: import sys; sys.exit(3): SystemExit: 3"),
        ("import nothing_of_that_name\n", "line 7: import nothing_of_that_name: ModuleNotFoundError"),
        ("import beside\n", "beside.py, line 2: print(undefined): NameError: name 'undefined' is not defined"),
        ("graph.step(3)\n", "flow.py, line 7: graph.step(3): "),
    ],
)
def test_a_workflow_file_is_told_by_its_own_line(tmp_path: Path, more: str, says: str) -> None:
    (tmp_path / "beside.py").write_text("def broken():\n  print(undefined)\nbroken()\n")
    with pytest.raises(GraphError) as caught:
        load_workflow(flow(tmp_path, GOOD + more))
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_tasks_and_a_script_of_another_type_are_told(tmp_path: Path) -> None:
    more = "def tasks(split, size, seed): return [][size]\ndef scripted(): return 3\n"
    file = load_workflow(flow(tmp_path, GOOD + more))
    with pytest.raises(GraphError, match=r"flow\.py, line 7: .*IndexError"):
        file.tasks("test:3")
    with pytest.raises(GraphError, match="`scripted` gives int"):
        file.scripted()
    for spec in ("test:" + "9" * 5000, "test:3:" + "9" * 5000, "test:²", "test:1000001"):
        with pytest.raises(TaskSetError, match="size up to 1000000"):
            file.tasks(spec)
