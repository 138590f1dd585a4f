"""Which rule keeps a path out of the index, and how it would get in."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from dataclasses import dataclass

from everos_engine.diagnose.wording import quoted, shown
from everos_engine.settings import ROOT_SETTINGS_FILE, Settings
from everos_engine.settings.paths import ENGINE_DIRECTORY, INDEX_DIRECTORY
from everos_engine.system import files
from everos_engine.text import kinds
from everos_engine.text.kinds.layout import nearest

BY_NAME = {"no_layout", "wrong_case", "not_markdown", "hidden_name", "no_glob"}
"""Codes that a name alone decides, with or without a file."""
LOOKED_AT_BYTES = 8192
LAYOUT_HELP = "`everos-engine kinds` shows the layout"


@dataclass(frozen=True, slots=True)
class Exclusion:
    """The one rule that excluded a path: a stable code, the rule in words, and what a person can do."""

    code: str
    cause: str
    remedy: str


def exclusion(settings: Settings, path: str, *, program: str) -> Exclusion | None:
    """Return the first rule that keeps an absolute path out, or None if a kind matches it, with or without a file."""
    key = files.key_of(settings.root, path)
    if key is None:
        return _outside(settings, path, program=program)
    if key == INDEX_DIRECTORY or key.startswith(INDEX_DIRECTORY + "/"):
        remedy = f"keep memory elsewhere below {shown(str(settings.root))}; {LAYOUT_HELP}"
        return Exclusion("index_directory", "everything below '.index' is the engine's own", remedy)
    return _by_nature(settings, path, key) or _by_name(settings, path, key)


def _outside(settings: Settings, path: str, *, program: str) -> Exclusion:
    root = os.fspath(settings.root)
    if os.path.realpath(path) == root:
        return Exclusion(
            "directory", "it is the memory root itself", f"name a file: `{program} explain {quoted('FILE')}`"
        )
    cause = f"it is outside the memory root {shown(root)}"
    other = _root_above(path)
    if other is not None:
        command = quoted("everos-engine", "--root", other, "explain", path)
        return Exclusion("outside_root", cause, f"it lies below another memory root: ask about that one, `{command}`")
    parts = path.strip("/").split("/")
    for start in reversed(range(len(parts))):
        tail = "/".join(parts[start:])
        target = os.path.join(root, tail)
        if kinds.recognise(tail) is not None and os.path.isfile(path) and not os.path.lexists(target):
            return Exclusion(
                "outside_root", cause, f"put a copy into the root: `{_into(target)} && {quoted('cp', path, target)}`"
            )
    return Exclusion(
        "outside_root", cause, f"put it below {shown(root)} ({LAYOUT_HELP}), or name another root with --root"
    )


def _by_nature(settings: Settings, path: str, key: str) -> Exclusion | None:
    """Return what a path is on disk, if that excludes it."""
    linked = files.linked_directory(settings.root, path)
    if linked is not None:
        target = os.path.realpath(linked)
        cause = f"it lies behind the link {shown(linked)}, and links to directories are not followed"
        if not os.path.isdir(target):
            return Exclusion("behind_link", cause, f"replace the link by a directory: `{quoted('rm', linked)}`")
        command = f"{quoted('rm', linked)} && {quoted('cp', '-a', target, linked)}"
        return Exclusion("behind_link", cause, f"put the directory itself there: `{command}`")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Exclusion(
                "link_loop", "it is a link that leads back to itself", f"remove the link: `{quoted('rm', path)}`"
            )
        if os.path.islink(path):
            cause = f"it is a link to {shown(os.readlink(path))}, where there is no file"
            return Exclusion("broken_link", cause, f"restore that file, or remove the link: `{quoted('rm', path)}`")
        return None
    if stat.S_ISDIR(mode):
        if key.endswith(".md"):
            cause = "it is a directory, though it is named like a file"
            return Exclusion("directory", cause, f"give it another name: `{quoted('mv', path, path[:-3])}`")
        return Exclusion("directory", "it is a directory, and only files are indexed", "name a file in it")
    if not stat.S_ISREG(mode):
        return Exclusion(
            "not_a_file", "it is no regular file (a pipe, socket or device)", "keep memory in regular files"
        )
    return None


def _by_name(settings: Settings, path: str, key: str) -> Exclusion | None:
    """Return what a name says if no kind matches it."""
    place = kinds.recognise(key, note_globs=settings.note.globs)
    if place is not None:
        return _reference(settings, place, key)
    near = nearest(key)
    moved = "" if near is None else _moved(settings, path, near.path)
    name = key[key.rfind("/") + 1 :]
    if near is not None and near.path.lower() == key.lower():
        cause = f"its name differs in case from the layout {near.layout}"
        return Exclusion("wrong_case", cause, f"rename it: {moved}" if moved else f"rename it to {shown(near.path)}")
    if not name.endswith(".md"):
        cause = f"its name ends in {shown(os.path.splitext(name)[1]) or 'nothing'}, and only '.md' is indexed"
        if os.path.lexists(path) and not _is_text(path):
            return Exclusion("not_markdown", cause, "write its text into a markdown file: other formats are not read")
        target = os.path.splitext(path)[0] + ".md"
        if not moved and os.path.lexists(target):
            remedy = f"if it is markdown, give it another name that ends in '.md': {shown(target)} is there already"
            return Exclusion("not_markdown", cause, remedy)
        renamed = moved or f"`{quoted('mv', path, target)}`"
        return Exclusion("not_markdown", cause, f"if it is markdown, rename it: {renamed}")
    if name[0] in ".~#":
        what = "hidden" if name[0] == "." else "an editor's temporary file"
        renamed = moved or f"`{quoted('mv', path, os.path.join(os.path.dirname(path), name.lstrip('.~#')))}`"
        return Exclusion(
            "hidden_name", f"a name that begins with {name[0]!r} counts as {what}", f"rename it: {renamed}"
        )
    if near is not None:
        cause = f"no kind matches it. The nearest layout is {near.layout}"
        return Exclusion("no_layout", cause, f"move it there: {moved}" if moved else f"move it to {shown(near.path)}")
    return _plain(settings, key)


def _is_text(path: str) -> bool:
    """Return whether the beginning of a file is text in UTF-8. An unreadable file counts as text."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(LOOKED_AT_BYTES)
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False
    except OSError:
        return True
    return b"\0" not in beginning


def _reference(settings: Settings, place: kinds.Place, key: str) -> Exclusion | None:
    """Return the rule for a skill's reference, which is indexed only with its SKILL.md."""
    if place.md_path == key or os.path.isfile(files.path_of(settings.root, place.md_path)):
        return None
    cause = f"it is a reference of a skill without its main file {shown(place.md_path)}"
    return Exclusion(
        "reference_without_skill", cause, f"write {shown(place.md_path)}: a skill is indexed with its references"
    )


def _plain(settings: Settings, key: str) -> Exclusion:
    """Return the rule for markdown in no place of the layout, which may be a note."""
    folder = key.split("/", maxsplit=1)[0] + "/*.md" if "/" in key else "**/*.md"
    if any(part.startswith(".") for part in key.split("/")):
        cause = "no kind has a place for it, and notes are not taken from hidden directories"
        return Exclusion("no_layout", cause, f"move it out of the hidden directory; {LAYOUT_HELP}")
    file = settings.root / ROOT_SETTINGS_FILE
    if settings.note.globs:
        cause = f"no kind has a place for it, and no glob of note.globs ({', '.join(settings.note.globs)}) matches it"
        return Exclusion("no_glob", cause, f"add {folder!r} to note.globs in {shown(str(file))}; {LAYOUT_HELP}")
    cause = "no kind has a place for it, and plain markdown is not indexed, since note.globs is empty"
    write = f"printf '[note]\\nglobs = [\"{folder}\"]\\n' >> {quoted(file)}"
    remedy = (
        f"to index it as a note, `{write}` and restart the engine"
        if folder.isascii()
        else f"set note.globs; {LAYOUT_HELP}"
    )
    return Exclusion("no_glob", cause, remedy)


def _moved(settings: Settings, path: str, key: str) -> str:
    """Return the command that moves a file to a key, or "" if the file is missing or another one is there already."""
    literal = "\\x" in path  # else an escape in the key stands for a byte of the name
    target = os.path.join(settings.root, key) if literal else files.path_of(settings.root, key)
    same = os.path.lexists(target) and os.path.samefile(path, target) if os.path.lexists(path) else False
    if not os.path.lexists(path) or (os.path.lexists(target) and not same):
        return ""
    return f"`{_into(target)} && {quoted('mv', path, target)}`"


def _into(target: str) -> str:
    return quoted("mkdir", "-p", os.path.dirname(target))


def _root_above(path: str) -> str | None:
    """Return a directory above a path that is a separate memory root."""
    at = os.path.dirname(os.path.abspath(path))
    while True:
        if os.path.isdir(os.path.join(at, INDEX_DIRECTORY, ENGINE_DIRECTORY)):
            return at
        if at == os.path.dirname(at):
            return None
        at = os.path.dirname(at)
