"""Append lines to a file, and survive any error of its disk or path."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class HistoryFile:
    """Append lines to ``path``.

    The first line opens the file, and the next line after a failure opens it again.
    """

    path: Path
    _handle: int | None = None
    _is_torn: bool = False

    def append(self, line: str) -> str | None:
        """Append a line. Returns why that failed, or None. Nothing is raised, and nothing waits."""
        try:
            if self._handle is None:
                # O_NONBLOCK: opening a pipe that has no reader would block the whole engine
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
                self._handle = os.open(self.path, flags, 0o600)
            data = ("\n" if self._is_torn else "").encode() + line.encode("ascii", "backslashreplace") + b"\n"
            written = os.write(self._handle, data)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
            self.close()
            return str(error)
        self._is_torn = written < len(data)
        return "only a part of a line could be written" if self._is_torn else None

    def close(self) -> None:
        """Close the file. The next line opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)
