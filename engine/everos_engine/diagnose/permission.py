"""Which permission is missing on the way to a path, and the command that gives it."""

from __future__ import annotations

import os

from everos_engine.diagnose.wording import quoted


def blocked(root: str, path: str) -> tuple[str, str]:
    """Return the first directory on the way that this user may not read, and what chmod should add.

    The way leads from ``root`` to ``path``. If no directory blocks it, the result is ``path`` itself.
    """
    parts = [] if path == root else os.path.relpath(path, root).split(os.sep)
    at = root
    for part in ("", *parts[:-1]):
        at = os.path.join(at, part) if part else at
        if not may(at, os.R_OK | os.X_OK):
            return at, "rX"
    return path, "rX" if os.path.isdir(path) else "r"


def may(path: str, mode: int) -> bool:
    """Return whether this process, as the user it acts for, has all of a mode's permissions."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def permit(path: str, need: str) -> str:
    """Return the remedy that gives permission ``need`` (in chmod's letters) on ``path``."""
    try:
        ours = os.stat(path).st_uid == os.geteuid()
    except OSError:
        ours = False
    if ours:
        return f"give yourself permission: `{quoted('chmod', f'u+{need}', path)}`"
    return f"as root or as its owner, `{quoted('chmod', f'a+{need}', path)}`"
