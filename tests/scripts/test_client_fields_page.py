"""docs/client-fields.md says what the request models say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    """scripts/write_client_fields_page.py, which is in no package."""
    path = ROOT / "scripts" / "write_client_fields_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "client-fields.md").read_text(encoding="utf-8")
    assert written == script().client_fields_page(), "run: python scripts/write_client_fields_page.py"
