"""How much disk a package takes with all it needs, in an environment that has it: files of its distributions."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

__all__ = ["installed_mib"]

# Run by the environment's own Python, with nothing but the standard library: markers are left to pip, which has
# already decided them. What an extra would bring counts where it was asked for.
COUNT = r"""
import json, re, sys
from importlib.metadata import PackageNotFoundError, distribution

def needs(name, extras):
    for line in distribution(name).requires or []:
        requirement, _, marker = line.partition(";")
        of_extra = re.search(r"extra *== *['\"]([^'\"]+)['\"]", marker)
        if of_extra is None or of_extra.group(1) in extras:
            match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
            yield match.group(1), frozenset(filter(None, re.split(r"[\s,]+", match.group(2) or "")))

seen, left = set(), [(name, frozenset()) for name in sys.argv[1:]]
while left:
    name, extras = left.pop()
    key = re.sub(r"[-_.]+", "-", name).lower(), extras
    if key in seen:
        continue
    try:
        left += needs(name, extras)
        seen.add(key)
    except PackageNotFoundError:
        continue  # of another platform or Python
total = 0
for name in {name for name, _ in seen}:
    for file in distribution(name).files or []:
        path = file.locate()
        if path.is_file() and path.suffix != ".pyc":
            total += path.stat().st_size
print(json.dumps(total))
"""


@cache
def installed_mib(python: Path, packages: tuple[str, ...]) -> float:
    """MiB of these packages and of all they require, as installed for an interpreter, without compiled files."""
    done = subprocess.run([str(python), "-c", COUNT, *packages], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout) / (1 << 20))
