"""Find the key of the change that a path belongs to."""

from __future__ import annotations

import os

from everos_engine.errors import OutsideRoot
from everos_engine.settings import Settings
from everos_engine.system import files
from everos_engine.text import kinds
from everos_engine.text.kinds.layout import nearest


def key_of(settings: Settings, path: str) -> str:
    """Return the key of the change that ``path`` belongs to, or that ``path`` is as listed by us.

    Raises OutsideRoot.
    """
    if not _is_path(path):
        raise OutsideRoot(f"{path!r} is no path that a file can have: name a path below {settings.root}")
    listed = files.path_of(settings.root, path)
    if not os.path.lexists(full := os.path.join(settings.root, path)):
        path = listed if os.path.lexists(listed) else files.in_other_form(full) or path
    key = key_in_root(settings, path)
    linked = None if key is None else files.linked_directory(settings.root, files.path_of(settings.root, key))
    if linked is not None:
        raise OutsideRoot(
            f"{path!r} lies behind the link {linked!r}, and links to directories are not followed: "
            "put the directory itself there, or name the file by the directory it is in"
        )
    place = None if key is None else kinds.recognise(key, note_globs=settings.note.globs)
    if place is None:
        raise OutsideRoot(_refusal(settings, path, key))
    return place.md_path


def _is_path(text: str) -> bool:
    """Return whether the system could have a file of this name: no NUL, and nothing that has no bytes."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _refusal(settings: Settings, path: str, key: str | None) -> str:
    """Return why a path cannot be queued, and what to name instead."""
    full = os.path.join(settings.root, path)
    if os.path.isdir(full) and (key is not None or os.path.samefile(full, settings.root)):
        return f"{path!r} is a directory: name files, or no path at all to bring everything in step"
    if key is None:
        return f"{path!r} is outside the memory root {settings.root}: name a path below it"
    near = nearest(key)
    where = f"the nearest layout is {near.layout}" if near is not None else "note.globs has no pattern for it"
    return f"{key!r} does not match any kind: {where}. `everos-engine explain` says more"


def key_in_root(settings: Settings, path: str) -> str | None:
    """Return the key of a path, absolute or relative to the root, or None outside the root."""
    full = path if os.path.isabs(path) else os.path.join(settings.root, path)
    return files.key_of(settings.root, full)
