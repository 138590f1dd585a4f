"""Colour and width for people: only on a terminal, and never if NO_COLOR is set."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import string
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

CODES = {"green": "32", "yellow": "33", "red": "31", "bold": "1", "dim": "2"}
MAX_COLUMNS = 110
_COMMAND = re.compile(r"`[^`]+`")
_ESCAPE = re.compile(r"\x1b\[\d+m")
_UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}
_PLAIN = set(string.ascii_letters + string.digits + "_-./ ~%+=:,@")
_CONTROLS = (
    "\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(f"[\n{_CONTROLS}]")
_UNSAFE_IN_LINES = re.compile(f"[{_CONTROLS}]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Style:
    """Paint if ``colour`` is True. ``columns`` is the width to wrap to."""

    colour: bool = False
    columns: int = MAX_COLUMNS

    def __call__(self, text: str, code: str) -> str:
        """Return ``text``, printable, in one of ``CODES``."""
        text = printable(text)
        return f"\x1b[{CODES[code]}m{text}\x1b[0m" if self.colour and text else text

    def wrap(self, text: str, *, indent: int, first: str = "") -> str:
        """Return ``text``, printable, after ``first``, with every further line indented.

        A command between backticks is never broken.
        """
        whole = _COMMAND.sub(lambda match: match[0].replace(" ", "\0"), printable(text, lines=True))
        lines: list[str] = []
        for part in whole.split("\n"):
            lead = "x" * len(_ESCAPE.sub("", first)) if not lines else " " * indent
            lines += textwrap.wrap(
                part, max(40, self.columns), initial_indent=lead, subsequent_indent=" " * indent, **_UNBROKEN
            ) or [lead]
        lines[0] = first + lines[0][len(_ESCAPE.sub("", first)) :]
        return "\n".join(lines).replace("\0", " ")


def style_for(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Style:
    """Return colour and width that suit ``stream``."""
    terminal = stream.isatty()
    colour = terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    return Style(colour, min(MAX_COLUMNS, shutil.get_terminal_size().columns) if terminal else MAX_COLUMNS)


def ago(seconds: float) -> str:
    """Return a duration in the largest unit that says enough."""
    for bound, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < bound:
            return f"{seconds / unit:.0f} {name}" if seconds >= 10 or unit > 1 else f"{seconds:.1f} {name}"
    return f"{seconds / 86_400:.0f} days"


def size(count: float) -> str:
    """Return bytes for people, in binary units."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:,.0f} {_UNITS[unit]}" if unit == 0 or count >= 10 else f"{count:.1f} {_UNITS[unit]}"


def program_at(root: str | os.PathLike[str] | None) -> str:
    """Return how to call this program on a memory root. None is the root of the settings."""
    return "everos-engine" if root is None else shlex.join(["everos-engine", "--root", os.fspath(root)])


def with_root(text: str, program: str) -> str:
    """Return a text for people in which the commands of this program name the root that ``program`` names."""
    return text.replace("`everos-engine ", f"`{program} ")


def quoted(*words: str | os.PathLike[str]) -> str:
    """Return a command line, on one line and without backticks, that bash reads back as these words."""
    return " ".join(_quoted(os.fspath(word)) for word in words)


def commands_in(remedy: str) -> list[str]:
    """Return the commands of a remedy: everything between backticks."""
    return [match[0][1:-1] for match in _COMMAND.finditer(remedy)]


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return ``text`` with everything escaped that a terminal obeys, or that shows another text than there is.

    These are control characters (C0, DEL and C1), line and paragraph separators, marks and overrides of the writing
    direction, invisible tags, and bytes that are not UTF-8. With ``lines`` a newline stays. All text that comes from
    files, from the network or from another process goes through here before a person sees it.
    """
    return (_UNSAFE_IN_LINES if lines else _UNSAFE).sub(_escaped, text)


def json_text(value: object, *, indent: int | None = 2) -> str:
    """Return one JSON document as readable text that is safe for a terminal.

    The same characters are escaped, in JSON's way.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNSAFE_IN_LINES.sub(lambda match: json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f", text)


def shown(path: str) -> str:
    """Return a path on one line, with any name."""
    return path if path.isprintable() else ascii(path)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _SHORT:
        return _SHORT[match[0]]
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _quoted(word: str) -> str:
    if word.isprintable() and "`" not in word:
        return shlex.quote(word)
    kept = "".join(
        chr(byte) if chr(byte) in _PLAIN else f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogateescape")
    )
    return f"$'{kept}'"


def plural(count: int, one: str, many: str = "") -> str:
    """Return ``3 files``, ``1 file``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
