"""The mass-delete brake: tells an accident (an unmounted disk, a replaced root) from files that somebody removed."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everos_engine.errors import FULL, Exhausted, Fatal
from everos_engine.stores import full_scan, held
from everos_engine.stores.held import Passed
from everos_engine.system import private

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Transaction
    from everos_engine.stores.full_scan import Vanished
    from everos_engine.stores.held import Reason

WINDOW_SECONDS = 60.0
"""Deletions within this time count together, whoever records them: a tree removed in many small steps is removed all the same."""
FEW = 5
"""That many deletions of one batch of events are believed at once; more are left to a sweep, which sees the whole."""
MARKER = "marker"


@dataclass(slots=True)
class DeletionGuard:
    """Remember which root we began with, and say what is wrong with it."""

    settings: Settings
    device: int = 0
    inode: int = 0

    def arm(self) -> None:
        """Remember the root as it is now, and leave the marker in it."""
        self.capture_root()
        write_marker(self.settings)

    def capture_root(self) -> None:
        """Remember the root as it is now: for a sweep beside the engine that laid the marker."""
        found = os.stat(self.settings.root)
        self.device, self.inode = found.st_dev, found.st_ino

    def trouble(self) -> Reason | None:
        """What is wrong with the root as a whole.

        Raises Fatal where the index folder was removed under the engine, Exhausted where no descriptor is left to look.
        """
        if not self.inode:
            return None
        root = self.settings.root
        try:
            found = os.stat(root)
            names = os.listdir(root)
        except OSError as error:
            if error.errno in FULL:
                message = f"the memory root cannot be looked at: {error.strerror}"
                raise Exhausted(message) from error
            gone = error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESTALE, errno.ENOTCONN}
            return "root_missing" if gone else "root_unreadable"
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            return "root_replaced"
        if not self.settings.engine_directory.is_dir():
            message = f"{self.settings.root / '.index'} was removed under the running engine: start it again, and it is rebuilt from markdown"
            raise Fatal(message)
        if not (self.settings.engine_directory / MARKER).exists():
            return "marker_missing"
        return "root_empty" if not any(name != ".index" for name in names) else None


def may_delete(  # noqa: PLR0913 - who decides, what vanished, and the moment
    tx: Transaction,
    settings: Settings,
    gone: Sequence[Vanished],
    *,
    moved: int = 0,
    known: int,
    now_milliseconds: int,
) -> bool:
    """Decide in ``tx`` whether the files ``gone`` count as deleted, and remember that they were let through.

    Every deletion that nobody released is decided here, in the transaction that records it: sweeps, events, ``sync``,
    the worker, in any process. ``known`` counts the files known now, ``moved`` those of them that only have another name.
    A file that came after the window began, and goes again, is no loss.
    """
    window_milliseconds = int(WINDOW_SECONDS * 1000)
    window = held.recent(tx, now_milliseconds=now_milliseconds, window_milliseconds=window_milliseconds)
    began = window[0].at_milliseconds if window else now_milliseconds
    count = sum(not began < one.known_since <= now_milliseconds for one in gone)
    if is_too_much(settings, window, count, known=known - moved):
        return False
    if count:
        held.let_through(tx, Passed(now_milliseconds, count, known - moved))
    return True


def to_hold(tx: Transaction, settings: Settings, paths: Sequence[str], *, now_milliseconds: int) -> list[Vanished]:
    """Return the known files of ``paths``, all found gone, whose deletion must be held: none, or all that did not move."""
    vanished = full_scan.vanished(tx, paths)
    if not vanished:
        return []
    moved = [one for one in vanished if one.elsewhere]
    gone = [one for one in vanished if not one.elsewhere]
    full_scan.carry_age(tx, moved)
    known = full_scan.files(tx)
    may_go = may_delete(tx, settings, gone, moved=len(moved), known=known, now_milliseconds=now_milliseconds)
    return [] if may_go else gone


def is_too_much(settings: Settings, window: Sequence[Passed], count: int, *, known: int) -> bool:
    """Check whether ``count`` more files may not vanish in the window, of which ``window`` was let through already.

    The share is of the files that were known when the window began, as far as they are still of a kind.
    """
    used = sum(one.files for one in window)
    at_first = min(window[0].known if window else known, known + used)
    return count > 0 and settings.brake_ratio < 1 and used + count > most(settings, known=at_first)


def most(settings: Settings, *, known: int) -> float:
    """How many of ``known`` files may vanish within one window."""
    return max(settings.brake_least, settings.brake_ratio * known)


def write_marker(settings: Settings) -> None:
    """Put the marker file into the root's index folder."""
    path = settings.engine_directory / MARKER
    if not path.exists():
        path.touch(private.file_mode(path.parent))
        path.write_text("While this file is here, this is the memory root that the index beside it was made from.\n")


def without_moved(
    vanished: Sequence[Vanished], appeared: Iterable[tuple[int, int]]
) -> tuple[list[Vanished], list[Vanished]]:
    """(gone, moved): a file that appeared with the size and mtime of one that vanished is taken for it, renamed.

    Events may have told of the new name before: then it did not appear now, and is known to be elsewhere by its inode.
    """
    left = Counter(appeared)
    gone, moved = [], []
    for one in vanished:
        key = (one.size, one.mtime_ns)
        if left[key]:
            left[key] -= 1
            moved.append(one)
        elif one.elsewhere:
            moved.append(one)
        else:
            gone.append(one)
    return gone, moved
