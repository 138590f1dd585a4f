"""One log: loguru, with the standard library's records sent through it."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from everos_engine.settings import Settings

TEXT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}"


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"} else "INFO"
        logger.opt(exception=record.exc_info).log(level, "{} {}", record.name, record.getMessage())


def set_up(settings: Settings) -> None:
    """Text lines, or one JSON object a line, on standard error."""
    logger.remove()
    if settings.log_format == "json":
        logger.add(sys.stderr, level=settings.log_level, serialize=True)
    else:
        level = "WARNING" if settings.log_format == "auto" and sys.stderr.isatty() else settings.log_level
        logger.add(sys.stderr, level=level, format=TEXT)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
