"""Remember which memory roots' settings files the user trusts: by content, and never inside a root."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from everos_engine.errors import SettingsError

OTHERS_MAY_WRITE = 0o022


def is_trusted(root: Path, content: bytes, environment: Mapping[str, str]) -> bool:
    """Return whether the user trusts this content as the settings file of this root."""
    return trusted_digest(root, environment) == digest_of(content)


def trusted_digest(root: Path, environment: Mapping[str, str]) -> str | None:
    """Return the digest of the settings file that is trusted for a root, or None.

    A record that another user could have written, or that lies inside the root, does not count.
    """
    place = _record(root, environment)
    if _is_inside(place, root):
        return None
    try:
        handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
            return None
        with suppress(ValueError, KeyError, TypeError, OSError):
            record = json.loads(file.read(1 << 16))
            if record["root"] == _name(root):
                return str(record["sha256"])
    return None


def remember(root: Path, content: bytes, environment: Mapping[str, str]) -> Path:
    """Trust this content as the settings file of this root. Returns the record's path.

    Raises SettingsError if the record cannot be kept, or would lie inside the root.
    """
    place = _record(root, environment)
    if _is_inside(place, root):
        raise SettingsError(
            f"trust is remembered in {place.parent}, which lies inside the memory root {root}: what is written into the root "
            "could trust itself. Set XDG_STATE_HOME to a directory outside the root"
        )
    draft = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
    line = json.dumps({"root": _name(root), "sha256": digest_of(content)}) + "\n"
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(line)
        os.replace(draft, place)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise SettingsError(
            f"trust cannot be remembered in {place.parent}: {error.strerror}: set XDG_STATE_HOME to a directory that you may write"
        ) from None
    return place


def forget(root: Path, environment: Mapping[str, str]) -> bool:
    """Stop trusting any settings file of this root. Returns whether one was trusted."""
    try:
        _record(root, environment).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SettingsError(f"{_record(root, environment)} cannot be removed: {error.strerror}") from None
    return True


def digest_of(content: bytes) -> str:
    """Return the digest of a file's content."""
    return hashlib.sha256(content).hexdigest()


def directory(environment: Mapping[str, str]) -> Path:
    """Return the user's own directory of records. A relative XDG_STATE_HOME is ignored, as its standard says."""
    state = environment.get("XDG_STATE_HOME", "")
    home = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~/.local/state"))
    return home / "everos-engine" / "trusted"


def _record(root: Path, environment: Mapping[str, str]) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    return directory(environment) / f"{name}.json"


def _name(root: Path) -> str:
    return os.fsencode(os.path.realpath(root)).decode("utf-8", "backslashreplace")


def _is_inside(place: Path, root: Path) -> bool:
    real = os.path.realpath(root).rstrip(os.sep) + os.sep
    return os.path.realpath(place).startswith(real)
