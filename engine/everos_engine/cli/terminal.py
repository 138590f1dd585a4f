"""The standard streams: fit for any text and any target, and checked for lost output at the end."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO, cast

from everos_engine.diagnose.wording import json_text, printable

NAME = "everos-engine"
INPUT, OUTPUT, ERRORS = 0, 1, 2
OURS = re.compile(r"(\x1b\[(?:0|1|2|3[123])m|\x1b\[H\x1b\[2J)")
"""The only sequences that a terminal gets from us: a colour, and a cleared screen."""


def prepare() -> None:
    """Make the three streams usable. For a whole process, before it opens anything.

    A stream that is closed gets its descriptor back, so that no database is opened under its number. What is written to
    standard output is then an error as it is for other tools. What is written to standard error is dropped. A
    character that the encoding does not have is written as an escape.
    """
    for number, flags in ((INPUT, os.O_RDONLY), (OUTPUT, os.O_RDONLY), (ERRORS, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free is this one
    sys.stdin = sys.stdin or _stream(INPUT, "r")
    sys.stdout = sys.stdout or _stream(OUTPUT, "w")
    sys.stderr = sys.stderr or _stream(ERRORS, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        plain = sys.stdout
        sys.stdout = _Output(
            plain.detach(),
            encoding=plain.encoding,
            errors="backslashreplace",
            line_buffering=plain.line_buffering,
            write_through=plain.write_through,
        )


def _stream(number: int, mode: str) -> TextIO:
    return cast("TextIO", os.fdopen(number, mode, encoding="utf-8", closefd=False))


class OutputLost(OSError):
    """Standard output does not take what is printed."""


class _Output(io.TextIOWrapper):
    """Standard output.

    Its errors do not count as errors of a file that the command works on. ``lost`` is the first one.
    """

    lost: OutputLost | None = None

    def write(self, text: str, /) -> int:
        """Write text, fit for a terminal. Each source makes its text printable, and this is the net below them all."""
        with self._renamed():
            super().write(_net(text, terminal=self.isatty()))
        return len(text)

    def flush(self) -> None:
        with self._renamed():
            super().flush()

    @contextmanager
    def _renamed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost = self.lost or OutputLost(error.errno, error.strerror)
            raise self.lost from error


def _net(text: str, *, terminal: bool) -> str:
    if not terminal:
        return printable(text, lines=True)
    return "".join(part if OURS.fullmatch(part) else printable(part, lines=True) for part in OURS.split(text))


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document that is valid in the encoding of standard output."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    print(json_text(value, indent=indent) if is_utf8 else json.dumps(value, indent=indent), flush=True)


def say(message: str) -> None:
    """Write one line for the user to standard error, if it can be written."""
    try:
        print(f"{NAME}: {printable(message, lines=True)}", file=sys.stderr, flush=True)
    except OSError:
        _drop(ERRORS)


def finish() -> OutputLost | None:
    """Write out what was printed. Returns the first error if something could not be written.

    A reader that has gone away has seen all that it wanted. That is not an error.
    """
    try:
        sys.stdout.flush()
    except OSError:
        _drop(OUTPUT)
    try:
        sys.stderr.flush()
    except OSError:
        _drop(ERRORS)
    return sys.stdout.lost if isinstance(sys.stdout, _Output) else None


def leave(status: int) -> NoReturn:
    """End the process now. Call it last, after ``finish``.

    The end of the interpreter waits for threads of libraries, and LanceDB's runtime can keep it waiting without end.
    """
    os._exit(status)


def _drop(number: int) -> None:
    """Discard what is still buffered, because the interpreter writes it again when it ends."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
