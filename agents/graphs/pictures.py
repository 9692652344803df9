"""Pictures of a workflow: Mermaid text, Graphviz text, and a PNG where Graphviz is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ..roles import type_name
from .nodes import (
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    FunctionWork,
    GraphWork,
    LoopWork,
    PersonWork,
    RoleWork,
)

__all__ = ["to_dot", "to_mermaid", "write_picture"]

DOT_TIMEOUT_S = 30.0


def to_mermaid(graph: BuiltGraph) -> str:
    """The workflow as Mermaid text: roles as boxes, functions rounded, loops and sub-graphs as frames."""
    lines = ["flowchart TD", f'  input(["{type_name(graph.takes)}"])']
    _mermaid_body(graph.body, "", "input", lines, "  ")
    return "\n".join(lines) + "\n"


def to_dot(graph: BuiltGraph) -> str:
    """The workflow as Graphviz text."""
    lines = [f'digraph "{graph.name}" {{', "  compound=true; node [shape=box fontname=sans fontsize=11];"]
    lines.append(f'  input [label="{type_name(graph.takes)}" shape=oval];')
    _dot_body(graph.body, "", "input", lines, "  ")
    return "\n".join([*lines, "}"]) + "\n"


def write_picture(graph: BuiltGraph, path: Path) -> Path:
    """Draw the workflow to `path` as PNG with Graphviz, or as Mermaid text beside it when there is none.

    Returns the file that was written (`.png` or `.mmd`). Raises: OSError when it cannot be written.
    """
    dot = shutil.which("dot")
    if dot is None:
        path = path.with_suffix(".mmd")
        path.write_text(to_mermaid(graph), encoding="utf-8")
        return path
    path = path.with_suffix(".png")
    drawn = [dot, "-Tpng", "-o", str(path)]
    try:
        subprocess.run(drawn, input=to_dot(graph).encode(), check=True, timeout=DOT_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise OSError(f"Graphviz drew no picture: {error}") from error
    return path


def _mermaid_body(body: BuiltBody, prefix: str, entry: str, lines: list[str], pad: str) -> None:
    for node in body.nodes:
        name, label = _id(prefix, node), _label(node)
        inner = _inner(node)
        if inner is not None:
            lines.append(f'{pad}subgraph {name}["{label}"]')
            _mermaid_body(inner, f"{prefix}{node.name}/", "", lines, pad + "  ")
            lines.append(f"{pad}end")
        elif isinstance(node.work, FunctionWork):
            lines.append(f'{pad}{name}("{label}")')
        elif isinstance(node.work, PersonWork):
            lines.append(f'{pad}{name}{{{{"{label}"}}}}')
        else:
            lines.append(f'{pad}{name}["{label}"]')
    for node in body.nodes:
        arrow = "-.->|if|" if node.when else "-->"
        for before in node.after or ((entry,) if entry else ()):
            start = before if before == entry else _id(prefix, body[before])
            lines.append(f"{pad}{start} {arrow} {_id(prefix, node)}")
        for path, all_rounds in node.reads_earlier.items():
            lines.append(f"{pad}{_id(prefix, body[path])} -.->|{_rounds(all_rounds)}| {_id(prefix, node)}")


def _dot_body(body: BuiltBody, prefix: str, entry: str, lines: list[str], pad: str) -> None:
    for node in body.nodes:
        name, label = _id(prefix, node), _label(node)
        inner = _inner(node)
        if inner is not None:
            lines.append(f'{pad}subgraph cluster_{name} {{ label="{label}"; fontname=sans; style=rounded;')
            _dot_body(inner, f"{prefix}{node.name}/", "", lines, pad + "  ")
            lines.append(f"{pad}}}")
        else:
            style = "rounded" if isinstance(node.work, FunctionWork) else "solid"
            lines.append(f'{pad}{name} [label="{label}" style="{style}"];')
    for node in body.nodes:
        for before in node.after or ((entry,) if entry else ()):
            start = before if before == entry else _anchor(prefix, body[before], last=True)
            style = ' [style=dashed label="if"]' if node.when else ""
            lines.append(f"{pad}{start} -> {_anchor(prefix, node)}{style};")
        for path, all_rounds in node.reads_earlier.items():
            line = f"{_anchor(prefix, body[path])} -> {_anchor(prefix, node)}"
            lines.append(f'{pad}{line} [style=dotted label="{_rounds(all_rounds)}" constraint=false];')


def _anchor(prefix: str, node: BuiltNode, last: bool = False) -> str:
    """Graphviz draws edges between leaves only: the first or last leaf stands for a frame."""
    inner = _inner(node)
    if inner is None:
        return _id(prefix, node)
    return _anchor(f"{prefix}{node.name}/", inner.nodes[-1 if last else 0], last)


def _inner(node: BuiltNode) -> BuiltBody | None:
    if isinstance(node.work, LoopWork):
        return node.work.body
    return node.work.graph.body if isinstance(node.work, GraphWork) else None


def _label(node: BuiltNode) -> str:
    work = node.work
    if isinstance(work, LoopWork):
        return f"{node.name}: at most {work.max_rounds} rounds"
    many = "each: " if node.each else ""
    who = f" ({work.role.name})" if isinstance(work, RoleWork) and work.role.name != node.name else ""
    remembers = ", remembers" if isinstance(work, RoleWork) and work.role.memory else ""
    return f"{many}{node.name}{who} → {type_name(node.gives)}{remembers}"


def _rounds(all_rounds: bool) -> str:
    return "all later rounds" if all_rounds else "next round"


def _id(prefix: str, node: BuiltNode) -> str:
    return "n_" + "".join(c if c.isalnum() else "_" for c in prefix + node.name)  # "end" is a Mermaid keyword
