"""One log: loguru, which also gets the standard library's records."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from loguru import logger

from everos_engine.diagnose.wording import printable, program_at, with_root
from everos_engine.errors import clipped
from everos_engine.settings import MASK, MIN_SECRET_CHARACTERS, MemorySettings, Settings, secrets_of
from everos_engine.system.repeats import Repeats

if TYPE_CHECKING:
    from loguru import Record  # only in its stubs

    from everos_engine.cli.progress import Screen

SAY_EVERY_SECONDS = 60.0
REPETITIVE = frozenset({
    "loop_restart", "loop_died", "unit_failed", "events_left_to_scan", "cascade_lancedb_optimize_failed", "embedder_down",
    "embedder_back", "search_without_vectors", "index_not_checked", "descriptor_law_unknown",
})  # fmt: skip
"""Events that a lasting trouble raises again and again. With `log_level=DEBUG` each is logged."""
_SAME = re.compile(r"^\S+|\b(?:loop|kind|what)=(?:'[^']*'|\S+)")
HEAD = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} "
MAX_MESSAGE_CHARACTERS = 8192
MAX_TRACEBACK_CHARACTERS = 32_768
CONTINUED = "    | "
"""Before each line of a traceback, so that no text in it can look like a line of the log."""


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"} else "INFO"
        logger.opt(exception=record.exc_info).log(level, "{} {}", record.name, record.getMessage())


def set_up(settings: Settings, *, reporting: bool = False) -> Screen | None:
    """Log text lines, or one JSON object per line, to standard error.

    On a terminal the live line, which is returned, stays below.

    A ``reporting`` command says what it did and what failed. Its log has only further warnings, unless a form of log
    was asked for.
    """
    logger.remove()
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    hide, rarely = _for_people(settings), None if settings.log_level == "DEBUG" else Rarely()
    if settings.log_format == "json":
        logger.add(
            lambda line: _write(as_json_line(line, hide)),
            level=settings.log_level,
            filter=rarely,
            serialize=True,
            diagnose=False,
        )
        return None
    form = text_form(hide)
    if settings.log_format == "auto" and sys.stderr.isatty():
        from everos_engine.cli.progress import Screen

        screen = Screen(sys.stderr)
        news = _is_news if reporting else rarely
        logger.add(screen.write, level="WARNING", format=form, filter=news, diagnose=False)
        return screen
    if settings.log_format == "auto" and reporting and settings.log_level == "INFO":
        logger.add(sys.stderr, level="WARNING", format=form, filter=_is_news, diagnose=False)
        return None
    logger.add(sys.stderr, level=settings.log_level, format=form, filter=rarely, diagnose=False)
    return None


class Rarely:
    """Let repeated events through once a minute, each with how often it came meanwhile.

    Events are the same if they have the same name and name the same loop, kind and unit.
    """

    def __init__(self) -> None:
        self._repeats = Repeats(every_seconds=SAY_EVERY_SECONDS)

    def __call__(self, record: Record) -> bool:
        """Return whether the record is due now."""
        message = record["message"]
        if message.partition(" ")[0] not in REPETITIVE:
            return True
        times = self._repeats.due(" ".join(_SAME.findall(message)), time.monotonic())
        if times > 1:
            record["message"] = f"{message} times={times}"
        return times > 0


def text_form(hide: Callable[[str], str]) -> Callable[[Record], str]:
    """Return the one form of text logs.

    It is one line per record, and marked lines for a traceback, all printable and without secrets.
    """

    def form(record: Record) -> str:
        lines = [printable(clipped(hide(record["message"]), MAX_MESSAGE_CHARACTERS))]
        caught = record["exception"]
        if caught is not None and caught.type is not None:
            text = "".join(traceback.format_exception(caught.type, caught.value, caught.traceback))
            text = clipped(hide(text), MAX_TRACEBACK_CHARACTERS)
            lines += [CONTINUED + printable(line) for line in text.rstrip("\n").split("\n")]
        record["extra"]["lines"] = "\n".join(lines)
        return HEAD + "{extra[lines]}\n"

    return form


def as_json_line(line: str, hide: Callable[[str], str]) -> str:
    """Return a serialized record as one printable line of bounded length. Escapes of JSON keep its meaning."""
    line = hide(line.rstrip("\n"))
    if len(line) > MAX_MESSAGE_CHARACTERS:
        line = json.dumps(_bounded(json.loads(line)))
    return re.sub(r"[^ -~]", _as_json_escape, line) + "\n"


def _bounded(value: object) -> object:
    """Return plain data with each text in it clipped."""
    if isinstance(value, str):
        return clipped(value, MAX_MESSAGE_CHARACTERS)
    if isinstance(value, dict):
        return {name: _bounded(part) for name, part in value.items()}
    return [_bounded(part) for part in value] if isinstance(value, list) else value


def _for_people(settings: Settings) -> Callable[[str], str]:
    """Return a function that makes a message fit for people.

    It masks secrets, and has the commands in it name the root unless it is the default.
    """
    hide, default = hider(settings), MemorySettings().root
    program = program_at(None if settings.root == default else settings.root)
    return lambda text: with_root(hide(text), program)


def hider(settings: Settings) -> Callable[[str], str]:
    """Return a function that masks every secret of these settings in a text.

    It is the last net, below the masks at each source.
    """
    secrets = [secret for secret in secrets_of(settings) if len(secret) >= MIN_SECRET_CHARACTERS]
    if not secrets:
        return str
    quoted = {form for secret in secrets for form in (secret, repr(secret)[1:-1])}
    written = quoted | {json.dumps(form, ensure_ascii=False)[1:-1] for form in quoted}
    any_of_them = re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True))))
    return lambda text: any_of_them.sub(MASK, text)


def _write(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def _as_json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[at : at + 2], 'big'):04x}" for at in range(0, len(units), 2))


def _is_news(record: Record) -> bool:
    return not record["message"].startswith("change_failed")
