"""The mass-delete brake: tells an accident (an unmounted disk, a replaced root) from files that somebody removed."""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everos_engine.errors import FULL, Exhausted, Fatal

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.held import Reason
    from everos_engine.stores.sweeps import Vanished

WINDOW_SECONDS = 30.0
"""What a tree lost within half a minute counts together: removed in many small steps, it is removed all the same."""
FEW = 5
"""That many deletions of one batch of events are believed at once; more are left to a sweep, which sees the whole."""
MARKER = "marker"
WHY: dict[Reason, str] = {
    "mass_delete": "so many files vanished at once that it may be an accident",
    "unreadable": "the directory they are in cannot be read",
    "unmounted": "the file system they are on is not mounted any more",
    "root_missing": "the memory root is gone",
    "root_unreadable": "the memory root cannot be read",
    "root_replaced": "another directory lies where the memory root was",
    "root_empty": "the memory root is empty",
    "marker_missing": "the root's marker file is gone",
}
BLIND_REMEDY = "check the disk or the server it is on (`dmesg | tail` shows the kernel's word); every scan tries again"
"""For a directory that cannot be read though permission is given."""
REMEDY: dict[Reason, str] = {
    "mass_delete": "bring the files back, or run `everos-engine release` if they are meant to be gone",
    "unreadable": "have it readable again (permission, or the disk), or run `everos-engine release` if its files are meant to be gone",
    "unmounted": "mount it again, or run `everos-engine release` if its files are meant to be gone",
    "root_missing": "mount it or move it back; it is looked for without pause",
    "root_unreadable": "give the engine's user read permission on it",
    "root_replaced": "put the old one back, or restart the engine to index what lies there now",
    "root_empty": "mount it or bring the files back, or run `everos-engine release` if they are meant to be gone",
    "marker_missing": "check that this is the right disk, then run `everos-engine release`",
}


@dataclass(slots=True)
class Brake:
    """Which root we began with, and how many files were known of late: (monotonic seconds, count)."""

    settings: Settings
    device: int = 0
    inode: int = 0
    known: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))

    def arm(self) -> None:
        """Remember the root as it is now, and leave the marker in it."""
        self.aim()
        lay_marker(self.settings)

    def aim(self) -> None:
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

    def is_lost(self) -> bool:
        """Whether the root, and with it the index in it, is not the one we began with: what is missing proves nothing."""
        return self.trouble() in {"root_missing", "root_unreadable", "root_replaced"}

    def is_too_much(self, count: int, *, known: int, now_seconds: float) -> bool:
        """Whether ``count`` of ``known`` files may not vanish now: too many at once, or too many in a row.

        In a row counts the loss, not the churn: files that come while others go are no accident.
        """
        while self.known and now_seconds - self.known[0][0] > WINDOW_SECONDS:
            self.known.popleft()
        self.known.append((now_seconds, known))
        peak = max(before for _, before in self.known)
        at_once = count > most(self.settings, known=known)
        in_a_row = peak - (known - count) > most(self.settings, known=peak)
        return count > 0 and (at_once or in_a_row)


def most(settings: Settings, *, known: int) -> float:
    """How many of ``known`` files may vanish at once."""
    return max(settings.brake_least, settings.brake_ratio * known)


def lay_marker(settings: Settings) -> None:
    """Put the marker file into the root's index folder."""
    path = settings.engine_directory / MARKER
    if not path.exists():
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
