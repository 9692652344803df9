"""A workflow is a Python file; others are refused by name."""

from pathlib import Path

import pytest

from metier.agents.errors import GraphError
from metier.agents.graphs.workflow_file import load_workflow


def test_a_file_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "people.yaml"
    file.write_text("people: []\n")
    with pytest.raises(GraphError, match="expected a Python file"):
        load_workflow(str(file))
