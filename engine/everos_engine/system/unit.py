"""Limit an unexpected error to one unit of a loop's work. The loop continues with the next unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loguru import logger

from everos_engine.errors import Damaged, EngineError, Fatal, SettingsError, exhausted, split_end


@dataclass(slots=True)
class Unit:
    """Hold the result of one unit of work. ``error`` is why it failed, or None."""

    error: BaseException | None = None


@contextmanager
def unit(loop: str, what: str) -> Iterator[Unit]:
    """Catch an unexpected error of the block, and log it once with its traceback.

    What the doors raise (EngineError) and a lack of descriptors pass through, because the loop handles them. So does
    cancellation. A group of errors is unexpected if one of its members is, unless it also has a Fatal, SettingsError or
    Damaged.
    """
    done = Unit()
    try:
        yield done
    except BaseException as error:
        end, rest = split_end(error)
        if rest is None or _is_known(rest):
            raise
        logger.opt(exception=rest).error("unit_failed loop={} what={!r}", loop, what)
        if end is not None:
            raise end from None
        done.error = rest


def _is_known(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        decides = error.subgroup((Fatal, SettingsError, Damaged)) is not None
        return decides or all(_is_known(member) for member in error.exceptions)
    return isinstance(error, EngineError) or exhausted(error)
