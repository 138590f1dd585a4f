"""One log: loguru, with the standard library's records sent through it."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

    from everos_engine.settings import Settings
    from everos_engine.surface.live import Screen

TEXT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}"


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"} else "INFO"
        logger.opt(exception=record.exc_info).log(level, "{} {}", record.name, record.getMessage())


def set_up(settings: Settings, *, reporting: bool = False) -> Screen | None:
    """Text lines, or one JSON object a line, on standard error; above a live line, which is returned, on a terminal.

    A ``reporting`` command says itself what it did and what failed: its log has only further warnings, unless a form of log was asked for.
    """
    logger.remove()
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    if settings.log_format == "json":
        logger.add(sys.stderr, level=settings.log_level, serialize=True)
        return None
    if settings.log_format == "auto" and sys.stderr.isatty():
        from everos_engine.surface.live import Screen  # noqa: PLC0415 - only on a terminal

        screen = Screen(sys.stderr)
        logger.add(screen.write, level="WARNING", format=TEXT, filter=_is_news if reporting else None)
        return screen
    if settings.log_format == "auto" and reporting and settings.log_level == "INFO":
        logger.add(sys.stderr, level="WARNING", format=TEXT, filter=_is_news)
        return None
    logger.add(sys.stderr, level=settings.log_level, format=TEXT)
    return None


def _is_news(record: Record) -> bool:
    return not record["message"].startswith("change_failed")
