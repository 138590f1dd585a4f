"""Recognise the kind of a path, and parse its file."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from everos_engine.errors import BadFile
from everos_engine.text.entries import Document, Place
from everos_engine.text.frontmatter import split
from everos_engine.text.kinds import parsers
from everos_engine.text.kinds.tables import KINDS, Kind
from everos_engine.text.markdown import decode

_PATH = re.compile(
    r"(?:(?P<app>[^/]+)/(?P<project>[^/]+)/)?"
    r"(?:users/(?P<user>[^/]+)/(?:(?P<profile>user\.md)"
    r"|(?P<daily>episodes|\.atomic_facts|\.foresights)/(?P<name>[^/]+\.md))"
    r"|agents/(?P<agent>[^/]+)/(?:\.cases/(?P<case>[^/]+\.md)"
    r"|skills/(?P<skill>[^/]+)/(?:SKILL\.md|references/(?P<reference>[^/]+\.md))))",
    re.DOTALL,
)
_DAILY = {"episodes": "episode", ".atomic_facts": "atomic_fact", ".foresights": "foresight"}
_DEFAULTS = {"default_app": "default", "default_project": "default"}


def recognise(path: str, *, note_globs: tuple[str, ...] = ()) -> Place | None:
    """Return what ``path`` (relative to the root, with ``/``) is, or None if no kind matches it.

    No kind matches hidden files, apps and projects, editor temporaries (``~`` or ``#`` in front) and everything below
    ``.index``.
    """
    if not path.endswith(".md"):
        return None
    name = path[path.rfind("/") + 1 :]
    if name[0] in ".~#" or path.startswith(".index/"):
        return None
    match = _PATH.fullmatch(path)
    if match is None:
        return _note(path, note_globs)
    app, project, user, profile, daily, _, agent, case, _, reference = match.groups()
    if app is not None and (app[0] == "." or project[0] == "."):
        return None  # for example a trash folder, or one of a version control system
    app_id, project_id = _DEFAULTS.get(app or "default_app", app), _DEFAULTS.get(project or "default_project", project)
    if user is not None:
        return Place(path, "user_profile" if profile else _DAILY[daily], app_id, project_id, "user", user)
    if case is not None:
        return Place(path, "agent_case", app_id, project_id, "agent", agent)
    if reference is not None:
        path = path[: -len(f"references/{reference}")] + "SKILL.md"
    return Place(path, "agent_skill", app_id, project_id, "agent", agent)


def parse(place: Place, sources: Mapping[str, bytes]) -> Document:
    """Return the entries of one change.

    ``sources`` is path -> bytes of the file and, for a skill, of its references. Raises BadFile if the structure is
    damaged. A bad entry is a Problem of the document.
    """
    lines = decode(sources[place.md_path])
    if not any(line.strip() for line in lines):
        return Document((), ())
    front = split(lines)
    if not front.present and place.kind != "note":
        raise BadFile(
            "there is no frontmatter",
            remedy="begin the file with a `---` block, as the kind's documentation shows",
            line=1,
        )
    return parsers.PARSERS[place.kind](place, front, _references(place, sources))


def _references(place: Place, sources: Mapping[str, bytes]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in sorted(sources.keys() - {place.md_path}):
        try:
            texts[path[path.rfind("/") + 1 :]] = "\n".join(decode(sources[path]))
        except BadFile as error:
            raise BadFile(
                f"reference {path}: {error.args[0]}", remedy=error.remedy, line=error.line, column=error.column
            ) from None
    return texts


def _note(path: str, globs: tuple[str, ...]) -> Place | None:
    if not globs or any(part.startswith(".") for part in path.split("/")):
        return None
    for glob in globs:
        if fnmatch.fnmatchcase(path, glob) or (glob.startswith("**/") and fnmatch.fnmatchcase(path, glob[3:])):
            return Place(path, "note", "default", "default", "", "")
    return None


__all__ = ["KINDS", "Kind", "Place", "parse", "recognise"]
