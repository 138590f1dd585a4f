"""Describe the layout of a root, and find the part of it that is nearest to a path that no kind matches."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import product

PLACES = {
    "users/<owner>/user.md": "user_profile",
    "users/<owner>/episodes/<name>.md": "episode",
    "users/<owner>/.atomic_facts/<name>.md": "atomic_fact",
    "users/<owner>/.foresights/<name>.md": "foresight",
    "agents/<owner>/.cases/<name>.md": "agent_case",
    "agents/<owner>/skills/<skill>/SKILL.md": "agent_skill",
    "agents/<owner>/skills/<skill>/references/<name>.md": "agent_skill",
}
"""Pattern of a path of a built-in kind -> the kind."""
LAYOUTS = tuple(prefix + place for prefix, place in product(("", "<app>/<project>/"), PLACES))
"""All patterns of paths of the built-in kinds, relative to the root."""
_DEFAULTS = {"<app>": "default_app", "<project>": "default_project"}
_MAX_PATH_CHARACTERS = 4096
"""No system opens a longer path."""
_GAP, _OTHER, _FAR = 1.0, 1.6, 2.2
_DEFAULT_GAP = {"<app>": 0.95, "<project>": 0.9}
_ALIKE, _ALIKE_FILES = 0.6, 0.8
"""The minimum likeness of a folder's name, and of a file's name, which is higher since all of them end in `.md`."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Hold the layout that is nearest to a path, and the path that the file would have in it."""

    layout: str
    path: str


def nearest(path: str) -> Nearest | None:
    """Return what the writer of ``path`` most likely meant, or None if nothing in the layout is near.

    ``path`` is relative to the root, with ``/``. The returned path always matches a kind.
    """
    if len(path) > _MAX_PATH_CHARACTERS:
        return None
    best: tuple[float, Nearest] | None = None
    parts = path.split("/")
    for layout in LAYOUTS:
        wanted = layout.split("/")
        if not any(_alike(part, literal) for part in parts for literal in wanted if literal[0] != "<"):
            continue  # the path has nothing in common with this layout
        cost, filled = _align(parts, wanted)
        if filled is not None and not _is_hidden(filled) and (best is None or cost < best[0]):
            best = cost, Nearest(layout, "/".join(filled))
    return best[1] if best is not None and best[0] <= _FAR else None


def _is_hidden(filled: list[str]) -> bool:
    """Return whether a path is in the index, or in a hidden app or project, which no kind matches."""
    return filled[0].startswith(".") or (filled[0] not in {"users", "agents"} and filled[1].startswith("."))


def _align(parts: list[str], layout: list[str]) -> tuple[float, list[str] | None]:
    """Return the lowest cost of turning path parts into those of a layout, and what fills each part.

    The second value is None if a part cannot be filled.
    """
    width = len(layout) + 1
    table: list[list[tuple[float, list[str] | None]]] = [[(0.0, [])] + [(0.0, None)] * (width - 1)]
    for column, wanted in enumerate(layout, 1):
        cost, filled = table[0][column - 1]
        table[0][column] = cost + _gap(wanted), _with(filled, _made(wanted))
    for row, part in enumerate(parts, 1):
        table.append([(table[row - 1][0][0] + _GAP, [])])
        for column, wanted in enumerate(layout, 1):
            cost, fits = _fit(part, wanted)
            choices = [
                (table[row - 1][column - 1][0] + cost, _with(table[row - 1][column - 1][1], fits)),
                (table[row - 1][column][0] + _GAP, table[row - 1][column][1]),
                (table[row][column - 1][0] + _gap(wanted), _with(table[row][column - 1][1], _made(wanted))),
            ]
            table[row].append(min(choices, key=lambda choice: (choice[1] is None, choice[0])))
    return table[-1][-1]


def _fit(part: str, wanted: str) -> tuple[float, str | None]:
    """Return the cost of using ``part`` for ``wanted``, and the resulting part, None if it does not fit."""
    if wanted == "<name>.md":
        name = _markdown_name(part)
        return (0.0 if name == part else 0.3), name
    if wanted in {"<app>", "<project>"} and part.startswith("."):
        return _OTHER, None  # a hidden one is ignored
    if wanted.startswith("<"):
        return (_OTHER if part in {"users", "agents"} or part.endswith(".md") else 0.0), part
    return (1 - _likeness(part, wanted) if _alike(part, wanted) else _OTHER), wanted


def _likeness(part: str, literal: str) -> float:
    return SequenceMatcher(None, part.lower().lstrip("._"), literal.lower().lstrip("._")).ratio()


def _alike(part: str, literal: str) -> bool:
    return _likeness(part, literal) >= (_ALIKE_FILES if literal.endswith(".md") else _ALIKE)


def _gap(wanted: str) -> float:
    return _DEFAULT_GAP.get(wanted, _GAP)


def _made(wanted: str) -> str | None:
    """Return what fills a part that the path does not have, or None."""
    return _DEFAULTS.get(wanted) if wanted.startswith("<") else wanted


def _markdown_name(part: str) -> str:
    name = part.lstrip(".~#") or "file"
    if name.endswith(".md"):
        return name if name != ".md" else "file.md"
    stem, dot, _ = name.rpartition(".")
    return f"{stem if dot and stem else name}.md"


def _with(filled: list[str] | None, part: str | None) -> list[str] | None:
    return None if filled is None or part is None else [*filled, part]
