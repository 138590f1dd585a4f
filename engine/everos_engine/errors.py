"""The error families: what went wrong outside our code, sorted by what happens next."""

from __future__ import annotations

import errno
import sys
from typing import ClassVar, Literal

FULL = frozenset({errno.EMFILE, errno.ENFILE})
_FULL_WORDS = (*(f"os error {number}" for number in sorted(FULL)), "Too many open files")


MAX_QUOTED_CHARACTERS = 80
MAX_ERROR_CHARACTERS = 4096
"""The maximum that is kept of the error of one change."""


def quoted(value: object) -> str:
    """Return a value as it is shown in an error: its ``repr``, of at most 80 characters and a mark where it was cut."""
    if isinstance(value, (str, bytes)):
        value = value[: MAX_QUOTED_CHARACTERS + 1]
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}…"


def clipped(text: str, most: int = MAX_ERROR_CHARACTERS) -> str:
    """Return a text of at most ``most`` characters: its beginning, and its end with the remedy."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[: half - 3]} … {text[-half:]}"


class EngineError(Exception):
    """The base of every error that this package raises on purpose. Its text says what to do next."""


class SettingsError(EngineError):
    """A setting has a value that the engine cannot work with. The text names the setting, the value and the bound."""


class Fatal(EngineError):
    """Something that only a person can change. The process ends non-zero with this reason."""


class AlreadyRunning(EngineError):
    """Another process owns this memory root.

    ``pid`` is that process, or None if its lock file could not be read. ``ends_by_itself``: it is a command such as
    `sync`, not an engine that serves until it is stopped.
    """

    def __init__(self, message: str, *, pid: int | None, ends_by_itself: bool = False) -> None:
        super().__init__(message)
        self.pid = pid
        self.ends_by_itself = ends_by_itself


class OutsideRoot(EngineError):
    """A path that a person named lies outside the memory root, or no kind of the engine matches it."""


class BadQuestion(EngineError):
    """A search that cannot find anything: no word in it, an unknown kind or mode, or a limit below 1."""


class Transient(EngineError):
    """The trouble may be over in a moment. The work is done again after a backoff.

    ``retry_after_seconds`` is what the other side asked for (HTTP ``Retry-After``), or None. ``counts_as_retry`` is
    False for an outage of something that all changes share. It is waited out, and never dead-letters a change.
    ``waits_for`` is the reason that the queue keeps for a change that is delayed by it.
    """

    waits_for: ClassVar[Literal["retry", "settle", "embedder", "root", "descriptors", "disk", "file"]] = "retry"

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, counts_as_retry: bool = True) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.counts_as_retry = counts_as_retry


class UnknownOutcome(Transient):
    """A write was cut off at its deadline. It may or may not have happened, so it must be done again."""


class Exhausted(Transient):
    """The process or the system has no file descriptor left. The work waits until it has, and no attempt is counted."""

    waits_for = "descriptors"

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


class Unavailable(Transient):
    """The embedding service as a whole does not answer (down, throttled, refusing the key). No change is to blame.

    Its text says why. What waits for it is done as soon as the service answers, and loses none of its attempts.
    """

    waits_for = "embedder"

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, counts_as_retry=False)


class DiskFull(Transient):
    """A disk or a quota has no space left. The work waits until it has, and no attempt is counted."""

    waits_for = "disk"

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


class RootAway(Transient):
    """The memory root is not the one of the start.

    A person must bring it back before anything is written or deleted.
    """

    waits_for = "root"

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


class Unexpected(Transient):
    """A library raised an error that is unknown to us.

    It counts as trouble outside our code, and no change is to blame.

    The library's own error is its ``__cause__``.
    """

    def __init__(self, message: str, *, counts_as_retry: bool = False) -> None:
        super().__init__(message, counts_as_retry=counts_as_retry)


class Damaged(Transient):
    """A store's file is proven not to hold what its library wrote. It is set aside and made again from markdown."""

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


class KeepsDying(EngineError):
    """A loop ended with a bug too often. The stores are opened again, and all loops with them."""


class BadFile(EngineError):
    """A file that only an edit can fix.

    ``line`` and ``column`` are 1-based, or None if the damage has no place. ``remedy`` says what to edit. ``setting``
    is the name of the setting of which another value would help too, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str,
        line: int | None = None,
        column: int | None = None,
        setting: str | None = None,
    ) -> None:
        super().__init__(message)
        self.setting = setting
        self.remedy = remedy
        self.line = line
        self.column = column

    def __str__(self) -> str:
        where = "" if self.line is None else f"line {self.line}"
        if self.line is not None and self.column is not None:
            where += f", column {self.column}"
        text = f"{where}: {self.args[0]}" if where else str(self.args[0])
        return f"{text}; {self.remedy}"


class BadText(EngineError):
    """The embedder refuses this one text (HTTP 400, 413, 422). An edit of its entry helps."""


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_ROOM_WORDS = (
    *(f"os error {number})" for number in sorted(NO_ROOM)),
    "No space left on device",
    "Disk quota exceeded",
)


def disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that a disk or a quota has no space left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in NO_ROOM):
            return True
        if isinstance(error, (RuntimeError, OSError, Transient)) and any(
            words in str(error) for words in _NO_ROOM_WORDS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def exhausted(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that no file descriptor is left (EMFILE, ENFILE).

    LanceDB reports it only in the words of a RuntimeError.
    """
    return _exhausted(error, set())


def _exhausted(error: BaseException | None, seen: set[int]) -> bool:
    """Do the same for an error of which ``seen`` were looked at.

    An error that left its group has the group as its context, which holds it again.
    """
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, BaseExceptionGroup):
            return any(_exhausted(member, seen) for member in error.exceptions)
        if isinstance(error, Exhausted) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        if isinstance(error, (RuntimeError, OSError, ImportError)) and any(
            words in str(error) for words in _FULL_WORDS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def split_end(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Split an error into what ends the task from outside, and the rest.

    The first part is a cancellation, KeyboardInterrupt, SystemExit or GeneratorExit, or a group of them. It must be
    raised again. The second part is what some code raised, also if it is a BaseException, as a Rust panic is.
    """
    if isinstance(error, BaseExceptionGroup):
        end, rest = error.split(_ends_the_task)
        return (end, rest) if end is not None else (None, error)
    return (error, None) if _ends_the_task(error) else (None, error)


def _ends_the_task(error: BaseException) -> bool:
    trio = sys.modules.get("trio")  # a command that needs no event loop does not pay for the import
    if trio is not None and isinstance(error, trio.Cancelled):
        return True
    return isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def unwrap(error: BaseException) -> BaseException:
    """Return the one error inside nested groups.

    If there are several, return the first that decides more than the others, or else the group itself.
    """
    while isinstance(error, BaseExceptionGroup):
        deciding = next(filter(None, map(error.subgroup, _DECIDING)), None)
        members = (deciding or error).exceptions
        if len(members) > 1 and deciding is None:
            return error
        error = members[0]
    return error


_DECIDING: tuple[type[Exception] | tuple[type[Exception], ...], ...] = ((Fatal, SettingsError), Damaged, KeepsDying)
