"""What every check of `doctor` is given, and what it gives back."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everos_engine.diagnose import permission
from everos_engine.diagnose.engine_state import EngineState, read_engine_state
from everos_engine.diagnose.wording import commands_in, quoted, shown
from everos_engine.errors import Damaged
from everos_engine.settings import Settings
from everos_engine.settings.paths import INDEX_DIRECTORY
from everos_engine.stores import conditions, ledger, meta, queue, queue_facts, reports
from everos_engine.stores.conditions import Condition
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.held import Held
from everos_engine.system import files
from everos_engine.system.file_threads import visit_within
from everos_engine.text import kinds

Verdict = Literal["ok", "warn", "fail"]
FUTURE_SECONDS = 2.0
"""Clocks of disks and machines differ by so much without harm."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Literal commands, and nothing else, are in backticks in ``remedy``, "" if none is needed.
    """

    name: str
    verdict: Verdict
    cause: str
    remedy: str = ""

    def as_json(self) -> dict[str, object]:
        """Return plain data, with the commands taken out of the remedy."""
        data = {"name": self.name, "verdict": self.verdict, "cause": self.cause, "remedy": self.remedy}
        return {**data, "commands": commands_in(self.remedy)}


@dataclass(frozen=True, slots=True)
class Tree:
    """One walk over the root.

    ``closed`` is (directory, why it cannot be read). ``hung`` are directories that do not answer. ``future`` is (path,
    seconds ahead) of files with a time of last change later than now.
    """

    directories: int = 0
    files: int = 0
    index_directories: int = 0
    linked: Sequence[str] = ()
    closed: Sequence[tuple[str, str]] = ()
    hung: Sequence[str] = ()
    unreadable: Sequence[str] = ()
    future: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """What the queue's database says. ``trouble`` is why it cannot be read. Then nothing else is set."""

    trouble: str | None = None
    damaged: Sequence[str] = ()
    counts: reports.Counts | None = None
    held: Sequence[Held] = ()
    conditions: Sequence[Condition] = ()
    delayed: queue_facts.Delayed | None = None
    unanswered: Sequence[tuple[str, str]] = ()
    warnings: tuple[int, str, str] | None = None
    owners: Sequence[str] = ()
    incarnations: Mapping[str, ledger.Remembered] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    failed: Sequence[reports.Outcome] = ()
    last_scan_milliseconds: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """The evidence that all checks share. ``show`` writes a path, and ``quote`` a foreign text, for the reader.

    A bundle leaves the root with hashed paths and without foreign text. A check names a path or quotes an error only by
    these two.
    """

    settings: Settings
    program: str
    offline: bool
    engine: EngineState
    tree: Tree
    queue: QueueFacts | None
    now_seconds: float
    show: Callable[[str], str] = shown
    quote: Callable[[str], str] = str

    @property
    def engine_db(self) -> Path:
        """Return the queue's and the ledger's database."""
        return self.settings.engine_database

    @property
    def settings_watch_off(self) -> bool:
        """Return whether the settings leave every change to the scans."""
        return self.settings.watch.mode == "off"

    def command(self, *words: str) -> str:
        """Return a command of this program on this root, in backticks."""
        return f"`{self.program} {quoted(*words)}`"

    def program_in(self, remedy: str) -> str:
        """Return a remedy of the engine with its commands aimed at this root."""
        return remedy.replace("`everos-engine ", f"`{self.program} ")

    def shell(self, *words: str | os.PathLike[str]) -> str:
        """Return a command of the system, in backticks."""
        return f"`{quoted(*words)}`"

    def restart(self) -> str:
        """Return how to restart the running engine, or how to start one."""
        run = self.command("run")
        return (
            f"restart it: {self.shell('kill', str(self.engine.pid))}, then {run}"
            if self.engine.running
            else f"start it: {run}"
        )

    def again(self) -> str:
        """Return what brings the index in step once the obstacle is gone."""
        return self.command("sync")


def conditions_of(facts: Facts) -> list[Condition]:
    """Return the conditions of the running engine. Of one that is gone nothing is known."""
    return list(facts.queue.conditions) if facts.queue is not None and facts.engine.running else []


def gather(settings: Settings, *, program: str, offline: bool) -> Facts:
    """Look at the tree, the database and the engine once, for all checks."""
    now = time.time()
    path = settings.engine_database
    return Facts(
        settings=settings,
        program=program,
        offline=offline,
        engine=read_engine_state(settings),
        tree=survey(settings, now_seconds=now),
        queue=read_queue_facts(path) if path.exists() else None,
        now_seconds=now,
    )


def survey(settings: Settings, *, now_seconds: float) -> Tree:
    """Walk the whole tree. Parts that cannot be read are named, never raised."""
    root = os.fspath(settings.root)
    found = _Survey()

    def visit(directory: str) -> list[str]:
        below: list[str] = []
        inside = directory.startswith(os.path.join(root, INDEX_DIRECTORY))
        found.index_directories += inside
        found.directories += not inside
        try:
            with os.scandir(directory) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        below.append(item.path)
                    elif not inside:
                        _look(settings, found, item, now_seconds=now_seconds)
        except FileNotFoundError:
            pass
        except OSError as error:
            found.closed.append((directory, error.strerror or str(error)))
        return below

    seconds = settings.file_deadline_seconds
    for directory in visit_within([root], visit, seconds=seconds):
        found.hung.append(directory)
    return Tree(
        found.directories,
        found.files,
        found.index_directories,
        tuple(found.linked),
        tuple(found.closed),
        tuple(found.hung),
        tuple(found.unreadable),
        tuple(found.future),
    )


@dataclass(slots=True)
class _Survey:
    directories: int = 0
    files: int = 0
    index_directories: int = 0
    linked: list[str] = field(default_factory=list)
    closed: list[tuple[str, str]] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    future: list[tuple[str, float]] = field(default_factory=list)


def _look(settings: Settings, found: _Survey, item: os.DirEntry[str], *, now_seconds: float) -> None:
    if item.is_symlink() and os.path.isdir(item.path):  # False for a link that leads to itself
        found.linked.append(item.path)
        return
    key = files.key_of(settings.root, item.path)
    if key is None or kinds.recognise(key, note_globs=settings.note.globs) is None:
        return
    try:
        seen = item.stat()
    except OSError:
        return
    if not stat.S_ISREG(seen.st_mode):
        return
    found.files += 1
    if seen.st_mtime - now_seconds > FUTURE_SECONDS:
        found.future.append((item.path, seen.st_mtime - now_seconds))
    if not permission.may(item.path, os.R_OK):
        found.unreadable.append(item.path)


def read_queue_facts(path: Path) -> QueueFacts:
    """Return all that the checks need of the queue's database, of one moment. Never raises."""
    try:
        database = Database(path, readonly=True)
        try:
            return database.read(_queue_facts)
        finally:
            database.close()
    except Damaged as error:
        return QueueFacts(damaged=[str(error.__cause__ or error)])
    except Exception as error:  # noqa: BLE001 - the check must report any error
        return QueueFacts(trouble=str(error) or type(error).__name__)


def _queue_facts(tx: Transaction) -> QueueFacts:
    scan = meta.get(tx, "last_scan")
    return QueueFacts(
        damaged=queue_facts.quick_check(tx),
        counts=reports.counts(tx),
        held=queue_facts.held_counts(tx),
        conditions=conditions.kept(tx),
        delayed=queue_facts.delayed(tx),
        unanswered=queue_facts.unanswered(tx),
        warnings=queue_facts.warnings(tx),
        owners=queue.owners(tx),
        incarnations=ledger.incarnations(tx),
        rows=ledger.rows_per_kind(tx),
        unknown=ledger.unknown_per_kind(tx),
        failed=reports.failed(tx),
        last_scan_milliseconds=None if scan is None else int(scan),
    )
